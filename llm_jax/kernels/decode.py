"""Attention of one new token per row over a key-value cache that lies head by head.

Legend: B batch, S key length, N query heads, K key/value heads, R query heads per key/value head, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import LOWEST, fold_queries, masked_scores, matmul, unfold_queries


def decode_attention(q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: AttentionMask) -> jax.Array:
    """What `attention` gives for one query per row, [B,1,N,H] in q's dtype; no key or value is moved or repeated.

    Slots that nothing is visible in must hold finite numbers, as those of an empty cache do. Not differentiated.
    """
    if mask.query_scale is not None:
        q_B1NH = (q_B1NH.astype(jnp.float32) * mask.query_scale[:, :, None, None]).astype(q_B1NH.dtype)
        mask = dataclasses.replace(mask, query_scale=None)
    S = k_BKSH.shape[2]
    with jax.named_scope("attention_decode"):
        q_BKRH = fold_queries(q_B1NH, k_BKSH.shape[1])
        scores_BKRS = masked_scores(q_BKRH, k_BKSH, mask.visible(1, S), mask.bias(1, S))
        highest_BKR1 = jnp.maximum(jnp.max(scores_BKRS, axis=-1, keepdims=True), LOWEST)
        weights_BKRS = jnp.exp(scores_BKRS - highest_BKR1)
        sums_BKR1 = jnp.sum(weights_BKRS, axis=-1, keepdims=True)
        out_BKRH = matmul("bkrs,bksh->bkrh", weights_BKRS.astype(q_B1NH.dtype), v_BKSH)
        out_BKRH = out_BKRH / jnp.where(sums_BKR1 > 0, sums_BKR1, 1.0)
        return unfold_queries(out_BKRH.astype(q_B1NH.dtype), 1)
