"""The written-out gradients against JAX's derived ones, for every arrangement of features in use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models.linear import linear, lookup, swiglu


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    "equation, inputs, outputs, axes",
    [
        ("bti,io->bto", (5,), (7,), ("embed", "ffn")),
        ("bti,inh->btnh", (5,), (2, 3), ("embed", "heads", "head_dim")),
        ("btnh,nhd->btd", (2, 3), (4,), ("heads", "head_dim", "embed")),
    ],
)
def test_linear_and_its_gradients(equation, inputs, outputs, axes):
    x, kernel = random(0, 2, 6, *inputs), random(1, *inputs, *outputs)
    cotangent = random(2, 2, 6, *outputs)
    want, pull = jax.vjp(lambda x, k: jnp.einsum(equation, x, k), x, kernel)
    got, pull_ours = jax.vjp(lambda x, k: linear(x, k, axes), x, kernel)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for ours, theirs in zip(pull_ours(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_weight_gradients_of_bfloat16_compute_add_up_in_float32():
    """4096 equal terms of 1 + 2^-7: a bfloat16 result would lose the last 32."""
    x = jnp.full((1, 4096, 1), 1 + 2**-7, jnp.bfloat16)
    kernel = jnp.ones((1, 1))
    gradient = jax.grad(lambda k: linear(x, k, ("embed", "ffn")).astype(jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.float32
    assert float(gradient[0, 0]) == 4096 + 32


def test_lookup_and_its_gradient():
    table, tokens = random(0, 6, 4), jnp.array([[0, 3, 3], [5, 0, 3]])
    cotangent = random(1, 2, 3, 4)
    axes = ("vocab", "embed")
    want, pull = jax.vjp(lambda t: t[tokens], table)
    got, pull_ours = jax.vjp(lambda t: lookup(t, tokens, axes, jnp.dtype("float32")), table)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(pull_ours(cotangent)[0], pull(cotangent)[0], atol=1e-6)


def test_a_token_seen_often_gets_its_whole_gradient_in_bfloat16():
    tokens = jnp.zeros((1, 5000), jnp.int32)
    axes, dtype = ("vocab", "embed"), jnp.dtype("bfloat16")
    gradient = jax.grad(lambda t: lookup(t, tokens, axes, dtype).astype(jnp.float32).sum())(jnp.ones((3, 2)))
    np.testing.assert_array_equal(gradient, [[5000, 5000], [0, 0], [0, 0]])


def test_swiglu_and_its_gradients():
    gate, up, cotangent = (3 * random(seed, 2, 3, 4) for seed in range(3))
    want, pull = jax.vjp(lambda g, u: g / (1 + jnp.exp(-g)) * u, gate, up)
    got, pull_ours = jax.vjp(swiglu, gate, up)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for ours, theirs in zip(pull_ours(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
