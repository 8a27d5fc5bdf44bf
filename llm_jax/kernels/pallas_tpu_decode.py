"""Decoding on TPUs (Pallas, Mosaic path): one query per row over a long key-value cache.

A step of the grid takes one block of keys of several key/value heads, which the pipeline brings into the vector memory
while the step before is computed. The steps of a row cover only the blocks in which something is visible: the others
repeat the last block, which is then neither fetched again nor computed. Hidden slots inside a block are masked, so that
what lies in them never matters. An int8 cache is multiplied as it lies: a key's scale multiplies its scores, a value's
scale its probabilities.

Legend: B batch, S keys, N query heads, K key/value heads, R query heads per key/value head, H head dim, P splits. In
the kernel, S are the keys of a block and K the heads of a step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.errors import require
from llm_jax.kernels import flash_decoding
from llm_jax.kernels.choice import Problem
from llm_jax.kernels.flash_decoding import FIRST, HOLES, LAST, QUERY_INDEX, SEGMENT, Slots, product_dtype
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import HIDDEN, LOWEST

DTYPES = ("bfloat16", "float32")
CACHE_DTYPES = (*DTYPES, "int8")  # Mosaic widens no float16
LONGEST_HEAD = 256
KEYS = 512  # of a block
BLOCK_BYTES = 1024 * 1024  # of the keys of a step, and as many of values: each is in memory twice
CORES = 2  # of a chip, at most: so many programs keep them busy
LANES = 128


class Blocks(NamedTuple):
    """How the work is cut: keys in a block, key/value heads in a step, splits of each row's keys."""

    keys: int
    heads: int
    splits: int


def refuses(problem: Problem) -> str | None:
    """Why this kernel cannot serve, or None."""
    if problem.dtype not in DTYPES:
        return f"queries must be one of {', '.join(DTYPES)}, got {problem.dtype}"
    if problem.head_dim > LONGEST_HEAD:
        return f"the head dim {problem.head_dim} is above {LONGEST_HEAD}"
    return _unreadable(str(problem.cache_dtype))


def _unreadable(cache_dtype: str) -> str | None:
    """Why keys and values of this dtype cannot be read, or None."""
    if cache_dtype not in CACHE_DTYPES:
        return f"the cache must be one of {', '.join(CACHE_DTYPES)}, got {cache_dtype}"
    return None


def default_blocks(slots: Slots) -> Blocks:
    """As many heads in a step as `BLOCK_BYTES` hold, and splits only where there is less than a row for each core.

    Fewer heads spill less but keep fewer products in flight: compiled for a TPU v5e at head dim 128, a step of 8 has
    210 spills and 0.44 bundles for each key and head, one of 4 has 133 and 0.51, one of 2 none and 0.67.
    """
    B, K, S, H = slots.key.shape
    keys = min(KEYS, pl.cdiv(S, LANES) * LANES)
    # An int8 block is widened in memory, so that it counts like one of 16 bits.
    width = max(H, LANES) * max(slots.key.dtype.itemsize, 2)
    fitting = [heads for heads in range(1, K + 1) if K % heads == 0 and heads * keys * width <= BLOCK_BYTES]
    heads = max(fitting, default=1)
    return Blocks(keys, heads, min(pl.cdiv(CORES, B * (K // heads)), pl.cdiv(S, keys)))


class _Inputs(NamedTuple):
    """What a step reads; an unused part is None."""

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
    reason = _unreadable(str(slots.key.dtype))
    require(reason is None, f"decoding: 'pallas_tpu' cannot serve this call: {reason}")
    blocks = default_blocks(slots) if blocks is None else blocks
    B, K, S, H = slots.key.shape
    q_BKRH = flash_decoding.folded_queries(q_B1NH, mask, K)
    R = q_BKRH.shape[2]
    inputs = _Inputs(
        q=q_BKRH,
        k=slots.key,
        v=slots.value,
        k_scale=None if slots.key_scale is None else slots.key_scale.reshape(B, K, 1, S),
        v_scale=None if slots.value_scale is None else slots.value_scale.reshape(B, K, 1, S),
        segments=None if mask.key_segment_ids is None else mask.key_segment_ids[:, None],
        slopes=None if mask.slopes is None else mask.slopes.reshape(K, R, 1).astype(jnp.float32),
    )
    statistic = pltpu.VMEM((blocks.heads, R, 1), jnp.float32)
    out_BKPRH, lse_BKPR1 = pl.pallas_call(
        functools.partial(_kernel, blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K // blocks.heads, blocks.splits, _steps(blocks, S)),
            in_specs=[_specs(inputs, blocks)],
            out_specs=(_out_spec(blocks, R, H), _out_spec(blocks, R, 1)),
            scratch_shapes=(statistic, statistic, pltpu.VMEM((blocks.heads, R, H), jnp.float32)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((B, K, blocks.splits, R, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, blocks.splits, R, 1), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        interpret=interpret,
        name="decode_attention",
    )(flash_decoding.row_integers(mask, B, S), inputs)
    return flash_decoding.combine(out_BKPRH, lse_BKPR1[..., 0], q_B1NH.dtype)


def _steps(blocks: Blocks, num_keys: int) -> int:
    """How many blocks fall to a split at most."""
    return pl.cdiv(pl.cdiv(num_keys, blocks.keys), blocks.splits)


def _specs(inputs: _Inputs, blocks: Blocks) -> _Inputs:
    """Which part of each input a step sees."""
    R, H = inputs.q.shape[2:]

    def block(b: jax.Array, p: jax.Array, i: jax.Array, rows: Any) -> jax.Array:
        start, stop = flash_decoding.part(_row(rows, b), blocks.keys, p, blocks.splits)
        return jnp.maximum(jnp.minimum(start + i, stop - 1), 0)

    heads, keys = blocks.heads, blocks.keys
    slots = pl.BlockSpec((None, heads, keys, H), lambda b, g, p, i, rows: (b, g, block(b, p, i, rows), 0))
    scales = pl.BlockSpec((None, heads, 1, keys), lambda b, g, p, i, rows: (b, g, 0, block(b, p, i, rows)))
    segments = pl.BlockSpec((None, 1, keys), lambda b, g, p, i, rows: (b, 0, block(b, p, i, rows)))
    slopes = pl.BlockSpec((heads, R, 1), lambda b, g, p, i, rows: (g, 0, 0))
    return _Inputs(
        q=pl.BlockSpec((None, heads, R, H), lambda b, g, p, i, rows: (b, g, 0, 0)),
        k=slots,
        v=slots,
        k_scale=None if inputs.k_scale is None else scales,
        v_scale=None if inputs.v_scale is None else scales,
        segments=None if inputs.segments is None else segments,
        slopes=None if inputs.slopes is None else slopes,
    )


def _out_spec(blocks: Blocks, R: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, blocks.heads, None, R, width), lambda b, g, p, i, rows: (b, g, p, 0, 0))


def _row(rows_ref: Any, b: jax.Array) -> list[jax.Array]:
    return [rows_ref[field, b] for field in range(5)]


def _kernel(
    blocks: Blocks,
    rows_ref: Any,
    inputs: _Inputs,
    out_ref: Any,
    lse_ref: Any,
    highest_ref: Any,
    sums_ref: Any,
    total_ref: Any,
) -> None:
    """Take one block of keys into the running maximum, sum and output; write these after the split's last block."""
    row, step = _row(rows_ref, pl.program_id(0)), pl.program_id(3)
    start, stop = flash_decoding.part(row, blocks.keys, pl.program_id(2), blocks.splits)
    first_key = (start + step) * blocks.keys
    running = (highest_ref, sums_ref, total_ref)

    @pl.when(step == 0)
    def _() -> None:
        highest_ref[...] = jnp.full(highest_ref.shape, LOWEST, jnp.float32)
        sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    inside = start + step < stop
    whole = (row[HOLES] == 0) & (first_key >= row[FIRST]) & (first_key + blocks.keys <= row[LAST])

    @pl.when(inside & whole)
    def _() -> None:
        _visit(inputs, row, first_key, running, None)

    @pl.when(inside & ~whole)
    def _() -> None:
        _visit(inputs, row, first_key, running, _seen(inputs, row, first_key))

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        sums = jnp.where(sums_ref[...] > 0, sums_ref[...], 1.0)
        out_ref[...] = total_ref[...] / sums
        lse_ref[...] = highest_ref[...] + jnp.log(sums)


def _seen(inputs: _Inputs, row: list[jax.Array], first_key: jax.Array) -> jax.Array:
    """Bool [1,S]: which keys of a block are visible."""
    index_1S = first_key + jax.lax.broadcasted_iota(jnp.int32, (1, inputs.k.shape[1]), 1)
    seen_1S = (index_1S >= row[FIRST]) & (index_1S < row[LAST])
    if inputs.segments is None:
        return seen_1S
    return seen_1S & ((inputs.segments[...] == row[SEGMENT]) | (row[HOLES] == 0))


def _visit(
    inputs: _Inputs,
    row: list[jax.Array],
    first_key: jax.Array,
    running: tuple[Any, Any, Any],
    seen_1S: jax.Array | None,
) -> None:
    highest_ref, sums_ref, total_ref = running
    scores_KRS = _scores(inputs, row, first_key)
    if seen_1S is not None:
        scores_KRS = jnp.where(seen_1S[None], scores_KRS, HIDDEN)
    highest_KR1 = jnp.maximum(highest_ref[...], jnp.max(scores_KRS, axis=2, keepdims=True))
    weights_KRS, shrink_KR1 = jnp.exp(scores_KRS - highest_KR1), jnp.exp(highest_ref[...] - highest_KR1)
    highest_ref[...] = highest_KR1
    sums_ref[...] = sums_ref[...] * shrink_KR1 + jnp.sum(weights_KRS, axis=2, keepdims=True)
    total_ref[...] = total_ref[...] * shrink_KR1 + _products(inputs, weights_KRS, seen_1S)


def _scores(inputs: _Inputs, row: list[jax.Array], first_key: jax.Array) -> jax.Array:
    """Float32 [K,R,S], not yet masked."""
    q_KRH = inputs.q[...]
    k_KSH = inputs.k[...].astype(q_KRH.dtype)
    scores_KRS = _matmul("krh,ksh->krs", q_KRH, k_KSH) * q_KRH.shape[2] ** -0.5
    if inputs.k_scale is not None:
        scores_KRS *= inputs.k_scale[...]
    if inputs.slopes is not None:
        index_11S = first_key + jax.lax.broadcasted_iota(jnp.int32, (1, 1, k_KSH.shape[1]), 2)
        scores_KRS += inputs.slopes[...] * (index_11S - row[QUERY_INDEX]).astype(jnp.float32)
    return scores_KRS


def _products(inputs: _Inputs, weights_KRS: jax.Array, seen_1S: jax.Array | None) -> jax.Array:
    """Float32 [K,R,H]: the weighted sum of a block's values."""
    scaled = inputs.v_scale is not None
    dtype = product_dtype(inputs.q.dtype, scaled)
    v_KSH = inputs.v[...].astype(dtype)
    if scaled:
        scales_K1S = inputs.v_scale[...]
        scales_K1S = scales_K1S if seen_1S is None else jnp.where(seen_1S[None], scales_K1S, 0.0)
        weights_KRS *= scales_K1S
    elif seen_1S is not None:  # 0 * NaN would reach the output; a code is never NaN
        seen_SH = jnp.broadcast_to(seen_1S.astype(jnp.float32), (v_KSH.shape[2], v_KSH.shape[1])).T > 0
        v_KSH = jnp.where(seen_SH[None], v_KSH, 0)
    return _matmul("krs,ksh->krh", weights_KRS.astype(dtype), v_KSH)


def _matmul(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Float32; only float32 factors have a precision to choose, and take the one in context."""
    precision = None if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=jnp.float32)
