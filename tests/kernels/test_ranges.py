"""The ranges of tiles against every pair of a query and a key, one at a time."""

import dataclasses
import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import ranges
from llm_jax.kernels.mask import AttentionMask
from tests.kernels import oracle
from tests.kernels.strategies import full_masks, problems


def visible_pairs(mask, batch, num_queries, num_keys):
    pairs = [[[oracle.sees(mask, b, t, s) for s in range(num_keys)] for t in range(num_queries)] for b in range(batch)]
    return np.array(pairs, bool).reshape(batch, num_queries, num_keys)


def check(found, visible_BTS, tile):
    """No visible pair is left out, and none of the pairs taken for visible is hidden."""
    B, T, S = visible_BTS.shape
    for b in range(B):
        for x in range(math.ceil(T / tile[0])):
            rows = visible_BTS[b, x * tile[0] : (x + 1) * tile[0]]
            first, last, full_first, full_last = (int(array[b, x]) for array in found)
            assert 0 <= first <= last <= math.ceil(S / tile[1])
            assert not rows[:, : first * tile[1]].any() and not rows[:, last * tile[1] :].any()
            assert full_first <= full_last <= max(last, full_first)
            if full_first < full_last:
                assert first <= full_first and full_last * tile[1] <= S and (x + 1) * tile[0] <= T
                assert rows[:, full_first * tile[1] : full_last * tile[1]].all()


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def both_ranges(*arguments):
    return ranges.key_ranges(*arguments), ranges.query_ranges(*arguments)


def check_both(shape, mask, tile):
    B, T, S = shape
    visible_BTS = visible_pairs(mask, B, T, S)
    keys, queries = both_ranges(mask, B, T, S, tile)
    check(keys, visible_BTS, tile)
    check(queries, visible_BTS.transpose(0, 2, 1), tile[::-1])


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(problem=problems())
def test_nothing_visible_is_skipped_and_nothing_hidden_is_unmasked(problem):
    check_both(problem[0][:3], *problem[1:])


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(mask=full_masks(2, 13, 18, 1))
def test_nor_whatever_the_values_of_the_rules(mask):
    """Segments that come back among them; of one shape, so that nothing is compiled anew."""
    check_both((2, 13, 18), mask, (3, 4))


def counted(mask, length=64, tile=(8, 8)):
    """Tiles visited and tiles without a mask, of a square problem."""
    found = ranges.key_ranges(mask, 1, length, length, tile)
    return int((found.last - found.first).sum()), int((found.full_last - found.full_first).sum())


def test_work_is_that_of_the_visible_tiles():
    assert counted(AttentionMask(causal=False)) == (64, 64)
    assert counted(AttentionMask()) == (36, 28)
    assert counted(AttentionMask(window=8)) == (15, 0)
    assert counted(AttentionMask(window=17)) == (21, 7)
    segments = jnp.repeat(jnp.arange(1, 5), 16)[None]
    packed = AttentionMask(query_segment_ids=segments, key_segment_ids=segments)
    assert counted(packed) == (12, 4)
    padded = segments.at[:, 40:].set(0)
    assert counted(dataclasses.replace(packed, query_segment_ids=padded, key_segment_ids=padded)) == (7, 2)
    assert counted(AttentionMask(causal=False, key_lengths=jnp.asarray([20]))) == (24, 16)


@pytest.mark.parametrize("change", [{"window": 9}, {"key_lengths": jnp.asarray([40])}])
def test_a_range_of_another_mask_is_caught(change):
    mask = AttentionMask(window=20)
    visible_BTS = visible_pairs(mask, 1, 64, 64)
    check(ranges.key_ranges(mask, 1, 64, 64, (8, 8)), visible_BTS, (8, 8))
    with pytest.raises(AssertionError):
        check(ranges.key_ranges(dataclasses.replace(mask, **change), 1, 64, 64, (8, 8)), visible_BTS, (8, 8))
