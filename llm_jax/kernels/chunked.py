"""Attention by tiles with an online softmax, in plain JAX: memory linear in the length on any platform.

The forward pass keeps the running maximum, sum and output of each query block while it walks over the key blocks that
the block may see; the backward pass recomputes the probabilities of a tile from the saved log-sum-exp. (Dao,
"FlashAttention-2", algorithms 1 and 2.)

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim, X query blocks, Y key
blocks. Inside a tile T and S are the tile's sizes and R is the rows of queries that share a key/value head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import LOWEST, masked_scores, matmul

QUERY_BLOCK = 128
KEY_BLOCK = 128


class Tile(NamedTuple):
    """Sizes of a tile of the score matrix."""

    queries: int
    keys: int


def chunked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    query_block: int = QUERY_BLOCK,
    key_block: int = KEY_BLOCK,
) -> jax.Array:
    """The same function as `reference_attention`, without a [T,S] array; lengths need not divide by the blocks."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    tile = Tile(min(query_block, T), min(key_block, S))
    extra_T, extra_S = -T % tile.queries, -S % tile.keys
    mask = mask.padded(T, T + extra_T, S, S + extra_S)
    q_BTNH, k_BSKH, v_BSKH = _pad(q_BTNH, extra_T), _pad(k_BSKH, extra_S), _pad(v_BSKH, extra_S)
    return _attention(tile, q_BTNH, k_BSKH, v_BSKH, mask)[:, :T]


def _pad(x_BTNH: jax.Array, extra: int) -> jax.Array:
    return jnp.pad(x_BTNH, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x_BTNH


class _Residuals(NamedTuple):
    """What the backward pass needs: all of it linear in the lengths."""

    q_XBKRH: jax.Array
    k_YBKSH: jax.Array
    v_YBKSH: jax.Array
    mask: AttentionMask
    out_BTNH: jax.Array
    lse_XBKR1: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(tile: Tile, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask) -> jax.Array:
    return _forward(tile, q_BTNH, k_BSKH, v_BSKH, mask)[0]


def _forward(
    tile: Tile, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, _Residuals]:
    K = k_BSKH.shape[2]
    q_XBKRH = _split(q_BTNH, tile.queries, K)
    k_YBKSH, v_YBKSH = _split(k_BSKH, tile.keys, K), _split(v_BSKH, tile.keys, K)

    def one(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _forward_query_block(tile, *block, k_YBKSH, v_YBKSH, mask)

    out_XBKRH, lse_XBKR1 = jax.lax.map(one, (jnp.arange(q_XBKRH.shape[0]), q_XBKRH))
    out_BTNH = checkpoint_name(_join(out_XBKRH, tile.queries), "attention_out")
    lse_XBKR1 = checkpoint_name(lse_XBKR1, "attention_lse")
    return out_BTNH, _Residuals(q_XBKRH, k_YBKSH, v_YBKSH, mask, out_BTNH, lse_XBKR1)


def _forward_query_block(
    tile: Tile, x: jax.Array, q_BKRH: jax.Array, k_YBKSH: jax.Array, v_YBKSH: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, jax.Array]:
    """Output [B,K,R,H] in q's dtype and float32 log-sum-exp [B,K,R,1] of query block `x`."""

    def one(y: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest, sums, out = carry
        scores = _tile_scores(tile, x, y, q_BKRH, k_YBKSH[y], mask)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_highest)
        shrink = jnp.exp(highest - new_highest)
        sums = sums * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        products = matmul("bkrs,bksh->bkrh", weights.astype(q_BKRH.dtype), v_YBKSH[y])
        return new_highest, sums, out * shrink + products

    row = (*q_BKRH.shape[:-1], 1)
    start = (jnp.full(row, LOWEST), jnp.zeros(row), jnp.zeros(q_BKRH.shape, jnp.float32))
    first, last = _key_blocks(tile, x, k_YBKSH.shape[0], mask)
    highest, sums, out = jax.lax.fori_loop(first, last, one, start)
    sums = jnp.where(sums > 0, sums, 1.0)
    return (out / sums).astype(q_BKRH.dtype), highest + jnp.log(sums)


def _backward(tile: Tile, residuals: _Residuals, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, mask, out_BTNH, lse = residuals
    K = k.shape[2]
    dout = _split(dout_BTNH, tile.queries, K)
    delta_BTN1 = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1, keepdims=True)
    delta = _split(delta_BTN1, tile.queries, K)
    rows = (q, dout, lse, delta)

    def one(
        carry: tuple[jax.Array, jax.Array], block: tuple[jax.Array, tuple[jax.Array, ...]]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        return _backward_query_block(tile, *block, k, v, mask, carry)

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(one, start, (jnp.arange(q.shape[0]), rows))
    dk_BSKH, dv_BSKH = _join(dk, tile.keys), _join(dv, tile.keys)
    return _join(dq, tile.queries), dk_BSKH.astype(k.dtype), dv_BSKH.astype(v.dtype), None


def _backward_query_block(
    tile: Tile,
    x: jax.Array,
    rows: tuple[jax.Array, ...],
    k_YBKSH: jax.Array,
    v_YBKSH: jax.Array,
    mask: AttentionMask,
    dkv: tuple[jax.Array, jax.Array],
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Add query block `x`'s part to the float32 key and value gradients; return them and its own gradient."""
    q, dout, lse, delta = rows
    scale = q.shape[-1] ** -0.5

    def one(y: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        dq, dk, dv = carry
        # The barriers keep XLA from computing a tile again for each of its uses.
        weights = jax.lax.optimization_barrier(jnp.exp(_tile_scores(tile, x, y, q, k_YBKSH[y], mask) - lse))
        dweights = matmul("bkrh,bksh->bkrs", dout, v_YBKSH[y])
        dscores = jax.lax.optimization_barrier((weights * (dweights - delta) * scale).astype(q.dtype))
        dq += matmul("bkrs,bksh->bkrh", dscores, k_YBKSH[y])
        dk = dk.at[y].add(matmul("bkrs,bkrh->bksh", dscores, q))
        dv = dv.at[y].add(matmul("bkrs,bkrh->bksh", weights.astype(q.dtype), dout))
        return dq, dk, dv

    first, last = _key_blocks(tile, x, k_YBKSH.shape[0], mask)
    dq, dk, dv = jax.lax.fori_loop(first, last, one, (jnp.zeros(q.shape, jnp.float32), *dkv))
    return (dk, dv), dq.astype(q.dtype)


_attention.defvjp(_forward, _backward)


def _tile_scores(
    tile: Tile, x: jax.Array, y: jax.Array, q_BKRH: jax.Array, k_BKSH: jax.Array, mask: AttentionMask
) -> jax.Array:
    where = (x * tile.queries, tile.queries, y * tile.keys, tile.keys)
    return masked_scores(q_BKRH, k_BKSH, mask.visible_block(*where), mask.bias_block(*where))


def _key_blocks(
    tile: Tile, x: jax.Array, num_blocks: int, mask: AttentionMask
) -> tuple[jax.Array | int, jax.Array | int]:
    """The range of key blocks that query block `x` may see: above the diagonal and before the window is skipped."""
    first, last = mask.key_range(x * tile.queries, tile.queries, num_blocks * tile.keys)
    return first // tile.keys, (last + tile.keys - 1) // tile.keys


def _split(x_BTNH: jax.Array, size: int, num_kv_heads: int) -> jax.Array:
    """[B,T,N,H] to [X,B,K,R,H]."""
    B, T, N, H = x_BTNH.shape
    x = x_BTNH.reshape(B, T // size, size, num_kv_heads, N // num_kv_heads, H)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(T // size, B, num_kv_heads, -1, H)


def _join(x_XBKRH: jax.Array, size: int) -> jax.Array:
    """The inverse of `_split`."""
    X, B, K, R, H = x_XBKRH.shape
    x = x_XBKRH.reshape(X, B, K, R // size, size, H)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, X * size, -1, H)
