"""Attention by tiles with an online softmax, in plain JAX: memory linear in the length on any platform.

The forward pass keeps the running maximum, sum and output of each query block while it walks over the key blocks that
the block may see; the backward pass recomputes the probabilities of a tile from the saved log-sum-exp. (Dao et al.,
"FlashAttention-2", algorithms 1 and 2.)

Legend: B batch, T query length, S key length, K key/value heads, G query heads per key/value head, H head dim,
X query blocks, Y key blocks; inside a block T and S are the block's sizes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels import reference
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import LOWEST, masked_scores

QUERY_BLOCK = 256
KEY_BLOCK = 256


class Blocks(NamedTuple):
    """Tile sizes."""

    query: int
    key: int


class Residuals(NamedTuple):
    """What the backward pass needs: all of it linear in the lengths."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: AttentionMask
    out: jax.Array
    lse: jax.Array


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
    blocks = Blocks(min(query_block, T), min(key_block, S))
    extra_T, extra_S = -T % blocks.query, -S % blocks.key
    mask = mask.padded(T, T + extra_T, S, S + extra_S)
    q_BKGTH, k_BKSH, v_BKSH = reference.split_heads(
        _pad_length(q_BTNH, extra_T), _pad_length(k_BSKH, extra_S), _pad_length(v_BSKH, extra_S)
    )
    return reference.merge_heads(_attention(blocks, q_BKGTH, k_BKSH, v_BKSH, mask))[:, :T]


def _pad_length(x: jax.Array, extra: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(blocks: Blocks, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
    return _forward(blocks, q, k, v, mask)[0]


def _forward(
    blocks: Blocks, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, Residuals]:
    q_blocks, k_blocks, v_blocks = _split(q, blocks.query), _split(k, blocks.key), _split(v, blocks.key)

    def one(step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _forward_query_block(blocks, *step, k_blocks, v_blocks, mask)

    out_blocks, lse_blocks = jax.lax.map(one, (jnp.arange(q_blocks.shape[0]), q_blocks))
    out = checkpoint_name(_join(out_blocks), "attention_out")
    lse = checkpoint_name(_join(lse_blocks), "attention_lse")
    return out, Residuals(q, k, v, mask, out, lse)


def _forward_query_block(
    blocks: Blocks, x: jax.Array, q_BKGTH: jax.Array, k_blocks: jax.Array, v_blocks: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, jax.Array]:
    """Output [B,K,G,T,H] in q's dtype and float32 log-sum-exp [B,K,G,T,1] of query block `x`."""

    def one(y: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest, sums, out = carry
        scores = _tile_scores(blocks, x, y, q_BKGTH, k_blocks[y], mask)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_highest)
        shrink = jnp.exp(highest - new_highest)
        sums = sums * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return (
            new_highest,
            sums,
            out * shrink + _einsum("bkgts,bksh->bkgth", weights.astype(v_blocks.dtype), v_blocks[y]),
        )

    row = (*q_BKGTH.shape[:-1], 1)
    start = (jnp.full(row, LOWEST), jnp.zeros(row), jnp.zeros(q_BKGTH.shape, jnp.float32))
    first, last = _key_blocks(blocks, x, k_blocks.shape[0], mask)
    highest, sums, out = jax.lax.fori_loop(first, last, one, start)
    sums = jnp.where(sums > 0, sums, 1.0)
    return (out / sums).astype(q_BKGTH.dtype), highest + jnp.log(sums)


def _backward(blocks: Blocks, residuals: Residuals, dout: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, mask, out, lse = residuals
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    k_blocks, v_blocks = _split(k, blocks.key), _split(v, blocks.key)
    rows = tuple(_split(x, blocks.query) for x in (q, dout, lse, delta))

    def one(
        carry: tuple[jax.Array, jax.Array], step: tuple[jax.Array, tuple[jax.Array, ...]]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        return _backward_query_block(blocks, *step, k_blocks, v_blocks, mask, carry)

    start = (jnp.zeros(k_blocks.shape, jnp.float32), jnp.zeros(v_blocks.shape, jnp.float32))
    (dk_blocks, dv_blocks), dq_blocks = jax.lax.scan(one, start, (jnp.arange(rows[0].shape[0]), rows))
    return _join(dq_blocks), _join(dk_blocks).astype(k.dtype), _join(dv_blocks).astype(v.dtype), None


def _backward_query_block(
    blocks: Blocks,
    x: jax.Array,
    rows: tuple[jax.Array, ...],
    k_blocks: jax.Array,
    v_blocks: jax.Array,
    mask: AttentionMask,
    dkv_blocks: tuple[jax.Array, jax.Array],
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Add query block `x`'s part to the float32 key and value gradients; return them and its own gradient."""
    q, dout, lse, delta = rows
    scale = q.shape[-1] ** -0.5

    def one(y: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        dq, dk_blocks, dv_blocks = carry
        weights = jnp.exp(_tile_scores(blocks, x, y, q, k_blocks[y], mask) - lse)
        dweights = _einsum("bkgth,bksh->bkgts", dout, v_blocks[y])
        dscores = (weights * (dweights - delta) * scale).astype(q.dtype)
        dq += _einsum("bkgts,bksh->bkgth", dscores, k_blocks[y])
        dk_blocks = dk_blocks.at[y].add(_einsum("bkgts,bkgth->bksh", dscores, q))
        dv_blocks = dv_blocks.at[y].add(_einsum("bkgts,bkgth->bksh", weights.astype(q.dtype), dout))
        return dq, dk_blocks, dv_blocks

    first, last = _key_blocks(blocks, x, k_blocks.shape[0], mask)
    dq, *dkv = jax.lax.fori_loop(first, last, one, (jnp.zeros(q.shape, jnp.float32), *dkv_blocks))
    return (dkv[0], dkv[1]), dq.astype(q.dtype)


_attention.defvjp(_forward, _backward)


def _tile_scores(
    blocks: Blocks, x: jax.Array, y: jax.Array, q_BKGTH: jax.Array, k_BKSH: jax.Array, mask: AttentionMask
) -> jax.Array:
    where = (x * blocks.query, blocks.query, y * blocks.key, blocks.key)
    return masked_scores(q_BKGTH, k_BKSH, mask.visible_block(*where), mask.bias_block(*where))


def _key_blocks(
    blocks: Blocks, x: jax.Array, num_blocks: int, mask: AttentionMask
) -> tuple[jax.Array | int, jax.Array | int]:
    """The range of key blocks that query block `x` may see: above the diagonal and before the window is skipped."""
    first, last = mask.key_range(x * blocks.query, blocks.query, num_blocks * blocks.key)
    return first // blocks.key, (last + blocks.key - 1) // blocks.key


def _split(x: jax.Array, size: int) -> jax.Array:
    """[..., length, width] to [blocks, ..., size, width]."""
    *batch, length, width = x.shape
    return jnp.moveaxis(x.reshape(*batch, length // size, size, width), -3, 0)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    blocks, *batch, size, width = x.shape
    return jnp.moveaxis(x, 0, -3).reshape(*batch, blocks * size, width)


def _einsum(equation: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
