"""Positions beyond what transformers' models test: scaled and length-dependent frequencies, log-n, caches, windows."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.config import ModelConfig, RopeScalingConfig
from llm_jax.errors import UserError
from llm_jax.models import positions
from tests.models import oracle

GOLDEN = Path(__file__).parent.parent / "golden" / "rope.npz"
SCALED = {
    "llama3_1": (5e5, RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 8192)),
    "llama3_other": (1e4, RopeScalingConfig("llama3", 32.0, 2.0, 3.0, 512)),
    "linear": (1e4, RopeScalingConfig("linear", 4.0)),
}
BASE = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=40,
    max_length=4,
    init_std=0.3,
)
EXTENSIONS = {
    "ntk": {"dynamic_ntk": True},
    "log_n": {"log_n": True},
    "windows": {"window_sizes": (3, 6)},
    "alibi": {"position": "alibi", "num_kv_heads": 6},
    "all": {"dynamic_ntk": True, "log_n": True, "window_sizes": (3, 6)},
    "all_chunked": {"dynamic_ntk": True, "log_n": True, "window_sizes": (3, 6), "attention": "chunked"},
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 17)).astype(np.int32)

forward = jax.jit(models.logits, static_argnums=1)


@functools.cache
def build(**changes):
    config = dataclasses.replace(BASE, **changes)
    return config, models.init(config, jax.random.key(0))


def expected(config, params, tokens, context_length=None):
    """The oracle's logits [T, V]."""
    params64 = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    return oracle.logits(params64, config, tokens, context_length=context_length)


@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_equal_transformers_and_the_oracle(name):
    theta, scaling = SCALED[name]
    config = ModelConfig(head_dim=128, rope_theta=theta, rope_scaling=scaling)
    got = positions.rotary_frequencies(config, theta)
    np.testing.assert_allclose(got, np.load(GOLDEN)[name], rtol=2e-6)
    np.testing.assert_allclose(got, [oracle.frequency(config, theta, i) for i in range(64)], rtol=1e-12)


def test_llama3_factors_that_leave_nothing_between_are_refused():
    with pytest.raises(UserError, match="must be below high_frequency_factor"):
        RopeScalingConfig("llama3", 8.0, 4.0, 4.0, 8192)


def doublings(length, trained_length):
    count = 0
    while trained_length << count < length:
        count += 1
    return count


@pytest.mark.parametrize("trained_length", [1, 3, 128, 2000, 2048, 8192])
def test_ntk_steps_lie_exactly_at_powers_of_two(trained_length):
    borders = [trained_length << k for k in range(16)]
    lengths = np.unique([0, 1, *borders, *(b + 1 for b in borders), *(b - 1 for b in borders)]).astype(np.int32)
    got = jax.jit(positions.ntk_doublings, static_argnums=1)(lengths, trained_length)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [doublings(int(length), trained_length) for length in lengths])


@pytest.mark.parametrize(("length", "alpha"), [(1, 1), (100, 1), (101, 3), (200, 3), (201, 7), (400, 7), (401, 15)])
def test_ntk_base_is_that_of_the_report(length, alpha):
    config = ModelConfig(head_dim=64, max_length=100, rope_theta=1e4, dynamic_ntk=True)
    assert oracle.base(config, length) == pytest.approx(1e4 * alpha ** (64 / 62))
    position = np.full((1, 1), 37, np.int32)
    got = positions.rotary_tables(config, position, np.full((1, 1), length, np.int32))
    angles = 37 * (1e4 * alpha ** (64 / 62)) ** (-np.arange(32) / 32)
    np.testing.assert_allclose(got[0][0, 0], np.cos(angles), atol=5e-6)
    np.testing.assert_allclose(got[1][0, 0], np.sin(angles), atol=5e-6)


def test_ntk_changes_no_bit_within_the_trained_length():
    config, params = build(dynamic_ntk=True)
    plain = dataclasses.replace(config, dynamic_ntk=False)
    np.testing.assert_array_equal(forward(params, config, TOKENS[:, :4]), forward(params, plain, TOKENS[:, :4]))
    assert np.abs(forward(params, config, TOKENS[:, :5]) - forward(params, plain, TOKENS[:, :5])).max() > 1e-3


def test_ntk_refuses_heads_of_one_pair():
    config = dataclasses.replace(BASE, head_dim=2, dynamic_ntk=True)
    with pytest.raises(UserError, match="head_dim above 2"):
        models.logits(models.init(BASE, jax.random.key(0)), config, TOKENS)


@pytest.mark.parametrize("position", [0, 6, 7, 8, 100])
def test_log_n_scale_is_that_of_the_report(position):
    got = positions.log_n_scale(jnp.full((1, 1), position), 8)
    want = np.log(position + 1) / np.log(8) if position + 1 > 8 else 1.0
    assert float(got[0, 0]) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("changes", EXTENSIONS.values(), ids=EXTENSIONS)
def test_texts_past_the_trained_length_equal_the_oracle(changes):
    config, params = build(**changes)
    got = forward(params, config, TOKENS)
    for row in range(2):
        np.testing.assert_allclose(got[row], expected(config, params, TOKENS[row]), atol=1e-4)


@pytest.mark.parametrize("changes", EXTENSIONS.values(), ids=EXTENSIONS)
def test_a_ragged_batch_read_in_chunks_and_continued_equals_each_row_alone(changes):
    """Left padding, chunked prefill with the prompts' lengths stated up front, then one token at a time."""
    config, params = build(**changes)
    lengths, width, chunk = np.array([5, 12], np.int32), 12, 4
    tokens, segments = np.zeros((2, width), np.int32), np.zeros((2, width), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, width - length :] = TOKENS[row, :length]
        segments[row, width - length :] = 1
    places = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    cache = models.init_cache(config, 2, 20, context_length=jnp.asarray(lengths))
    parts = []
    for start in range(0, width, chunk):
        now = np.s_[:, start : start + chunk]
        part, cache = forward(
            params, config, tokens[now], positions=places[now], segment_ids=segments[now], cache=cache
        )
        parts.append(part)
    for step in range(4):
        token = TOKENS[np.arange(2), lengths + step][:, None]
        part, cache = forward(params, config, token, positions=(lengths + step)[:, None], cache=cache)
        parts.append(part)
    got = np.concatenate(parts, axis=1)
    for row, length in enumerate(lengths):
        want = expected(config, params, TOKENS[row, : length + 4], context_length=int(length))
        np.testing.assert_allclose(got[row, width - length :], want, atol=1e-4)


def test_the_first_call_fixes_the_base_of_each_row():
    config, params = build(dynamic_ntk=True)
    segments = np.array([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], np.int32)
    places = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    cache = models.init_cache(config, 2, 12)
    np.testing.assert_array_equal(cache.context_length, [0, 0])
    _, cache = forward(params, config, TOKENS[:, :5], positions=places, segment_ids=segments, cache=cache)
    np.testing.assert_array_equal(cache.context_length, [2, 5])
    _, cache = forward(params, config, TOKENS[:, 5:12], positions=places[:, -1:] + 1 + np.arange(7), cache=cache)
    np.testing.assert_array_equal(cache.context_length, [2, 5])
