"""Logits processors against Hugging Face's on stored inputs, and against plain loops."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llm_jax.config import SamplingConfig
from llm_jax.sampling import processors

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "processors.npz")
CASES = GOLDEN["cases"]

# Logits of one shape and few distinct values, so that ties and signs of zero are common.
coarse_logits = arrays(np.float32, (2, 9), elements=st.sampled_from([-7.5, -1.0, -0.0, 0.0, 0.5, 2.0, 9.0]))
logits = coarse_logits | arrays(np.float32, (2, 9), elements=st.floats(-30, 30, width=32, allow_subnormal=False))
top_k, top_p, process = (jax.jit(function) for function in (processors.top_k, processors.top_p, processors.process))


@pytest.mark.parametrize("i", range(len(CASES)))
def test_as_hugging_face(i):
    logits_BV, ids_BT = GOLDEN["logits_BV"], GOLDEN["ids_BT"]
    penalty, temperature, k, p = CASES[i]
    sampling = SamplingConfig(repetition_penalty=penalty, temperature=temperature, top_k=int(k), top_p=p)
    seen_BV = np.zeros(logits_BV.shape, bool)
    np.put_along_axis(seen_BV, ids_BT, True, axis=1)
    ours_BV = process(jnp.asarray(logits_BV), jnp.asarray(seen_BV), processors.Processors.of(sampling))
    np.testing.assert_allclose(ours_BV, GOLDEN[f"case_{i}"], rtol=1e-6)


def test_the_golden_cases_remove_something():
    removed = [np.isneginf(GOLDEN[f"case_{i}"]).any() for i in range(len(CASES))]
    assert removed == [bool(k) or p < 1 for _, _, k, p in CASES]


@settings(max_examples=200, deadline=None)
@given(logits, st.sampled_from([1, 2, 4, 8, 9, 20]))
def test_top_k_keeps_the_kth_largest_and_its_ties(logits_BV, k):
    kth_B1 = np.sort(logits_BV, axis=-1)[:, ::-1][:, [min(k, 9) - 1]]
    np.testing.assert_array_equal(top_k(logits_BV, k), np.where(logits_BV >= kth_B1, logits_BV, -np.inf))


def nucleus(logits_V: np.ndarray, p: float) -> set[int]:
    """Go through the tokens from the least likely up, and drop each as long as the sum dropped is at most 1 - p."""
    probabilities_V = np.exp(logits_V.astype(np.float64) - logits_V.max())
    probabilities_V /= probabilities_V.sum()
    order = np.argsort(logits_V, kind="stable")
    kept = order[np.cumsum(probabilities_V[order]) > 1 - p]
    return set(kept.tolist()) | {int(order[-1])}


@settings(max_examples=200, deadline=None)
@given(logits, st.sampled_from([1e-9, 0.1, 0.33333, 0.7, 0.95]))
def test_top_p_drops_the_least_likely(logits_BV, p):
    ours_BV = np.asarray(top_p(logits_BV, 1 - p))
    for logits_V, ours_V in zip(logits_BV, ours_BV):
        allowed = [nucleus(logits_V, p + error) for error in (-2e-6, 0, 2e-6)]  # float32 may round to either side
        kept = set(np.flatnonzero(ours_V > -np.inf).tolist())
        assert kept in allowed
        np.testing.assert_array_equal(ours_V[list(kept)], logits_V[list(kept)])


# Equal logits, p, and how many transformers 5.23 keeps.
TIES = [(9, 0.1, 1), (9, 0.3, 3), (9, 0.5, 5), (9, 0.95, 9), (5, 0.8, 4), (10, 0.8, 8), (10, 0.6, 6), (5, 0.6, 3)]


def test_of_equal_logits_top_p_keeps_as_many_as_hugging_face():
    for size, p, count in TIES:
        kept_BV = ~np.isneginf(top_p(np.zeros((1, size), np.float32), 1 - p))
        assert kept_BV.tolist() == [[False] * (size - count) + [True] * count]


def test_top_p_after_top_k_counts_only_what_is_left():
    logits_BV = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    both_BV = top_p(top_k(logits_BV, 2), 1 - 0.5)  # 0.4 is 4/7 of what top-k leaves
    assert np.isneginf(both_BV).tolist() == [[False, True, True, True]]
    assert np.isneginf(top_p(logits_BV, 1 - 0.5)).tolist() == [[False, False, True, True]]


def test_the_penalty_only_touches_what_was_seen():
    logits_BV = np.array([[2.0, -2.0, 0.0, 2.0, -2.0]], np.float32)
    seen_BV = np.array([[True, True, True, False, False]])
    ours_BV = processors.repetition_penalty(logits_BV, seen_BV, 2.0)
    np.testing.assert_array_equal(ours_BV, [[1.0, -4.0, 0.0, 2.0, -2.0]])


def test_greedy_keeps_the_penalty_and_nothing_else():
    logits_BV = np.array([[3.0, 2.0, -1.0]], np.float32)
    seen_BV = np.array([[True, False, False]])
    sampling = SamplingConfig(temperature=0.0, repetition_penalty=2.0, top_k=1, top_p=0.1)
    ours_BV = processors.process(logits_BV, seen_BV, processors.Processors.of(sampling))
    np.testing.assert_array_equal(ours_BV, [[1.5, 2.0, -1.0]])
