"""Every form of attention as it runs on a CPU: the kernels interpreted, with tiles smaller than the sequences."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels import choice, pallas_gpu, pallas_tpu
from llm_jax.kernels.attention import IMPLEMENTATIONS, attention, plain
from llm_jax.kernels.choice import Implementation
from llm_jax.kernels.chunked import Tile, chunked_attention
from llm_jax.kernels.reference import HIDDEN
from llm_jax.kernels.sharded import on_shards

QUANTITIES = ("out", "dq", "dk", "dv")
KERNELS = ("pallas_gpu", "pallas_tpu")
FORMS = ("reference", "chunked", *KERNELS)
SAVED = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")


def inputs(B, T, S, N, K, H, dtype=jnp.float32, seed=0):
    """Queries, keys, values and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def small_tiles(queries=16, keys=16):
    """Patches the table of implementations; the GPU's tiles are powers of two from 16 on."""
    gpu_blocks = pallas_gpu.Blocks(*[pallas_gpu.Pass(queries, keys, 4, 1)] * 3)
    tpu_blocks = pallas_tpu.Blocks(*[Tile(queries, keys)] * 3)
    gpu = functools.partial(pallas_gpu.gpu_attention, blocks=gpu_blocks, interpret=True)
    tpu = functools.partial(pallas_tpu.tpu_attention, blocks=tpu_blocks, interpret=True)
    chunked = plain(functools.partial(chunked_attention, query_block=queries, key_block=keys))
    table = {
        "chunked": Implementation(chunked, choice.never),
        "pallas_gpu": on_shards(Implementation(gpu, choice.never)),
        "pallas_tpu": on_shards(Implementation(tpu, choice.never)),
    }
    return mock.patch.dict(IMPLEMENTATIONS, table)


@functools.partial(jax.jit, static_argnames=("form", "tile"))
def output_and_gradients(q, k, v, mask, dout, form, tile=(16, 16)):
    """One program per form, shape and set of rules: what the arrays hold does not compile anew."""
    with small_tiles(*tile):
        out, pullback = jax.vjp(lambda *x: attention(*x, mask, implementation=form), q, k, v)
        return out, *pullback(dout)


@jax.jit
def dense(q, k, v, mask, dout):
    """Output and gradients as one writes them down, the whole matrix in float32, differentiated by JAX."""

    def run(q, k, v):
        (_, T, N, H), (_, S, K, _) = q.shape, k.shape
        scale = 1.0 if mask.query_scale is None else mask.query_scale[:, :, None, None]
        k, v = jnp.repeat(k, N // K, axis=2), jnp.repeat(v, N // K, axis=2)
        scores = jnp.einsum("btnh,bsnh->bnts", q * scale, k) / jnp.sqrt(jnp.float32(H))
        bias, visible = mask.bias(T, S), mask.visible(T, S)
        scores = scores if bias is None else scores + bias
        if visible is None:
            return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
        weights = jax.nn.softmax(jnp.where(visible, scores, HIDDEN)) * visible
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    out, pullback = jax.vjp(run, *(x.astype(jnp.float32) for x in (q, k, v)))
    return out, *pullback(dout.astype(jnp.float32))


def relative_error(actual, expected, least=0.0):
    """Relative L2 error; of an expected norm below `least` the error is relative to that."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), least, 1e-30)
