"""What the tests of decoding share: the forms under test, problems, and the oracle's answer.

Legend: B batch, S key length, N query heads, K key/value heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels import pallas_gpu_decode, pallas_tpu_decode
from llm_jax.kernels.flash_decoding import Slots
from llm_jax.kernels.mask import AttentionMask
from llm_jax.models.cache import LayerCache
from tests.kernels import oracle

BLOCK = 16  # keys: small enough for several blocks in a short cache
SHAPE = (3, 70, 6, 2, 24)  # B, S, N, K, H: no size divides by the kernels' tiles


def interpreted(form, splits=3, heads=2):
    """A kernel as it runs on no device; on a TPU a step takes so many key/value heads, which must divide all."""
    gpu, tpu = pallas_gpu_decode.Blocks(BLOCK, splits), pallas_tpu_decode.Blocks(BLOCK, heads, splits)
    module, blocks = {"gpu": (pallas_gpu_decode, gpu), "tpu": (pallas_tpu_decode, tpu)}[form]
    return functools.partial(module.decode, blocks=blocks, interpret=True)


@functools.cache
def compiled(form, splits=3):
    return jax.jit(interpreted(form, splits))


def inputs(B, S, N, K, H, dtype=jnp.float32, seed=0):
    """Queries and a cache with random keys and values."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((B, 1, N, H), (B, K, S, H), (B, K, S, H))
    q, k, v = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))
    return q, Slots(k, v)


def in_int8(slots):
    """The same cache in codes and scales, as the model writes it."""
    empty = jnp.zeros(slots.key.shape, jnp.int8)
    scales = jnp.zeros((*slots.key.shape[:3], 1), jnp.float32)
    cache = LayerCache(empty, empty, scales, scales)
    return Slots(*cache.write(slots.key.transpose(0, 2, 1, 3), slots.value.transpose(0, 2, 1, 3), jnp.int32(0)))


def everything(random, B, S, N):
    """A mask as of a batch of prompts: every field in use, left padding, holes, a window or none, rows of nothing."""
    query = random.integers(0, S, B)
    segments = np.zeros((B, S), np.int32)
    for b in range(B):
        start = random.integers(0, S // 3)
        segments[b, start : query[b] + 1] = 1
        if random.random() < 0.5:
            segments[b, random.integers(0, S, 9)] = random.integers(0, 3)
    return AttentionMask(
        window=jnp.int32(random.choice([0, 1, 20, 33, 100])),
        query_segment_ids=jnp.asarray(random.choice([0, 1, 1, 1], (B, 1)), jnp.int32),
        key_segment_ids=jnp.asarray(segments),
        query_offset=jnp.asarray(query, jnp.int32),
        key_lengths=jnp.asarray(random.choice([0, S - 9, S, S], B), jnp.int32),
        slopes=jnp.asarray(random.uniform(0.02, 0.5, N), jnp.float32),
        query_scale=jnp.asarray(random.uniform(0.5, 2, (B, 1)), jnp.float32),
    )


def expected(q, slots, mask):
    """The oracle's output, float64, with an int8 cache dequantised exactly."""
    keys, values = (
        np.asarray(array, np.float64) * (1.0 if scale is None else np.asarray(scale, np.float64))
        for array, scale in ((slots.key, slots.key_scale), (slots.value, slots.value_scale))
    )
    mask = jax.tree.map(np.asarray, mask)
    return oracle.attention(q, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3), mask, np.zeros(q.shape))[0]


def visible(mask, B, S):
    """Bool [B, S], by the definition."""
    mask = jax.tree.map(np.asarray, mask)
    return np.array([[oracle.sees(mask, b, 0, s) for s in range(S)] for b in range(B)])


def poisoned(slots, mask):
    """The cache with NaN (in int8: the largest code, and NaN for its scale) wherever the query does not look."""
    B, _, S, _ = slots.key.shape
    hidden_B1S1 = ~visible(mask, B, S)[:, None, :, None]

    def one(array):
        return jnp.where(hidden_B1S1, jnp.asarray(127 if array.dtype == jnp.int8 else jnp.nan, array.dtype), array)

    return jax.tree.map(one, slots)


def relative_error(actual, wanted):
    return np.linalg.norm(np.asarray(actual, np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-30)
