"""Decoding on NVIDIA GPUs (Pallas, Triton path): one query per row over a long key-value cache.

A program reads one part of one key/value head's cache, once, for all the query heads that share it. Its loop covers
only the blocks in which something is visible, and of those only the visible slots are read, so that what lies in the
others never matters. An int8 cache is multiplied as it lies: a key's scale multiplies its scores, a value's scale its
probabilities.

Legend: B batch, S keys (of a block, in the kernel), N query heads, K key/value heads, R query heads per key/value
head, H head dim, P splits.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llm_jax.errors import require
from llm_jax.kernels import flash_decoding
from llm_jax.kernels.choice import Problem, refuses_gpu
from llm_jax.kernels.flash_decoding import FIRST, HOLES, LAST, QUERY_INDEX, SEGMENT, Slots, product_dtype
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import HIDDEN, LOWEST

DTYPES = ("bfloat16", "float16", "float32")
CACHE_DTYPES = (*DTYPES, "int8")
# Where an array is larger than the first, elements of one byte need more than 31 bits to be counted; where it is larger
# than the second, JAX's Triton lowering takes 64. Between the two it would read elsewhere.
WRAPPED_BYTES = (2**31, 2**32)
LONGEST_HEAD = 256
PROGRAMS = 512  # at least: about four for each multiprocessor of an A100 or H100
LEAST_KEYS = 128  # of a split: below, its output in float32 weighs too much against what it reads
LEAST_ROWS = 16  # what a tensor core multiplies at once
BLOCK_BYTES = 16 * 1024  # of keys that a program has on the way at once, and as many of values


class Blocks(NamedTuple):
    """How the work is cut: keys in a block, programs for each row and key/value head, warps and pipeline stages."""

    keys: int
    splits: int
    warps: int = 4
    stages: int = 2


def refuses(problem: Problem) -> str | None:
    """Why this kernel cannot serve, or None."""
    if problem.dtype not in DTYPES:
        return f"queries must be one of {', '.join(DTYPES)}, got {problem.dtype}"
    if problem.head_dim > LONGEST_HEAD:
        return f"the head dim {problem.head_dim} is above {LONGEST_HEAD}"
    cache = problem.batch, problem.num_kv_heads, problem.num_keys, problem.head_dim
    return refuses_gpu(problem.device_kind) or _unreadable(str(problem.cache_dtype), math.prod(cache))


def _unreadable(cache_dtype: str, size: int) -> str | None:
    """Why keys of this dtype and number of elements cannot be read, or None."""
    if cache_dtype not in CACHE_DTYPES:
        return f"the cache must be one of {', '.join(CACHE_DTYPES)}, got {cache_dtype}"
    if cache_dtype == "int8" and WRAPPED_BYTES[0] < size <= WRAPPED_BYTES[1]:
        return f"it cannot address int8 keys of 2 to 4 GiB, here {size / 2**30:.2f}: take a shorter cache or fewer rows"
    return None


def default_blocks(slots: Slots) -> Blocks:
    """Blocks of at most `BLOCK_BYTES`, and enough splits for `PROGRAMS` programs if the cache is as long as that."""
    B, K, S, H = slots.key.shape
    # Codes are widened to float32 in registers before they are what the products want, and count like that.
    itemsize = 4 if slots.key.dtype == jnp.int8 else slots.key.dtype.itemsize
    keys = BLOCK_BYTES // (pl.next_power_of_2(H) * itemsize)
    splits = min(pl.cdiv(PROGRAMS, B * K), S // LEAST_KEYS)
    return Blocks(max(16, min(keys, 128, pl.next_power_of_2(S))), max(1, splits))


class _Inputs(NamedTuple):
    """What a program reads; an unused part is None."""

    rows: Any
    q: Any
    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    segments: Any
    slopes: Any


def decode(
    q_B1NH: jax.Array, slots: Slots, mask: AttentionMask, *, blocks: Blocks | None = None, interpret: bool = False
) -> jax.Array:
    """What `decode_attention` gives, [B,1,N,H] in q's dtype; not differentiated.

    Raises `UserError` for a cache that it cannot read.
    """
    reason = _unreadable(str(slots.key.dtype), slots.key.size)
    require(reason is None, f"decoding: 'pallas_gpu' cannot serve this call: {reason}")
    blocks = default_blocks(slots) if blocks is None else blocks
    B, K, S, H = slots.key.shape
    q_BKRH = flash_decoding.folded_queries(q_B1NH, mask, K)
    R = q_BKRH.shape[2]
    inputs = _Inputs(
        rows=flash_decoding.row_integers(mask, B, S),
        q=q_BKRH,
        k=slots.key,
        v=slots.value,
        k_scale=None if slots.key_scale is None else slots.key_scale[..., 0],
        v_scale=None if slots.value_scale is None else slots.value_scale[..., 0],
        segments=mask.key_segment_ids,
        slopes=None if mask.slopes is None else mask.slopes.reshape(K, R).astype(jnp.float32),
    )
    out_BKPRH, lse_BKPR = pl.pallas_call(
        functools.partial(_kernel, blocks, (R, H)),
        grid=(B, K * blocks.splits),  # two axes leave one for vmap
        in_specs=[_specs(inputs, blocks)],
        out_specs=_out_specs(R, H, blocks.splits),
        out_shape=(
            jax.ShapeDtypeStruct((B, K, blocks.splits, R, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, blocks.splits, R), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="decode_attention",
    )(inputs)
    return flash_decoding.combine(out_BKPRH, lse_BKPR, q_B1NH.dtype)


def _sizes(R: int, H: int) -> tuple[int, int]:
    """The sizes of a tile of queries: powers of two, as Triton wants them; what is added is masked."""
    return max(LEAST_ROWS, pl.next_power_of_2(R)), pl.next_power_of_2(H)


def _specs(inputs: _Inputs, blocks: Blocks) -> _Inputs:
    """Which part of each input a program sees: row b, and in it the head that it serves."""
    (_, _, R, H), S, P = inputs.q.shape, inputs.k.shape[2], blocks.splits
    rows, width = _sizes(R, H)
    length = pl.cdiv(S, blocks.keys) * blocks.keys
    slots = pl.BlockSpec((None, None, length, width), lambda b, i: (b, i // P, 0, 0))
    scales = pl.BlockSpec((None, None, length), lambda b, i: (b, i // P, 0))
    return _Inputs(
        rows=pl.BlockSpec((inputs.rows.shape[0], None), lambda b, i: (0, b)),
        q=pl.BlockSpec((None, None, rows, width), lambda b, i: (b, i // P, 0, 0)),
        k=slots,
        v=slots,
        k_scale=None if inputs.k_scale is None else scales,
        v_scale=None if inputs.v_scale is None else scales,
        segments=None if inputs.segments is None else pl.BlockSpec((None, length), lambda b, i: (b, 0)),
        slopes=None if inputs.slopes is None else pl.BlockSpec((None, rows), lambda b, i: (i // P, 0)),
    )


def _out_specs(R: int, H: int, P: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    rows, width = _sizes(R, H)
    return (
        pl.BlockSpec((None, None, None, rows, width), lambda b, i: (b, i // P, i % P, 0, 0)),
        pl.BlockSpec((None, None, None, rows), lambda b, i: (b, i // P, i % P, 0)),
    )


def _kernel(blocks: Blocks, size: tuple[int, int], inputs: _Inputs, out_ref: Any, lse_ref: Any) -> None:
    """Attention over one split of one row's cache, for the query heads that share it, and its log-sum-exp."""
    rows, width = _sizes(*size)
    real_R, real_H = jnp.arange(rows) < size[0], jnp.arange(width) < size[1]
    real_RH = real_R[:, None] & real_H[None, :]
    q_RH = plgpu.load(inputs.q, mask=real_RH, other=0.0)
    slopes_R = None if inputs.slopes is None else plgpu.load(inputs.slopes, mask=real_R, other=0.0)
    row = [inputs.rows[field] for field in range(inputs.rows.shape[0])]

    def visit(y: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest_R, sums_R, out_RH = carry
        keys, index_S = pl.ds(y * blocks.keys, blocks.keys), y * blocks.keys + jnp.arange(blocks.keys)
        seen_S = _seen(inputs, row, keys, index_S)
        k_SH = plgpu.load(inputs.k.at[keys], mask=seen_S[:, None] & real_H[None, :], other=0)
        v_SH = plgpu.load(inputs.v.at[keys], mask=seen_S[:, None] & real_H[None, :], other=0)
        scores_RS = plgpu.dot(q_RH, k_SH.astype(q_RH.dtype), trans_b=True) * size[1] ** -0.5
        if inputs.k_scale is not None:
            scores_RS *= plgpu.load(inputs.k_scale.at[keys], mask=seen_S, other=0.0)[None, :]
        if slopes_R is not None:
            scores_RS += slopes_R[:, None] * (index_S - row[QUERY_INDEX]).astype(jnp.float32)[None, :]
        scores_RS = jnp.where(seen_S[None, :], scores_RS, HIDDEN)
        new_highest_R = jnp.maximum(highest_R, jnp.max(scores_RS, axis=1))
        weights_RS, shrink_R = jnp.exp(scores_RS - new_highest_R[:, None]), jnp.exp(highest_R - new_highest_R)
        sums_R = sums_R * shrink_R + jnp.sum(weights_RS, axis=1)
        if inputs.v_scale is not None:
            weights_RS *= plgpu.load(inputs.v_scale.at[keys], mask=seen_S, other=0.0)[None, :]
        dtype = product_dtype(q_RH.dtype, inputs.v_scale is not None)
        products_RH = plgpu.dot(weights_RS.astype(dtype), v_SH.astype(dtype))
        return new_highest_R, sums_R, out_RH * shrink_R[:, None] + products_RH

    nothing = (jnp.full(rows, LOWEST, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((rows, width), jnp.float32))
    start, stop = flash_decoding.part(row, blocks.keys, pl.program_id(1) % blocks.splits, blocks.splits)
    highest_R, sums_R, out_RH = jax.lax.fori_loop(start, stop, visit, nothing)
    sums_R = jnp.where(sums_R > 0, sums_R, 1.0)
    plgpu.store(out_ref, out_RH / sums_R[:, None], mask=real_RH)
    plgpu.store(lse_ref, highest_R + jnp.log(sums_R), mask=real_R)


def _seen(inputs: _Inputs, row: list[jax.Array], keys: Any, index_S: jax.Array) -> jax.Array:
    """Bool [S]: which keys of a block are visible. Nothing else is read of the others."""
    seen_S = (index_S >= row[FIRST]) & (index_S < row[LAST])
    if inputs.segments is None:
        return seen_S
    # Where the row has no holes, no segment id is read.
    segments_S = plgpu.load(inputs.segments.at[keys], mask=seen_S & (row[HOLES] > 0), other=0)
    return seen_S & ((row[HOLES] == 0) | (segments_S == row[SEGMENT]))
