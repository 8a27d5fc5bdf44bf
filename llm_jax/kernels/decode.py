"""The one entry to decoding: attention of one new token per row over a key-value cache that lies head by head.

Legend: B batch, S key length, N query heads, K key/value heads, R query heads per key/value head, H head dim.
"""

import jax
import jax.numpy as jnp

from llm_jax.errors import require
from llm_jax.kernels import attention, choice
from llm_jax.kernels.choice import Implementation
from llm_jax.kernels.flash_decoding import Slots, folded_queries
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import LOWEST, masked_scores, matmul, unfold_queries
from llm_jax.kernels.sharded import QUERY_AXES, on_shards
from llm_jax.parallel.rules import LogicalAxes

SLOT_AXES: LogicalAxes = ("batch", "kv_heads")  # of all arrays in `Slots`


def _reference(q_B1NH: jax.Array, slots: Slots, mask: AttentionMask) -> jax.Array:
    """Plain JAX. Hidden slots must be finite, as those of an empty cache are: to clean them would be to copy all."""
    k_BKSH, v_BKSH = slots.read(q_B1NH.dtype)
    (_, K, S, _), dtype = k_BKSH.shape, q_B1NH.dtype
    q_BKRH = folded_queries(q_B1NH, mask, K)
    scores_BKRS = masked_scores(q_BKRH, k_BKSH, mask.visible(1, S), mask.bias(1, S))
    highest_BKR1 = jnp.maximum(jnp.max(scores_BKRS, axis=-1, keepdims=True), LOWEST)
    weights_BKRS = jnp.exp(scores_BKRS - highest_BKR1)
    sums_BKR1 = jnp.sum(weights_BKRS, axis=-1, keepdims=True)
    out_BKRH = matmul("bkrs,bksh->bkrh", weights_BKRS.astype(dtype), v_BKSH)
    out_BKRH = out_BKRH / jnp.where(sums_BKR1 > 0, sums_BKR1, 1.0)
    return unfold_queries(out_BKRH.astype(dtype), 1)


def _kernel(platform: str) -> Implementation:
    module = f"llm_jax.kernels.pallas_{platform}_decode"
    return on_shards(choice.on_platform(platform, module, "decode"), (QUERY_AXES, SLOT_AXES))


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(_reference, choice.never),
    "pallas_gpu": _kernel("gpu"),
    "pallas_tpu": _kernel("tpu"),
}
PREFERRED: dict[str, tuple[str, ...]] = {"gpu": ("pallas_gpu",), "tpu": ("pallas_tpu",)}
# Implementations of attention that have no form for decoding, and the form that goes with them.
AKIN = {"chunked": "reference", "splash": "pallas_tpu", "mosaic_gpu": "pallas_gpu"}


def decode_attention(
    q_B1NH: jax.Array, slots: Slots, mask: AttentionMask, *, implementation: str = "auto"
) -> jax.Array:
    """What `attention` gives for one query per row, [B,1,N,H] in q's dtype; no key or value is moved or repeated.

    Keys and values may have another dtype than the queries, int8 with scales among them; the Pallas kernels widen them
    as they read them. Under the kernels, what lies in slots that the query does not see never matters, be it NaN; the
    plain form, of a CPU, wants it finite, as in an empty cache. A row that sees nothing gives 0. Not differentiated.

    Args:
      q_B1NH: floating point.
      slots: the cache.
      mask: as for `attention` with one query: its index among the slots is `query_offset`.
      implementation: "auto", "reference", "pallas_gpu" or "pallas_tpu", or another name that `attention` knows, for the
        form that goes with it.

    Raises:
      UserError: shapes do not fit, or the named implementation does not exist or cannot serve.
    """
    _check_shapes(q_B1NH, slots)
    _, K, S, _ = slots.key.shape
    attention.check_mask(q_B1NH, S, mask)
    problem = attention.describe(q_B1NH, S, K, mask)._replace(cache_dtype=str(slots.key.dtype))
    asked = AKIN.get(implementation, implementation)
    otherwise = ("reference", f"{S} slots on {problem.platform}")
    preferred = PREFERRED.get(problem.platform, ())
    name, _ = choice.choose("decoding", IMPLEMENTATIONS, problem, asked, preferred, otherwise)
    with jax.named_scope("attention_decode"):
        return IMPLEMENTATIONS[name].run(q_B1NH, slots, mask)


def _check_shapes(q_B1NH: jax.Array, slots: Slots) -> None:
    q, k, v = q_B1NH.shape, slots.key.shape, slots.value.shape
    require(len(q) == 4 and q[1] == 1, f"decoding: queries {q} must be [batch, 1, heads, head dim]")
    require(len(k) == 4, f"decoding: keys {k} must be [batch, key/value heads, length, head dim]")
    require(k == v, f"decoding: keys {k} and values {v} differ in shape")
    require(q[0] == k[0] and q[3] == k[3], f"decoding: queries {q} and keys {k} differ in batch or head dim")
    require(0 not in q + k, f"decoding: queries {q} and keys {k} must be at least 1 in every dimension")
    require(q[2] % k[1] == 0, f"decoding: {q[2]} query heads are not a multiple of {k[1]} key/value heads")
    floating = jnp.issubdtype(q_B1NH.dtype, jnp.floating)
    require(floating, f"decoding: queries must be floating point, got {q_B1NH.dtype}")
    for name, array, scale in (("key", slots.key, slots.key_scale), ("value", slots.value, slots.value_scale)):
        coded = array.dtype == jnp.int8
        known = coded or jnp.issubdtype(array.dtype, jnp.floating)
        require(known, f"decoding: {name}s must be int8 or floating point, got {array.dtype}")
        wanted = (*k[:3], 1) if coded else None
        given = None if scale is None else scale.shape
        require(given == wanted, f"decoding: {name}_scale of {array.dtype} slots has shape {given}, expected {wanted}")
        if scale is not None:
            single = scale.dtype == jnp.float32
            require(single, f"decoding: {name}_scale must be float32, got {scale.dtype}")
    one = slots.key.dtype == slots.value.dtype
    require(one, f"decoding: keys are {slots.key.dtype} and values {slots.value.dtype}, but a cache has one dtype")
