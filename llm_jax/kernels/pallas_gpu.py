"""Fused attention for NVIDIA GPUs: Pallas kernels that Triton compiles, forward and backward.

One program of the forward pass holds a block of queries and walks over the keys that they may see, with the running
maximum and sum of an online softmax; it saves the log-sum-exp of each row. The backward pass recomputes the weights of
a tile from it, once for the gradient of the queries (a program per block of queries) and once for those of keys and
values (a program per block of keys, over all query heads of its key/value head), so that no two programs add to one
place and the result is the same on every run. (Dao, "FlashAttention-2", algorithms 1 and 2.)

Softmax is computed in base 2, the exponential that the hardware has: the saved log-sum-exp is in base 2 as well.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, G query heads per key/value head,
H head dim, X query blocks, Y key blocks. Inside a kernel T and S are the sizes of a tile. A matrix whose last
dimension is H is a tuple of its power-of-two parts there, as Triton has no other shapes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llm_jax.kernels.choice import Problem, check_supported, refuses_gpu, unsupported
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.ranges import Ranges, key_ranges, query_ranges
from llm_jax.kernels.reference import HIDDEN, LOWEST
from llm_jax.kernels.tile import visible

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float16", "float32")
SMALLEST_BLOCK = 16  # of a product on tensor cores


class Pass(NamedTuple):
    """A tile of the score matrix, and the warps and pipeline stages of the program that works on it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    """One `Pass` for each kernel."""

    forward: Pass
    key_gradients: Pass
    query_gradients: Pass


# By head dim and bytes per element: tiles that compile for an A100 without spilling a register, also with every rule of
# the mask in use, and that fit into the 99 KB of shared memory of smaller cards.
BLOCKS = {
    (32, 2): Blocks(Pass(128, 64, 4, 2), Pass(64, 64, 4, 2), Pass(64, 64, 4, 2)),
    (64, 2): Blocks(Pass(128, 128, 8, 2), Pass(32, 128, 8, 2), Pass(128, 64, 8, 2)),
    (96, 2): Blocks(Pass(128, 64, 8, 2), Pass(32, 64, 4, 2), Pass(128, 32, 8, 2)),
    (128, 2): Blocks(Pass(128, 64, 8, 2), Pass(64, 64, 8, 2), Pass(128, 32, 8, 2)),
    (192, 2): Blocks(Pass(128, 16, 8, 2), Pass(32, 32, 4, 2), Pass(64, 16, 4, 2)),
    (256, 2): Blocks(Pass(64, 32, 8, 2), Pass(32, 32, 8, 2), Pass(32, 32, 8, 2)),
    (32, 4): Blocks(Pass(64, 64, 4, 2), Pass(32, 64, 4, 2), Pass(64, 32, 4, 2)),
    (64, 4): Blocks(Pass(64, 32, 4, 2), Pass(32, 32, 4, 2), Pass(32, 32, 4, 2)),
    (96, 4): Blocks(Pass(64, 32, 4, 2), Pass(16, 16, 4, 2), Pass(64, 16, 4, 2)),
    (128, 4): Blocks(Pass(64, 32, 4, 2), Pass(32, 32, 4, 2), Pass(32, 32, 4, 2)),
    (192, 4): Blocks(Pass(32, 32, 4, 2), Pass(16, 16, 4, 2), Pass(32, 16, 4, 2)),
    (256, 4): Blocks(Pass(32, 16, 4, 2), Pass(16, 16, 4, 2), Pass(16, 16, 4, 2)),
}


class _Plan(NamedTuple):
    """What a kernel knows when it is compiled."""

    tile: Pass
    num_queries: int
    num_keys: int
    group: int
    head_dim: int
    causal: bool

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def log2_scale(self) -> float:
        """From a product of a query and a key to the exponent of 2."""
        return self.scale * math.log2(math.e)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(start, size) of the power-of-two parts of the head dim, the largest first."""
        sizes = [1 << bit for bit in reversed(range(self.head_dim.bit_length())) if self.head_dim >> bit & 1]
        return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


class _Operands(NamedTuple):
    """What a kernel reads: arrays, their block specs, or its refs. None where the call has no such rule."""

    q_BTNH: Any
    k_BSKH: Any
    v_BSKH: Any
    ranges_BX4: Any  # int32, the fields of `Ranges`; [B,Y,4] where a program has a block of keys
    limits_B2: Any  # int32, the index of the first query and the number of keys
    window_1: Any  # int32
    slopes_N: Any  # float32, times sqrt(H): they are added before the scores are scaled
    query_segments_BT: Any  # int32
    key_segments_BS: Any  # int32
    dout_BTNH: Any = None
    lse_BNT: Any = None  # float32
    delta_BNT: Any = None  # float32, what the softmax's normalisation takes from a row of the scores' gradient


Parts = tuple[jax.Array, ...]


def refuses(problem: Problem) -> str | None:
    """Why these kernels cannot serve a problem, or None."""
    if problem.platform != "gpu":
        return f"it runs on NVIDIA GPUs, not on {problem.platform}"
    return refuses_gpu(problem.device_kind) or unsupported(problem.dtype, problem.head_dim, DTYPES, HEAD_DIMS)


def gpu_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + bias) v over the visible keys, [B,T,N,H] in q's dtype.

    Every rule of the mask is applied here. A query that sees nothing gives zeros and passes no gradient; keys that no
    query may see, by length, padding or causality, may hold anything. Scores, softmax and sums are float32.

    Args:
      q_BTNH: bfloat16, float16 or float32; head dim 32, 64, 96, 128, 192 or 256.
      k_BSKH: of q's dtype; query head n reads key/value head n // (N / K).
      v_BSKH: like `k_BSKH`.
      mask: the rules.
      blocks: tile sizes; by default those of `BLOCKS`.
      interpret: run the kernels' bodies as plain JAX, on any platform.

    Raises `UserError` for another dtype or head dim.
    """
    check_supported("'pallas_gpu'", (q_BTNH, k_BSKH, v_BSKH), DTYPES, HEAD_DIMS)
    blocks = BLOCKS[q_BTNH.shape[3], q_BTNH.dtype.itemsize] if blocks is None else blocks
    # Outside of the kernels, where XLA merges it with what made the queries (RoPE): no more bytes are moved.
    q_BTNH = mask.scale_queries(q_BTNH)
    return _attention((blocks, interpret), q_BTNH, k_BSKH, v_BSKH, mask)


class _Residuals(NamedTuple):
    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    mask: AttentionMask
    out_BTNH: jax.Array
    lse_BNT: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    options: tuple[Blocks, bool], q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask
) -> jax.Array:
    return _forward(options, q_BTNH, k_BSKH, v_BSKH, mask)[0]


def _forward(
    options: tuple[Blocks, bool], q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, _Residuals]:
    blocks, interpret = options
    B, T, N, H = q_BTNH.shape
    plan = _plan(blocks.forward, q_BTNH, k_BSKH, mask)
    operands = _operands(plan, q_BTNH, k_BSKH, v_BSKH, mask, key_ranges)
    outputs = (jax.ShapeDtypeStruct((B, T, N, H), q_BTNH.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32))
    out_BTNH, lse_BNT = _call_by_queries(attention_forward, plan, operands, outputs, interpret)
    out_BTNH = checkpoint_name(out_BTNH, "attention_out")
    lse_BNT = checkpoint_name(lse_BNT, "attention_lse")
    return out_BTNH, _Residuals(q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, lse_BNT)


def _backward(
    options: tuple[Blocks, bool], residuals: _Residuals, dout_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    blocks, interpret = options
    q, k, v, mask, out_BTNH, lse_BNT = residuals
    delta_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    rows = {"dout_BTNH": dout_BTNH, "lse_BNT": lse_BNT, "delta_BNT": delta_BTN.transpose(0, 2, 1)}
    plan = _plan(blocks.query_gradients, q, k, mask)
    operands = _operands(plan, q, k, v, mask, key_ranges)._replace(**rows)
    like_q, like_k = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype)
    (dq_BTNH,) = _call_by_queries(attention_query_gradients, plan, operands, (like_q,), interpret)
    plan = _plan(blocks.key_gradients, q, k, mask)
    operands = _operands(plan, q, k, v, mask, query_ranges)._replace(**rows)
    dk_BSKH, dv_BSKH = _call_by_keys(attention_key_gradients, plan, operands, (like_k, like_k), interpret)
    return dq_BTNH, dk_BSKH, dv_BSKH, None


_attention.defvjp(_forward, _backward)


def _plan(tile: Pass, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask) -> _Plan:
    (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    tile = tile._replace(queries=_fit(tile.queries, T), keys=_fit(tile.keys, S))
    return _Plan(tile, T, S, N // K, H, mask.causal or mask.window is not None)


def _fit(block: int, length: int) -> int:
    """A block no longer than a short sequence needs."""
    return min(block, max(SMALLEST_BLOCK, pl.next_power_of_2(length)))


def _operands(
    plan: _Plan,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    ranges: Callable[..., Ranges],
) -> _Operands:
    B, T, S = q_BTNH.shape[0], plan.num_queries, plan.num_keys
    ranges_BX4 = jnp.stack(ranges(mask, B, T, S, (plan.tile.queries, plan.tile.keys)), axis=2)
    offset_B = jnp.broadcast_to(jnp.asarray(0 if mask.query_offset is None else mask.query_offset, jnp.int32), (B,))
    keys_B = jnp.full((B,), S, jnp.int32) if mask.key_lengths is None else jnp.minimum(mask.key_lengths, S)
    return _Operands(
        q_BTNH=q_BTNH,
        k_BSKH=k_BSKH,
        v_BSKH=v_BSKH,
        ranges_BX4=jnp.broadcast_to(ranges_BX4, (B, *ranges_BX4.shape[1:])),
        limits_B2=jnp.stack([offset_B, keys_B.astype(jnp.int32)], axis=1),
        window_1=None if mask.window is None else jnp.asarray(mask.window, jnp.int32)[None],
        slopes_N=None if mask.slopes is None else mask.slopes.astype(jnp.float32) / plan.scale,
        query_segments_BT=mask.query_segment_ids,
        key_segments_BS=mask.key_segment_ids,
    )


# Each under `jax.jit`, for its own sake (layers share one trace) and because remat drops a dead jit, not a dead kernel.
@functools.partial(jax.jit, static_argnames=("kernel", "plan", "outputs", "interpret"))
def _call_by_queries(
    kernel: Callable[..., None],
    plan: _Plan,
    operands: _Operands,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Run a kernel whose programs have one block of queries of one head each."""
    (B, T, N, H), S, G = operands.q_BTNH.shape, plan.num_keys, plan.group
    X = pl.cdiv(T, plan.tile.queries)

    # The last block first: under causality it has the most keys to visit, and short programs fill the end best.
    rows_BTNH = pl.BlockSpec((None, plan.tile.queries, None, H), lambda i, n, b: (b, X - 1 - i, n, 0))
    rows_BNT = pl.BlockSpec((None, None, plan.tile.queries), lambda i, n, b: (b, n, X - 1 - i))
    rows_BT = pl.BlockSpec((None, plan.tile.queries), lambda i, n, b: (b, X - 1 - i))
    all_BSKH = pl.BlockSpec((None, S, None, H), lambda i, n, b: (b, 0, n // G, 0))
    specs = _Operands(
        q_BTNH=rows_BTNH,
        k_BSKH=all_BSKH,
        v_BSKH=all_BSKH,
        ranges_BX4=pl.BlockSpec((None, None, 4), lambda i, n, b: (b, X - 1 - i, 0)),
        limits_B2=pl.BlockSpec((None, 2), lambda i, n, b: (b, 0)),
        window_1=pl.BlockSpec((1,), lambda i, n, b: (0,)),
        slopes_N=pl.BlockSpec((1,), lambda i, n, b: (n,)),
        query_segments_BT=rows_BT,
        key_segments_BS=pl.BlockSpec((None, S), lambda i, n, b: (b, 0)),
        dout_BTNH=rows_BTNH,
        lse_BNT=rows_BNT,
        delta_BNT=rows_BNT,
    )
    out_specs = tuple(rows_BTNH if len(output.shape) == 4 else rows_BNT for output in outputs)
    return _call(kernel, plan, (X, N, B), operands, specs, outputs, out_specs, interpret)


@functools.partial(jax.jit, static_argnames=("kernel", "plan", "outputs", "interpret"))
def _call_by_keys(
    kernel: Callable[..., None],
    plan: _Plan,
    operands: _Operands,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Run a kernel whose programs have one block of keys of one key/value head each."""
    (B, S, K, H), T, G = operands.k_BSKH.shape, plan.num_queries, plan.group
    rows_BSKH = pl.BlockSpec((None, plan.tile.keys, None, H), lambda y, k, b: (b, y, k, 0))
    all_BTNH = pl.BlockSpec((None, T, G, H), lambda y, k, b: (b, 0, k, 0))
    all_BNT = pl.BlockSpec((None, G, T), lambda y, k, b: (b, k, 0))
    specs = _Operands(
        q_BTNH=all_BTNH,
        k_BSKH=rows_BSKH,
        v_BSKH=rows_BSKH,
        ranges_BX4=pl.BlockSpec((None, None, 4), lambda y, k, b: (b, y, 0)),
        limits_B2=pl.BlockSpec((None, 2), lambda y, k, b: (b, 0)),
        window_1=pl.BlockSpec((1,), lambda y, k, b: (0,)),
        slopes_N=pl.BlockSpec((G,), lambda y, k, b: (k,)),
        query_segments_BT=pl.BlockSpec((None, T), lambda y, k, b: (b, 0)),
        key_segments_BS=pl.BlockSpec((None, plan.tile.keys), lambda y, k, b: (b, y)),
        dout_BTNH=all_BTNH,
        lse_BNT=all_BNT,
        delta_BNT=all_BNT,
    )
    grid = (pl.cdiv(S, plan.tile.keys), K, B)
    return _call(kernel, plan, grid, operands, specs, outputs, (rows_BSKH,) * len(outputs), interpret)


def _call(
    kernel: Callable[..., None],
    plan: _Plan,
    grid: tuple[int, int, int],
    operands: _Operands,
    specs: _Operands,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    out_specs: tuple[pl.BlockSpec, ...],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    used = [None if operand is None else spec for operand, spec in zip(operands, specs, strict=True)]
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=grid,
        in_specs=[_Operands(*used)],
        out_specs=out_specs,
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=plan.tile.warps, num_stages=plan.tile.stages),
        interpret=interpret,
        name=kernel.__name__,
    )(operands)


# The kernels.


def attention_forward(plan: _Plan, refs: _Operands, out_ref: Any, lse_ref: Any) -> None:
    """Output [T,H] and base-2 log-sum-exp [T] of one block of queries; inf for a query that sees nothing."""
    num_rows = plan.tile.queries
    queries = _queries(plan, refs, pl.num_programs(0) - 1 - pl.program_id(0), slice(None))
    q = _load(plan, refs.q_BTNH, (slice(None),), queries.exists)
    slope = None if refs.slopes_N is None else refs.slopes_N[0]

    def tile(y: jax.Array, _: jax.Array, carry: tuple[jax.Array, jax.Array, Parts], masked: bool) -> tuple[Any, ...]:
        highest_T, sums_T, out = carry
        rows = pl.ds(y * plan.tile.keys, plan.tile.keys)
        keys = _keys(plan, refs, y, rows, masked)
        scores_TS = _scores(q, _load(plan, refs.k_BSKH, (rows,), keys.exists))
        scores_TS = _add_bias(scores_TS, slope, queries, keys, query_axis=0)
        if masked:
            scores_TS = jnp.where(_seen(plan, refs, queries, keys, query_axis=0), scores_TS, HIDDEN)
        new_highest_T = jnp.maximum(highest_T, jnp.max(scores_TS, axis=1) * plan.log2_scale)
        weights_TS = jnp.exp2(scores_TS * plan.log2_scale - new_highest_T[:, None])
        shrink_T = jnp.exp2(highest_T - new_highest_T)
        sums_T = sums_T * shrink_T + jnp.sum(weights_TS, axis=1)
        v = _load(plan, refs.v_BSKH, (rows,), keys.exists)
        out = _add_product(tuple(part * shrink_T[:, None] for part in out), weights_TS, v)
        return new_highest_T, sums_T, out

    start = (jnp.full((num_rows,), LOWEST, jnp.float32), jnp.zeros((num_rows,), jnp.float32), _zeros(plan, num_rows))
    highest_T, sums_T, out = _walk(refs, tile, start)
    sees_T = sums_T > 0
    sums_T = jnp.where(sees_T, sums_T, 1.0)
    _store(plan, out_ref, tuple(part / sums_T[:, None] for part in out), queries.exists)
    lse_T = jnp.where(sees_T, highest_T + jnp.log2(sums_T), jnp.inf)
    plgpu.store(lse_ref, lse_T, mask=queries.exists)


def attention_query_gradients(plan: _Plan, refs: _Operands, dq_ref: Any) -> None:
    """Gradient [T,H] of one block of queries."""
    queries = _queries(plan, refs, pl.num_programs(0) - 1 - pl.program_id(0), slice(None))
    lse_T = plgpu.load(refs.lse_BNT, mask=queries.exists, other=jnp.inf)
    sees_T = lse_T < jnp.inf  # the other rows may hold anything
    delta_T = plgpu.load(refs.delta_BNT, mask=sees_T, other=0.0)
    q = _load(plan, refs.q_BTNH, (slice(None),), sees_T)
    dout = _load(plan, refs.dout_BTNH, (slice(None),), sees_T)
    slope = None if refs.slopes_N is None else refs.slopes_N[0]

    def tile(y: jax.Array, _: jax.Array, dq: Parts, masked: bool) -> Parts:
        rows = pl.ds(y * plan.tile.keys, plan.tile.keys)
        keys = _keys(plan, refs, y, rows, masked)
        k = _load(plan, refs.k_BSKH, (rows,), keys.exists)
        scores_TS = _add_bias(_scores(q, k), slope, queries, keys, query_axis=0)
        weights_TS = jnp.exp2(scores_TS * plan.log2_scale - lse_T[:, None])
        if masked:
            weights_TS = jnp.where(_seen(plan, refs, queries, keys, query_axis=0), weights_TS, 0.0)
        v = _load(plan, refs.v_BSKH, (rows,), keys.exists)
        dscores_TS = weights_TS * (_scores(dout, v) - delta_T[:, None])
        return _add_product(dq, dscores_TS, k)

    dq = _walk(refs, tile, _zeros(plan, plan.tile.queries))
    _store(plan, dq_ref, tuple(part * plan.scale for part in dq), queries.exists)


def attention_key_gradients(plan: _Plan, refs: _Operands, dk_ref: Any, dv_ref: Any) -> None:
    """Gradients [S,H] of one block of keys and values; scores are transposed, [S,T]."""
    keys = _keys(plan, refs, pl.program_id(0), slice(None), masked=True)
    k = _load(plan, refs.k_BSKH, (slice(None),), keys.exists)
    v = _load(plan, refs.v_BSKH, (slice(None),), keys.exists)

    def tile(x: jax.Array, g: jax.Array, carry: tuple[Parts, Parts], masked: bool) -> tuple[Parts, Parts]:
        dk, dv = carry
        rows = pl.ds(x * plan.tile.queries, plan.tile.queries)
        queries = _queries(plan, refs, x, rows)
        exists_T = queries.exists if masked else None
        lse_T = plgpu.load(refs.lse_BNT.at[g, rows], mask=exists_T, other=jnp.inf if masked else None)
        sees_T = lse_T < jnp.inf if masked else None
        delta_T = plgpu.load(refs.delta_BNT.at[g, rows], mask=sees_T, other=0.0 if masked else None)
        q = _load(plan, refs.q_BTNH, (rows, g), sees_T)
        slope = None if refs.slopes_N is None else refs.slopes_N[g]
        scores_ST = _add_bias(_scores(k, q), slope, queries, keys, query_axis=1)
        weights_ST = jnp.exp2(scores_ST * plan.log2_scale - lse_T[None, :])
        if masked:
            weights_ST = jnp.where(_seen(plan, refs, queries, keys, query_axis=1), weights_ST, 0.0)
        dout = _load(plan, refs.dout_BTNH, (rows, g), sees_T)
        dv = _add_product(dv, weights_ST, dout)
        dscores_ST = weights_ST * (_scores(v, dout) - delta_T[None, :])
        return _add_product(dk, dscores_ST, q), dv

    dk, dv = _walk(refs, tile, (_zeros(plan, plan.tile.keys), _zeros(plan, plan.tile.keys)), plan.group)
    inside_S = keys.position < plan.num_keys
    _store(plan, dk_ref, tuple(part * plan.scale for part in dk), inside_S)
    _store(plan, dv_ref, dv, inside_S)


# Their parts.


def _walk(refs: _Operands, tile: Callable[..., Any], carry: Any, heads: int = 1) -> Any:
    """Fold `tile(block, head, carry, masked)` over the blocks of the other side: first those that need a mask.

    The heads of a group follow each other in one loop, so that its pipeline does not drain between them.
    """
    first, last, full_first, full_last = (refs.ranges_BX4[i] for i in range(4))
    before, full = full_first - first, full_last - full_first
    partial = before + last - full_last

    def masked(i: jax.Array, carry: Any) -> Any:
        head, block = _divide(i, partial, heads)
        return tile(first + block + jnp.where(block < before, 0, full), head, carry, True)

    def unmasked(i: jax.Array, carry: Any) -> Any:
        head, block = _divide(i, full, heads)
        return tile(full_first + block, head, carry, False)

    carry = jax.lax.fori_loop(0, heads * partial, masked, carry)
    return jax.lax.fori_loop(0, heads * full, unmasked, carry)


def _divide(i: jax.Array, blocks: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder; the pipeline also asks for the steps of loops that have none, hence the maximum."""
    if heads == 1:
        return jnp.zeros_like(i), i
    head = jax.lax.div(i, jnp.maximum(blocks, 1))
    return head, i - head * blocks


class _Rows(NamedTuple):
    """A block of queries or keys inside a kernel; every array has one element per row."""

    start: jax.Array  # int32, the position of the first row
    position: jax.Array  # int32, among the keys
    exists: jax.Array | None  # whether the row may be read; None if all may
    segments: jax.Array | None


def _queries(plan: _Plan, refs: _Operands, block: jax.Array, rows: Any) -> _Rows:
    """Block `block` of the queries, which is at `rows` of the refs."""
    first = block * plan.tile.queries
    row_T = first + jnp.arange(plan.tile.queries, dtype=jnp.int32)
    exists_T = row_T < plan.num_queries
    offset, segments_T = refs.limits_B2[0], _segments(refs.query_segments_BT, rows, exists_T)
    return _Rows(offset + first, offset + row_T, exists_T, segments_T)


def _keys(plan: _Plan, refs: _Operands, block: jax.Array, rows: Any, masked: bool) -> _Rows:
    """Block `block` of the keys; a key exists if length, padding, causality and window leave it to any query."""
    start = block * plan.tile.keys
    index_S = start + jnp.arange(plan.tile.keys, dtype=jnp.int32)
    if not masked:
        return _Rows(start, index_S, None, None)
    exists_S = index_S < refs.limits_B2[1]
    if plan.causal:
        exists_S &= index_S < refs.limits_B2[0] + plan.num_queries
    if refs.window_1 is not None:
        exists_S &= (refs.limits_B2[0] - index_S < refs.window_1[0]) | (refs.window_1[0] <= 0)
    segments_S = _segments(refs.key_segments_BS, rows, exists_S)
    return _Rows(start, index_S, exists_S if segments_S is None else exists_S & (segments_S != 0), segments_S)


def _segments(ref: Any, rows: Any, exists: jax.Array) -> jax.Array | None:
    return None if ref is None else plgpu.load(ref.at[rows], mask=exists, other=0)


def _seen(plan: _Plan, refs: _Operands, queries: _Rows, keys: _Rows, query_axis: int) -> jax.Array:
    """Bool, the pairs of a tile that are visible, the queries along `query_axis`."""

    def along(axis: int, x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.expand_dims(x, 1 - axis)

    return visible(
        jnp.expand_dims(queries.position, 1 - query_axis),
        jnp.expand_dims(keys.position, query_axis),
        refs.limits_B2[1],
        causal=plan.causal,
        window=None if refs.window_1 is None else refs.window_1[0],
        query_segments=along(query_axis, queries.segments),
        key_segments=along(1 - query_axis, keys.segments),
    )


def _add_bias(scores: jax.Array, slope: jax.Array | None, queries: _Rows, keys: _Rows, query_axis: int) -> jax.Array:
    """ALiBi; the distance is not split into a term per query and one per key, which would round.

    It is taken between places relative to the program's own block: int32 until then, and exact in float32 below 2**24.
    """
    if slope is None:
        return scores
    origin = (queries, keys)[query_axis].start
    query = jnp.expand_dims((queries.position - origin).astype(jnp.float32), 1 - query_axis)
    key = jnp.expand_dims((keys.position - origin).astype(jnp.float32), query_axis)
    return scores + slope * (key - query)


def _zeros(plan: _Plan, rows: int) -> Parts:
    return tuple(jnp.zeros((rows, size), jnp.float32) for _, size in plan.parts)


def _load(plan: _Plan, ref: Any, where: tuple[Any, ...], exists: jax.Array | None) -> Parts:
    """The rows of a matrix at `where`, zero where they do not exist."""
    mask, other = (None, None) if exists is None else (exists[:, None], 0.0)
    return tuple(plgpu.load(ref.at[*where, pl.ds(*part)], mask=mask, other=other) for part in plan.parts)


def _store(plan: _Plan, ref: Any, values: Parts, inside: jax.Array | None) -> None:
    mask = None if inside is None else inside[:, None]
    for part, value in zip(plan.parts, values, strict=True):
        plgpu.store(ref.at[:, pl.ds(*part)], value.astype(ref.dtype), mask=mask)


def _scores(left: Parts, right: Parts) -> jax.Array:
    """left @ right^T, float32."""
    return sum(plgpu.dot(a, b, trans_b=True) for a, b in zip(left, right, strict=True))


def _add_product(sums: Parts, weights: jax.Array, right: Parts) -> Parts:
    """sums + weights @ right, float32; the weights are rounded to the dtype of `right`."""
    weights = weights.astype(right[0].dtype)
    return tuple(part + plgpu.dot(weights, b) for part, b in zip(sums, right, strict=True))
