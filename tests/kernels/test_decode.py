"""The kernels of decoding, interpreted, against the float64 oracle; and that broken ones would be caught."""

import dataclasses
import functools
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import flash_decoding, pallas_gpu_decode, pallas_tpu_decode
from llm_jax.kernels.flash_decoding import FIRST, HOLES, LAST, Slots
from llm_jax.kernels.mask import AttentionMask
from tests.kernels.decoding import (
    BLOCK,
    SHAPE,
    compiled,
    everything,
    expected,
    in_int8,
    inputs,
    interpreted,
    poisoned,
    relative_error,
    visible,
)
from tests.kernels.strategies import decoding_problems, full_masks

KERNELS = ("gpu", "tpu")
B, S, N, K, H = SHAPE
# Every field in use, and each of consequence: a hole in every row, a window that cuts, lengths below the query's index.
FULL = AttentionMask(
    window=jnp.int32(37),
    query_segment_ids=jnp.ones((B, 1), jnp.int32),
    key_segment_ids=jnp.ones((B, S), jnp.int32).at[:, 30:34].set(2),
    query_offset=jnp.asarray([60, 50, 40], jnp.int32),
    key_lengths=jnp.asarray([59, 48, 40], jnp.int32),
    slopes=jnp.linspace(0.02, 0.1, N),
    query_scale=jnp.asarray([[1.0], [0.7], [1.3]]),
)


@pytest.mark.parametrize("stored", ["float", "int8"])
@pytest.mark.parametrize("form", KERNELS)
def test_any_mask_agrees_with_the_definition_whatever_lies_in_hidden_slots(form, stored):
    """Drawn masks with every feature; the cache is NaN in all slots that are hidden."""
    q, slots = inputs(*SHAPE)
    slots = in_int8(slots) if stored == "int8" else slots
    seen_B = []

    @hypothesis.settings(max_examples=20, deadline=None, database=None)
    @hypothesis.given(mask=full_masks(B, 1, S, N))
    def draw(mask):
        actual = np.asarray(compiled(form)(q, poisoned(slots, mask), mask))
        np.testing.assert_allclose(actual, expected(q, slots, mask), rtol=2e-5, atol=2e-6)
        seen_B.extend(visible(mask, B, S).any(axis=1))
        assert np.all(actual[~visible(mask, B, S).any(axis=1)] == 0), "a row that sees nothing gives exactly 0"

    draw()
    assert any(seen_B) and not all(seen_B)


# Of the queries and of the cache. A TPU has no float16.
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float16", "float16")]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "stored"), DTYPES)
@pytest.mark.parametrize("form", KERNELS)
def test_any_problem(form, dtype, stored):
    if (form, dtype) == ("tpu", "float16"):
        pytest.skip("not for TPUs")

    @hypothesis.settings(max_examples=20, deadline=None)
    @hypothesis.given(problem=decoding_problems())
    def draw(problem):
        shape, mask, splits = problem
        q, slots = inputs(*shape, jnp.dtype(dtype))
        slots = in_int8(slots) if stored == "int8" else slots
        wanted = expected(q, slots, mask)
        actual = jax.jit(interpreted(form, splits, heads=shape[3]))(q, poisoned(slots, mask), mask)
        assert actual.dtype == jnp.dtype(dtype)
        assert np.all(np.asarray(actual)[~visible(mask, shape[0], shape[1]).any(axis=1)] == 0)
        assert relative_error(actual, wanted) < {"float32": 4e-6, "bfloat16": 1.2e-2, "float16": 1.5e-3}[dtype]

    draw()


@pytest.mark.parametrize("form", KERNELS)
def test_a_mask_without_any_rule(form):
    q, slots = inputs(*SHAPE)
    mask = AttentionMask(causal=False)
    actual = jax.jit(interpreted(form))(q, slots, mask)
    np.testing.assert_allclose(actual, expected(q, slots, mask), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", KERNELS)
def test_any_number_of_splits_gives_the_same(form):
    """One, several, and more than there are blocks, so that some have nothing to do."""
    q, slots = inputs(*SHAPE)
    one, several, many = (compiled(form, splits)(q, slots, FULL) for splits in (1, 3, 7))
    np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
    assert relative_error(one, expected(q, slots, FULL)) < 4e-6


# Query heads and key/value heads, head dim, dtype, error allowed.
SIZES = {
    "one query head for each key head": (4, 4, 32, jnp.bfloat16, 1.2e-2),
    "one key head for all": (20, 1, 96, jnp.float32, 4e-6),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", KERNELS)
def test_heads_and_dtypes(form, size):
    N, K, H, dtype, tolerance = SIZES[size]
    q, slots = inputs(2, 40, N, K, H, dtype)
    mask = AttentionMask(query_offset=jnp.asarray([39, 20], jnp.int32))
    blocks = {"gpu": pallas_gpu_decode.Blocks(BLOCK, 2), "tpu": pallas_tpu_decode.Blocks(BLOCK, K, 2)}[form]
    actual = jax.jit(functools.partial(interpreted(form), blocks=blocks))(q, slots, mask)
    assert actual.dtype == dtype and actual.shape == (2, 1, N, H)
    assert relative_error(actual, expected(q, slots, mask)) < tolerance


def test_a_tiny_scale_keeps_its_precision_in_float16():
    """Values of 1e-4 have scales below what float16 holds: probabilities times scales are not rounded to it."""
    q, slots = inputs(1, 40, 2, 2, 32)
    slots = in_int8(Slots(slots.key, slots.value * 1e-4))
    mask = AttentionMask(query_offset=jnp.int32(39))
    actual = jax.jit(interpreted("gpu", 1))(q.astype(jnp.float16), slots, mask)
    assert actual.dtype == jnp.float16
    assert relative_error(actual, expected(q, slots, mask)) < 8e-3


@pytest.mark.parametrize("form", KERNELS)
def test_vmap(form):
    """A batch of decoding problems is the problems one by one."""
    q, slots = inputs(*SHAPE)
    fields = ("query_segment_ids", "key_segment_ids", "query_offset", "key_lengths", "query_scale")

    def one(q, slots, rows):
        row = dataclasses.replace(FULL, **{name: value[None] for name, value in rows.items()})
        return interpreted(form)(q[None], jax.tree.map(lambda x: x[None], slots), row)[0]

    rows = {name: getattr(FULL, name) for name in fields}
    actual = jax.jit(jax.vmap(one))(q, slots, rows)
    np.testing.assert_allclose(actual, expected(q, slots, FULL), rtol=2e-5, atol=2e-6)


def test_what_a_kernel_knows_of_a_row_is_what_is_visible():
    for seed in range(20):
        mask = everything(np.random.default_rng(seed), B, S, N)
        rows = np.asarray(flash_decoding.row_integers(mask, B, S))
        for seen_S, row in zip(visible(mask, B, S), rows.T, strict=True):
            (keys,) = np.nonzero(seen_S)
            if keys.size == 0:
                assert row[FIRST] == row[LAST] == 0
                continue
            assert (row[FIRST], row[LAST]) == (keys[0], keys[-1] + 1)
            assert row[HOLES] == (keys.size < keys[-1] + 1 - keys[0])


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_splits_share_the_visible_blocks_evenly_and_no_others(splits):
    for first, last in ((0, 70), (15, 17), (0, 0), (16, 64)):
        parts = [flash_decoding.part([first, last], BLOCK, split, splits) for split in range(splits)]
        blocks = [y for start, stop in parts for y in range(start, stop)]
        assert blocks == sorted({s // BLOCK for s in range(first, last)})
        sizes = [stop - start for start, stop in parts]
        assert max(sizes) - min(sizes) <= 1


def test_the_tpu_fetches_the_visible_blocks_once_and_no_others():
    """The pipeline fetches a block when its index changes: over a row's steps, those with a visible key in turn."""
    _, slots = inputs(*SHAPE)
    blocks = pallas_tpu_decode.Blocks(BLOCK, 1, 2)
    for seed in range(8):
        mask = everything(np.random.default_rng(seed), B, S, N)
        rows = np.asarray(flash_decoding.row_integers(mask, B, S))
        unused = dict.fromkeys(("k_scale", "v_scale", "segments", "slopes"))
        given = pallas_tpu_decode._Inputs(q=jnp.zeros((B, K, N // K, H)), k=slots.key, v=slots.value, **unused)
        index_map = pallas_tpu_decode._specs(given, blocks).k.index_map
        for b, seen_S in enumerate(visible(mask, B, S)):
            steps = [(p, i) for p in range(2) for i in range(pallas_tpu_decode._steps(blocks, S))]
            fetched = [int(index_map(b, 0, p, i, rows)[2]) for p, i in steps]
            fetched = [y for y, before in zip(fetched, [None, *fetched], strict=False) if y != before]
            (keys,) = np.nonzero(seen_S)
            inside = range(keys[0] // BLOCK, keys[-1] // BLOCK + 1) if keys.size else range(1)
            assert fetched == list(inside)


def unweighted(out_BKPRH, lse_BKPR, dtype):
    return flash_decoding.unfold_queries(jnp.mean(out_BKPRH, axis=2).astype(dtype), 1)


def whole_blocks(mask, batch, num_keys, real=flash_decoding.row_integers):
    rows = real(mask, batch, num_keys)
    return rows.at[LAST].set((rows[LAST] + BLOCK - 1) // BLOCK * BLOCK)


def without_holes(mask, batch, num_keys, real=flash_decoding.row_integers):
    return real(mask, batch, num_keys).at[HOLES].set(0)


def one_key_early(mask, batch, num_keys, real=flash_decoding.row_integers):
    rows = real(mask, batch, num_keys)
    return rows.at[FIRST].set(jnp.maximum(rows[FIRST] - 1, 0))


def without_last_block(row, block, split, splits, real=flash_decoding.part):
    first, last = real(row, block, split, splits)
    return first, jnp.maximum(last - 1, first)


# The kernels share what combines the splits, so one of them shows its fault.
BROKEN = {
    "splits are not weighted": (("gpu",), {"combine": unweighted}),
    "the tail of the last block is not masked": (KERNELS, {"row_integers": whole_blocks}),
    "segment ids are not looked at": (KERNELS, {"row_integers": without_holes}),
    "the window begins one key early": (KERNELS, {"row_integers": one_key_early}),
    "a split does not come to its last block": (KERNELS, {"part": without_last_block}),
}


@pytest.mark.parametrize(("form", "fault"), [(form, fault) for fault in BROKEN for form in BROKEN[fault][0]])
def test_broken_kernels_are_caught(form, fault):
    q, slots = inputs(*SHAPE)
    wanted = expected(q, slots, FULL)
    with mock.patch.multiple(flash_decoding, **BROKEN[fault][1]):
        actual = jax.jit(interpreted(form))(q, slots, FULL)
    assert relative_error(compiled(form)(q, slots, FULL), wanted) < 4e-6
    assert relative_error(actual, wanted) > 1e-3


@pytest.mark.parametrize("form", KERNELS)
def test_masks_off_by_one_are_caught(form):
    q, slots = inputs(*SHAPE)
    wanted = expected(q, slots, FULL)
    for change in ({"window": FULL.window + 1}, {"key_lengths": FULL.key_lengths + 1}, {"slopes": -FULL.slopes}):
        assert relative_error(compiled(form)(q, slots, dataclasses.replace(FULL, **change)), wanted) > 1e-3
