"""The decoder against a float64 numpy oracle, and the invariances that its switches promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.config import ModelConfig, RopeScalingConfig
from tests.models import oracle

BASE = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_layers=3,
    num_heads=6,
    num_kv_heads=6,
    head_dim=8,
    ffn_size=40,
    max_length=8,
    init_std=0.3,
    norm_eps=1e-6,
)
VARIANTS = {
    "llama": {},
    "gqa": {"num_kv_heads": 2},
    "alibi": {"position": "alibi"},
    "qwen": {"qkv_bias": True},
    "norm_head": {"norm_head": True},
    "tied": {"tie_embeddings": True},
    "windows": {"window_sizes": (2, 0, 5)},
    "log_n": {"log_n": True},
    "dynamic_ntk": {"dynamic_ntk": True, "max_length": 4},
    "scaled_rope": {"rope_scaling": RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 24)},
}


forward = jax.jit(models.logits, static_argnums=1)


@functools.cache
def build(**changes):
    config = dataclasses.replace(BASE, **changes)
    return config, random_parameters(config)


@functools.partial(jax.jit, static_argnums=0)
def random_parameters(config):
    # Norm scales and biases away from 1 and 0, so that dropping one shows.
    noise = jax.random.normal(jax.random.key(9), (512,)) * 0.3
    return jax.tree.map(lambda p: p + jnp.resize(noise, p.shape), models.init(config, jax.random.key(0)))


def float64(params):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), params)


TOKENS = np.random.default_rng(0).integers(0, 61, (2, 13)).astype(np.int32)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_the_oracle(changes):
    config, params = build(**changes)
    got = forward(params, config, TOKENS)
    for row in range(2):
        np.testing.assert_allclose(got[row], oracle.logits(float64(params), config, TOKENS[row]), atol=2e-4)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_packed_documents_equal_each_alone(changes):
    config, params = build(**changes)
    first, second = TOKENS[0, :5], TOKENS[1, :7]
    packed = np.concatenate([first, second])[None]
    segments = np.array([[1] * 5 + [2] * 7], np.int32)
    positions = np.array([[*range(5), *range(7)]], np.int32)
    got = forward(params, config, packed, positions=positions, segment_ids=segments)[0]
    np.testing.assert_allclose(got[:5], forward(params, config, first[None])[0], atol=2e-5)
    np.testing.assert_allclose(got[5:], forward(params, config, second[None])[0], atol=2e-5)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_left_padded_and_cached_equal_alone_and_uncached(changes):
    config, params = build(**changes)
    padding, prompt, rest = 3, TOKENS[:, :6], TOKENS[:, 6:]
    cache = models.init_cache(config, 2, 20, context_length=jnp.full(2, TOKENS.shape[1]))
    cache = cache._replace(layers=jax.tree.map(lambda x: jnp.full_like(x, 1e30), cache.layers))
    tokens = np.pad(prompt, ((0, 0), (padding, 0)))
    segments = np.pad(np.ones_like(prompt), ((0, 0), (padding, 0)))
    positions = np.maximum(np.arange(tokens.shape[1]) - padding, 0)[None].repeat(2, 0)
    parts, cache = forward(params, config, tokens, positions=positions, segment_ids=segments, cache=cache)
    parts = [parts[:, padding:]]
    for index in range(rest.shape[1]):
        position = np.full((2, 1), prompt.shape[1] + index, np.int32)
        part, cache = forward(params, config, rest[:, index : index + 1], positions=position, cache=cache)
        parts.append(part)
    want = forward(params, config, TOKENS)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=3e-5)


def total_loss(config, params):
    return jnp.sum(jnp.sin(models.logits(params, config, TOKENS)))


value_and_gradient = jax.jit(jax.value_and_grad(total_loss, argnums=1), static_argnums=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": False},
        {"remat": "full"},
        {"remat": "dots"},
        {"remat": "save_attention"},
        {"remat": "full", "scan_layers": False},
        {"attention": "chunked"},
    ],
    ids=str,
)
def test_execution_switches_keep_values_and_gradients(changes):
    config, params = build(num_kv_heads=2, window_sizes=(3, 0, 5))
    value, gradient = value_and_gradient(config, params)
    other_value, other_gradient = value_and_gradient(dataclasses.replace(config, **changes), params)
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    for want, got in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient)):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_remat_policies_save_what_they_say():
    """A policy that saves more recomputes fewer products in the backward pass."""
    products = {}
    for remat in ("none", "dots", "save_attention", "full"):
        config, params = build(num_kv_heads=2)
        config = dataclasses.replace(config, remat=remat)
        jaxpr = jax.make_jaxpr(jax.grad(total_loss, argnums=1), static_argnums=0)(config, params)
        products[remat] = str(jaxpr).count("dot_general")
    assert products["none"] <= products["dots"] < products["full"]
    assert products["none"] < products["save_attention"] <= products["full"]


def test_gradient_of_norm_head_flows_through_the_norm():
    config, params = build(norm_head=True)
    gradient = jax.grad(lambda p: total_loss(config, p))(params)["head"]["kernel"]
    # Scaling a row does not change its normalised direction, so the gradient is orthogonal to every row.
    products = jnp.sum(gradient * params["head"]["kernel"], axis=1)
    np.testing.assert_allclose(products, np.zeros(config.vocab_size), atol=1e-3)
    assert float(jnp.abs(gradient).max()) > 1e-2


def test_dropout_needs_a_key_and_a_rate_and_repeats_with_its_key():
    config, params = build(dropout_rate=0.5)
    hidden = jax.jit(models.hidden_states, static_argnums=1)
    plain = hidden(params, config, TOKENS)
    without_dropout = dataclasses.replace(config, dropout_rate=0.0)
    np.testing.assert_array_equal(plain, hidden(params, without_dropout, TOKENS, dropout_key=jax.random.key(1)))
    dropped = hidden(params, config, TOKENS, dropout_key=jax.random.key(1))
    again = hidden(params, config, TOKENS, dropout_key=jax.random.key(1))
    assert float(jnp.abs(dropped - plain).max()) > 1e-2
    np.testing.assert_array_equal(dropped, again)


def test_dropout_keeps_the_expected_share_and_scale():
    from llm_jax.models.layers import dropout

    x = jnp.ones((200, 200))
    y = dropout(x, 0.25, jax.random.key(0))
    assert abs(float((y > 0).mean()) - 0.75) < 0.01
    np.testing.assert_allclose(y[y > 0], 1 / 0.75, rtol=1e-6)


def test_bfloat16_compute_stays_close():
    config, params = build()
    want = forward(params, config, TOKENS)
    got = forward(params, dataclasses.replace(config, compute_dtype="bfloat16"), TOKENS)
    assert got.dtype == jnp.float32
    assert float(jnp.abs(got - want).mean() / jnp.abs(want).mean()) < 0.05
    assert float(jnp.abs(got - want).max()) > 0
