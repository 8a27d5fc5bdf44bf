"""Attention with the whole score matrix in memory: the meaning of the other kernels, and the fast path when short.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, G query heads per key/value head,
H head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.mask import AttentionMask

# Far below any score, yet finite, so that a row without a visible key gives zeros instead of inf - inf.
HIDDEN = -1e30
# The lowest maximum that a row may have: exp(HIDDEN - LOWEST) is exactly 0.
LOWEST = -1e20


def reference_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask) -> jax.Array:
    """softmax(q k^T / sqrt(H) + bias) v over the visible keys, [B,T,N,H] in q's dtype.

    Scores, softmax and its sums are float32. `mask.query_scale` is the caller's to apply. A query that sees no key
    gives zeros and passes no gradient.
    """
    q_BKGTH, k_BKSH, v_BKSH = split_heads(q_BTNH, k_BSKH, v_BSKH)
    return merge_heads(_attention(q_BKGTH, k_BKSH, v_BKSH, mask))


def split_heads(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Heads before lengths ([B,K,G,T,H], [B,K,S,H] twice): each head's matrices are contiguous for the matmuls."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    return q_BKGTH, k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)


def merge_heads(out_BKGTH: jax.Array) -> jax.Array:
    """[B,K,G,T,H] to [B,T,N,H]."""
    B, K, G, T, H = out_BKGTH.shape
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def masked_scores(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    visible_B1TS: jax.Array | None,
    bias_BNTS: jax.Array | None,
) -> jax.Array:
    """Float32 [B,K,G,T,S]: scaled products plus the bias where visible, HIDDEN elsewhere."""
    _, K, G, T, H = q_BKGTH.shape
    scores = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    if bias_BNTS is not None:
        scores += bias_BNTS.reshape(bias_BNTS.shape[0], K, G, T, -1)
    return scores if visible_B1TS is None else jnp.where(visible_B1TS[:, :, None], scores, HIDDEN)


# The gradient is written by hand because it then reads the [T,S] matrix once: the division by the row sums is moved
# to the [T,H] side, so neither the normalised probabilities nor their product with the gradient is ever stored.
@jax.custom_vjp
def _attention(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: AttentionMask) -> jax.Array:
    return _forward(q_BKGTH, k_BKSH, v_BKSH, mask)[0]


def _forward(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    T, S = q_BKGTH.shape[3], k_BKSH.shape[2]
    scores = masked_scores(q_BKGTH, k_BKSH, mask.visible(T, S), mask.bias(T, S))
    highest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), LOWEST)
    weights_f32 = jnp.exp(scores - highest)
    sums = jnp.sum(weights_f32, axis=-1, keepdims=True)
    inverse = 1.0 / jnp.where(sums > 0, sums, 1.0)
    weights = weights_f32.astype(q_BKGTH.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v_BKSH, preferred_element_type=jnp.float32) * inverse
    out = checkpoint_name(out.astype(q_BKGTH.dtype), "attention_out")
    return out, (q_BKGTH, k_BKSH, v_BKSH, weights, inverse, out)


def _backward(residuals: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, inverse, out = residuals
    scale = q.shape[-1] ** -0.5
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dout_f32 = dout.astype(jnp.float32) * inverse
    delta = jnp.sum(dout_f32 * out.astype(jnp.float32), axis=-1, keepdims=True)
    dout = dout_f32.astype(q.dtype)
    dv = einsum("bkgts,bkgth->bksh", weights, dout)
    dweights = einsum("bkgth,bksh->bkgts", dout, v)
    dscores = (weights * (dweights - delta)).astype(q.dtype)
    dq = einsum("bkgts,bksh->bkgth", dscores, k) * scale
    dk = einsum("bkgts,bkgth->bksh", dscores, q) * scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_forward, _backward)
