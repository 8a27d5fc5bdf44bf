"""The written-out gradients against JAX's derived ones, for every arrangement of features in use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models.linear import linear, swiglu


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    "equation, inputs, outputs",
    [("bti,io->bto", (5,), (7,)), ("bti,inh->btnh", (5,), (2, 3)), ("btnh,nhd->btd", (2, 3), (4,))],
)
def test_linear_and_its_gradients(equation, inputs, outputs):
    x, kernel = random(0, 2, 6, *inputs), random(1, *inputs, *outputs)
    cotangent = random(2, 2, 6, *outputs)
    want, pull = jax.vjp(lambda x, k: jnp.einsum(equation, x, k), x, kernel)
    got, pull_ours = jax.vjp(linear, x, kernel)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for ours, theirs in zip(pull_ours(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_swiglu_and_its_gradients():
    gate, up, cotangent = (3 * random(seed, 2, 3, 4) for seed in range(3))
    want, pull = jax.vjp(lambda g, u: g / (1 + jnp.exp(-g)) * u, gate, up)
    got, pull_ours = jax.vjp(swiglu, gate, up)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for ours, theirs in zip(pull_ours(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
