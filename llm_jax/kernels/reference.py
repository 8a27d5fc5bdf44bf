"""Attention with the whole score matrix in memory: the meaning of the other kernels, and the fast path when short.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, G query heads per key/value head,
R = G * T rows of queries that share a key/value head, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.mask import AttentionMask

# Far below any score, yet finite, so that a row without a visible key gives zeros instead of inf - inf.
HIDDEN = -1e30
# The lowest maximum that a row may have: exp(HIDDEN - LOWEST) is exactly 0.
LOWEST = -1e20


# The gradient is written by hand because it then reads the [T,S] matrix once: the division by the row sums is moved
# to the [T,H] side, so neither the normalised probabilities nor their product with the gradient is ever stored.
@jax.custom_vjp
def reference_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask) -> jax.Array:
    """softmax(q k^T / sqrt(H) + bias) v over the visible keys, [B,T,N,H] in q's dtype.

    Scores, softmax and its sums are float32. `mask.query_scale` is the caller's to apply. A query that sees no key
    gives zeros and passes no gradient.
    """
    return _forward(q_BTNH, k_BSKH, v_BSKH, mask)[0]


class _Residuals(NamedTuple):
    q_BKRH: jax.Array
    k_BKSH: jax.Array
    v_BKSH: jax.Array
    weights_BKRS: jax.Array  # not yet divided by their sums
    inverse_BKR1: jax.Array  # one over the sums
    out_BTNH: jax.Array


def _forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, _Residuals]:
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    q, k, v = fold_queries(q_BTNH, k_BSKH.shape[2]), k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    scores = masked_scores(q, k, mask.visible(T, S), mask.bias(T, S))
    highest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), LOWEST)
    weights = jnp.exp(scores - highest)
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    inverse = 1.0 / jnp.where(sums > 0, sums, 1.0)
    weights = weights.astype(q.dtype)
    out = (matmul("bkrs,bksh->bkrh", weights, v) * inverse).astype(q.dtype)
    out_BTNH = checkpoint_name(unfold_queries(out, T), "attention_out")
    return out_BTNH, _Residuals(q, k, v, weights, inverse, out_BTNH)


def _backward(residuals: _Residuals, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, inverse, out_BTNH = residuals
    T, scale = dout_BTNH.shape[1], q.shape[-1] ** -0.5
    delta_BTN1 = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1, keepdims=True)
    delta = fold_queries(delta_BTN1, k.shape[1]) * inverse
    dout = (fold_queries(dout_BTNH, k.shape[1]) * inverse).astype(q.dtype)
    dv = matmul("bkrs,bkrh->bksh", weights, dout)
    dweights = matmul("bkrh,bksh->bkrs", dout, v)
    dscores = (weights * (dweights - delta)).astype(q.dtype)
    dq = matmul("bkrs,bksh->bkrh", dscores, k) * scale
    dk = matmul("bkrs,bkrh->bksh", dscores, q) * scale
    dk_BSKH, dv_BSKH = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
    return unfold_queries(dq, T).astype(q.dtype), dk_BSKH.astype(k.dtype), dv_BSKH.astype(v.dtype), None


reference_attention.defvjp(_forward, _backward)


def fold_queries(q_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B,T,N,H] to [B,K,R,H]: contiguous matrices, one per key/value head, so that no key or value is repeated."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
    return q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, num_kv_heads, -1, H)


def unfold_queries(x_BKRH: jax.Array, num_queries: int) -> jax.Array:
    """The inverse of `fold_queries`."""
    B, K, R, H = x_BKRH.shape
    x_BKGTH = x_BKRH.reshape(B, K, R // num_queries, num_queries, H)
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, num_queries, -1, H)


def masked_scores(
    q_BKRH: jax.Array,
    k_BKSH: jax.Array,
    visible_B1TS: jax.Array | None,
    bias_BNTS: jax.Array | None,
) -> jax.Array:
    """Float32 [B,K,R,S]: scaled products plus the bias where visible, HIDDEN elsewhere."""
    (B, K, R, H), S = q_BKRH.shape, k_BKSH.shape[2]
    scores_BKRS = matmul("bkrh,bksh->bkrs", q_BKRH, k_BKSH) * H**-0.5
    if bias_BNTS is not None:
        scores_BKRS += bias_BNTS.reshape(-1, K, R, S)
    if visible_B1TS is None:
        return scores_BKRS
    scores_BNTS = scores_BKRS.reshape(B, -1, visible_B1TS.shape[2], S)
    return jnp.where(visible_B1TS, scores_BNTS, HIDDEN).reshape(B, K, R, S)


def matmul(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """`jnp.einsum` with a float32 result."""
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
