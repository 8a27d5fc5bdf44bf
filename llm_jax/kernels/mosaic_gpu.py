"""Fused attention for Hopper GPUs (sm_90): Pallas kernels on Mosaic GPU, with wgmma and TMA, forward and backward.

A program is three warpgroups. The producer copies blocks of the sequence that the program walks over from global to
shared memory (TMA), as far ahead as there are buffers; the two consumers each hold half of the program's own block and
multiply on the tensor cores (wgmma). Barriers say when a buffer is full and when both consumers are done with it. The
mathematics is that of `pallas_gpu`: an online softmax that saves the log-sum-exp of each row, and a backward pass that
recomputes the weights of a tile from it, once for the queries and once for keys and values, so that no two programs
add to one place. (Dao, "FlashAttention-2", algorithms 1 and 2; the roles of the warpgroups: Shah and others,
"FlashAttention-3", section 3.1.)

The TMA reads zeros beyond the end of an array and writes nothing there, so lengths need not divide by the blocks. As
tiles go from shared memory to the tensor cores without passing through registers, rows that are padding are zeroed
before the kernels, where XLA merges it with what made them; without segment ids, lengths or an offset there are none.
Softmax is computed in base 2: the saved log-sum-exp is in base 2 as well.

Interpretation runs the same bodies on JAX's model of the copies and barriers, save that it has no wgmma of registers
or of a transposed operand: `_multiply` is a plain product there. What only the hardware does (layouts, fences, the
order of asynchronous instructions) it does not show.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, G query heads per key/value head,
H head dim, X query blocks, Y key blocks. Inside a kernel T and S are the sizes of a consumer's tile.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llm_jax.errors import require
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.ranges import Ranges, key_ranges, query_ranges
from llm_jax.kernels.reference import HIDDEN, LOWEST
from llm_jax.kernels.tile import visible

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
CONSUMERS = 2  # warpgroups that multiply; one more, the last, copies
REGISTERS = (240, 24)  # per thread of a consumer and of the producer


class Pass(NamedTuple):
    """A program's tile of the score matrix, and how many blocks of the other side shared memory holds at once."""

    queries: int
    keys: int
    stages: int


class Blocks(NamedTuple):
    """One `Pass` for each kernel."""

    forward: Pass
    key_gradients: Pass
    query_gradients: Pass


# By head dim.
BLOCKS = {
    64: Blocks(Pass(128, 128, 2), Pass(64, 128, 2), Pass(128, 128, 2)),
    128: Blocks(Pass(128, 128, 2), Pass(64, 128, 2), Pass(128, 64, 2)),
}


class _Plan(NamedTuple):
    """What a kernel knows when it is compiled."""

    tile: Pass
    num_queries: int
    num_keys: int
    group: int
    head_dim: int
    dtype: Any
    causal: bool
    windowed: bool
    interpret: bool

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def log2_scale(self) -> float:
        """From a product of a query and a key to the exponent of 2."""
        return self.scale * math.log2(math.e)


class _Operands(NamedTuple):
    """What a kernel reads, in global memory. None where the call has no such rule."""

    q_BTNH: Any
    k_BSKH: Any
    v_BSKH: Any
    ranges_BX4: Any  # int32, the fields of `Ranges`; [B,Y,4] where a program has a block of keys
    limits_B3: Any  # int32: the index of the first query, the number of keys, the window
    slopes_N: Any  # float32, times sqrt(H): they are added before the scores are scaled
    query_segments_BT: Any  # int32, like the rest padded to whole blocks
    key_segments_BS: Any
    dout_BTNH: Any = None
    lse_BNT: Any = None  # float32, inf beyond the end
    delta_BNT: Any = None  # float32, what the softmax's normalisation takes from a row of the scores' gradient


def refuses(problem: Any) -> str | None:
    """Why these kernels cannot serve an `attention.Problem`, or None."""
    if problem.platform != "gpu":
        return f"it runs on NVIDIA GPUs, not on {problem.platform}"
    if not any(name in problem.device_kind for name in HOPPER):
        return f"it runs on Hopper GPUs ({', '.join(HOPPER)}), not on {problem.device_kind}"
    return _unsupported(problem.dtype, problem.head_dim)


def _unsupported(dtype: str, head_dim: int) -> str | None:
    if dtype not in DTYPES:
        return f"its dtypes are {', '.join(DTYPES)}, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"its head dims are {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None


def mosaic_gpu_attention(
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
      q_BTNH: bfloat16 or float16; head dim 64 or 128.
      k_BSKH: of q's dtype; query head n reads key/value head n // (N / K).
      v_BSKH: like `k_BSKH`.
      mask: the rules.
      blocks: tile sizes; by default those of `BLOCKS`. What a program keeps (queries of `forward` and
        `query_gradients`, keys of `key_gradients`) is a multiple of 128, what it walks over a multiple of 64.
      interpret: run the kernels' bodies on JAX's model of the hardware, on a CPU.

    Raises `UserError` for another dtype or head dim.
    """
    reason = _unsupported(str(q_BTNH.dtype), q_BTNH.shape[3])
    require(reason is None, f"attention: the Hopper kernels cannot serve this call: {reason}")
    require(
        q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype,
        f"attention: queries, keys and values are {q_BTNH.dtype}, {k_BSKH.dtype} and {v_BSKH.dtype}: cast them to one",
    )
    blocks = BLOCKS[q_BTNH.shape[3]] if blocks is None else blocks
    if mask.query_scale is not None:
        scale_BT11 = jax.lax.stop_gradient(mask.query_scale)[:, :, None, None]
        q_BTNH = (q_BTNH.astype(jnp.float32) * scale_BT11).astype(q_BTNH.dtype)
    visible_BS = mask.visible_keys(q_BTNH.shape[1], k_BSKH.shape[1])
    k_BSKH, v_BSKH = _zeroed(k_BSKH, visible_BS), _zeroed(v_BSKH, visible_BS)
    q_BTNH = _zeroed(q_BTNH, _real_queries(mask))
    return _attention((blocks, interpret), q_BTNH, k_BSKH, v_BSKH, mask)


def _zeroed(x_BTNH: jax.Array, keep_BT: jax.Array | None) -> jax.Array:
    return x_BTNH if keep_BT is None else jnp.where(keep_BT[:, :, None, None], x_BTNH, 0)


def _real_queries(mask: AttentionMask) -> jax.Array | None:
    return None if mask.query_segment_ids is None else mask.query_segment_ids != 0


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
    B, T, N, _ = q_BTNH.shape
    plan = _plan(options[0].forward, q_BTNH, k_BSKH, mask, options[1])
    operands = _operands(plan, q_BTNH, k_BSKH, v_BSKH, mask, key_ranges)
    X = pl.cdiv(T, plan.tile.queries)
    lse_BNT = jax.ShapeDtypeStruct((B, N, X * plan.tile.queries), jnp.float32)
    out_BTNH, lse_BNT = _call(
        attention_forward, plan, (X, N, B), operands, (_like(q_BTNH), lse_BNT), _forward_scratch(plan, operands)
    )
    out_BTNH = checkpoint_name(out_BTNH, "attention_out")
    lse_BNT = checkpoint_name(lse_BNT[:, :, :T], "attention_lse")
    return out_BTNH, _Residuals(q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, lse_BNT)


def _backward(
    options: tuple[Blocks, bool], residuals: _Residuals, dout_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    blocks, interpret = options
    q, k, v, mask, out_BTNH, lse_BNT = residuals
    (B, T, N, _), (_, S, K, _) = q.shape, k.shape
    dout_BTNH = _zeroed(dout_BTNH, _real_queries(mask))
    delta_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)

    def operands(plan: _Plan, ranges: Callable[..., Ranges]) -> _Operands:
        return _operands(plan, q, k, v, mask, ranges)._replace(
            dout_BTNH=dout_BTNH,
            lse_BNT=_padded(lse_BNT, plan.tile.queries, jnp.inf),
            delta_BNT=_padded(delta_BTN.transpose(0, 2, 1), plan.tile.queries, 0.0),
        )

    plan = _plan(blocks.query_gradients, q, k, mask, interpret)
    refs = operands(plan, key_ranges)
    grid = (pl.cdiv(T, plan.tile.queries), N, B)
    scratch = _query_gradients_scratch(plan, refs)
    (dq_BTNH,) = _call(attention_query_gradients, plan, grid, refs, (_like(q),), scratch)
    plan = _plan(blocks.key_gradients, q, k, mask, interpret)
    refs = operands(plan, query_ranges)
    grid = (pl.cdiv(S, plan.tile.keys), K, B)
    scratch = _key_gradients_scratch(plan, refs)
    dk_BSKH, dv_BSKH = _call(attention_key_gradients, plan, grid, refs, (_like(k), _like(v)), scratch)
    return dq_BTNH, dk_BSKH, dv_BSKH, None


_attention.defvjp(_forward, _backward)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _plan(tile: Pass, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask, interpret: bool) -> _Plan:
    (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    return _Plan(tile, T, S, N // K, H, q_BTNH.dtype, mask.causal, mask.window is not None, interpret)


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
    limits = (
        0 if mask.query_offset is None else mask.query_offset,
        S if mask.key_lengths is None else jnp.minimum(mask.key_lengths, S),
        0 if mask.window is None else mask.window,
    )
    return _Operands(
        q_BTNH=q_BTNH,
        k_BSKH=k_BSKH,
        v_BSKH=v_BSKH,
        ranges_BX4=jnp.broadcast_to(ranges_BX4, (B, *ranges_BX4.shape[1:])),
        limits_B3=jnp.stack([jnp.broadcast_to(jnp.asarray(limit, jnp.int32), (B,)) for limit in limits], axis=1),
        slopes_N=None if mask.slopes is None else mask.slopes.astype(jnp.float32) / plan.scale,
        query_segments_BT=_padded(mask.query_segment_ids, plan.tile.queries, 0),
        key_segments_BS=_padded(mask.key_segment_ids, plan.tile.keys, 0),
    )


def _padded(x: jax.Array | None, block: int, value: float) -> jax.Array | None:
    """Filled up with `value` along its last axis, to whole blocks."""
    if x is None:
        return None
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)], constant_values=value)


def _call(
    kernel: Callable[..., None],
    plan: _Plan,
    grid: tuple[int, int, int],
    operands: _Operands,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    scratch: tuple[Any, ...],
) -> tuple[jax.Array, ...]:
    """Run a kernel on a grid of (blocks, heads, batch)."""
    shapes = [output.shape for output in outputs]
    if plan.interpret:  # zeros as the TMA reads them beyond the end, and room for what it would drop there
        whole = functools.partial(_whole_blocks, plan)
        operands = jax.tree.map(
            lambda x: jnp.pad(x, [(0, b - a) for a, b in zip(x.shape, whole(x.shape), strict=True)]), operands
        )
        outputs = tuple(jax.ShapeDtypeStruct(whole(output.shape), output.dtype) for output in outputs)
    used, structure = jax.tree.flatten(operands)

    def body(*refs: Any) -> None:
        operand_refs = jax.tree.unflatten(structure, refs[: len(used)])
        kernel(plan, operand_refs, *refs[len(used) :])

    results = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=grid,
        grid_names=("block", "head", "batch"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=_interpreter() if plan.interpret else None,
        kernel_name=kernel.__name__,
    )(*used)
    return tuple(x[:, : shape[1]] for x, shape in zip(results, shapes, strict=True))


def _whole_blocks(plan: _Plan, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix per head with its rows filled up: interpretation copies nothing across an end."""
    if len(shape) != 4:
        return shape
    return (shape[0], shape[1] + -shape[1] % math.lcm(plan.tile.queries, plan.tile.keys), *shape[2:])


def _interpreter() -> Any:
    """JAX's model of the hardware, which has no public name yet; memory that nothing has written holds NaN."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


# Shared memory: what a program keeps, and what passes through.


class _Kept(NamedTuple):
    """A consumer's half of the program's own block, [CONSUMERS, rows, ...] each, and a barrier per consumer."""

    buffers: tuple[Any, ...]
    full: Any

    def load(self, consumer: jax.Array, sources: Sequence[Any]) -> tuple[Any, ...]:
        """The consumer's buffers, filled."""
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[consumer], self.full.at[consumer])
        plgpu.barrier_wait(self.full.at[consumer])
        return tuple(buffer.at[consumer] for buffer in self.buffers)


class _Ring(NamedTuple):
    """Blocks on their way from the producer to the consumers, [stages, rows, ...] each."""

    buffers: tuple[Any, ...]
    full: Any  # barriers, one per stage
    free: Any

    def send(self, stage: jax.Array, sources: Sequence[Any]) -> None:
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[stage], self.full.at[stage])

    def receive(self, stage: jax.Array) -> tuple[Any, ...]:
        plgpu.barrier_wait(self.full.at[stage])
        return tuple(buffer.at[stage] for buffer in self.buffers)

    def release(self, stage: jax.Array) -> None:
        plgpu.barrier_arrive(self.free.at[stage])


def _kept(rows: int, plan: _Plan, matrices: int, vectors: Sequence[Any]) -> _Kept:
    buffers = _buffers(CONSUMERS, rows // CONSUMERS, plan, matrices, vectors)
    return _Kept(buffers, plgpu.Barrier(num_arrivals=len(buffers), num_barriers=CONSUMERS))


def _ring(rows: int, plan: _Plan, vectors: Sequence[Any]) -> _Ring:
    buffers = _buffers(plan.tile.stages, rows, plan, 1, vectors)
    full = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=plan.tile.stages)
    return _Ring(buffers, full, plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.tile.stages))


def _buffers(copies: int, rows: int, plan: _Plan, matrices: int, vectors: Sequence[Any]) -> tuple[Any, ...]:
    matrix = plgpu.SMEM((copies, rows, plan.head_dim), plan.dtype)
    return (matrix,) * matrices + tuple(plgpu.SMEM((copies, rows), dtype) for dtype in vectors)


def _segment_dtypes(operands: _Operands) -> tuple[Any, ...]:
    return () if operands.query_segments_BT is None else (jnp.int32,)


def _forward_scratch(plan: _Plan, operands: _Operands) -> tuple[Any, ...]:
    segments = _segment_dtypes(operands)
    lse = plgpu.SMEM((CONSUMERS, plan.tile.queries // CONSUMERS), jnp.float32)
    return (
        _kept(plan.tile.queries, plan, 1, segments),
        _ring(plan.tile.keys, plan, segments),
        _ring(plan.tile.keys, plan, ()),
        lse,
    )


def _query_gradients_scratch(plan: _Plan, operands: _Operands) -> tuple[Any, ...]:
    segments = _segment_dtypes(operands)
    return (
        _kept(plan.tile.queries, plan, 2, (jnp.float32, jnp.float32, *segments)),
        _ring(plan.tile.keys, plan, segments),
        _ring(plan.tile.keys, plan, ()),
    )


def _key_gradients_scratch(plan: _Plan, operands: _Operands) -> tuple[Any, ...]:
    segments = _segment_dtypes(operands)
    return (
        _kept(plan.tile.keys, plan, 2, segments),
        _ring(plan.tile.queries, plan, (jnp.float32, *segments)),
        _ring(plan.tile.queries, plan, (jnp.float32,)),
    )


# The kernels.


def attention_forward(
    plan: _Plan, refs: _Operands, out_ref: Any, lse_ref: Any, kept: _Kept, keys: _Ring, values: _Ring, lse_smem: Any
) -> None:
    """Output and base-2 log-sum-exp of one block of queries of one head; inf for a query that sees nothing."""
    place = _queries_place(plan, refs)
    _as_producer(functools.partial(_send_keys, plan, refs, place, keys, values))

    @_as_consumer
    def _(consumer: jax.Array) -> None:
        queries = place.block * plan.tile.queries + consumer * (plan.tile.queries // CONSUMERS)
        rows = pl.ds(queries, plan.tile.queries // CONSUMERS)
        q_smem, *segments = kept.load(consumer, _query_sources(refs, place, rows, refs.q_BTNH))
        segments_T, slope = _loaded(segments), _slope(refs, place.head)
        first_query = refs.limits_B3[place.batch, 0] + queries

        def tile(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out_TH, highest_T, sums_T = carry
            stage, block = jax.lax.rem(step, jnp.int32(plan.tile.stages)), place.first + step
            full = _full(refs, place, block)
            k_smem, *segments = keys.receive(stage)
            (scores_TS,) = _multiply(plan, _Product(q_smem, k_smem, transpose=True))
            pairs = _Pairs(first_query, block * plan.tile.keys, 0, segments_T, _loaded(segments))
            scores_TS = _masked(plan, refs, place, slope, full, pairs, scores_TS)
            keys.release(stage)
            new_highest_T = jnp.maximum(highest_T, jnp.max(scores_TS, axis=1) * plan.log2_scale)
            weights_TS = jnp.exp2(scores_TS * plan.log2_scale - _along(0, new_highest_T, scores_TS))
            shrink_T = jnp.exp2(highest_T - new_highest_T)
            sums_T = sums_T * shrink_T + jnp.sum(weights_TS, axis=1)
            out_TH = out_TH * _along(0, shrink_T, out_TH)
            (v_smem,) = values.receive(stage)
            (out_TH,) = _multiply(plan, _Product(weights_TS.astype(plan.dtype), v_smem, sums=out_TH))
            values.release(stage)
            return out_TH, new_highest_T, sums_T

        start_T = jnp.zeros((plan.tile.queries // CONSUMERS,), jnp.float32)
        first = (jnp.zeros(q_smem.shape, jnp.float32), start_T + LOWEST, start_T)
        out_TH, highest_T, sums_T = jax.lax.fori_loop(0, place.steps, tile, first)
        sees_T = sums_T > 0.0
        sums_T = jnp.where(sees_T, sums_T, 1.0)
        q_smem[...] = (out_TH / _along(0, sums_T, out_TH)).astype(plan.dtype)  # in place of the queries, now used up
        lse_smem[consumer] = jnp.where(sees_T, highest_T + jnp.log2(sums_T), jnp.inf)
        _store(
            (q_smem, out_ref.at[place.batch, rows, place.head]),
            (lse_smem.at[consumer], lse_ref.at[place.batch, place.head, rows]),
        )


def attention_query_gradients(
    plan: _Plan, refs: _Operands, dq_ref: Any, kept: _Kept, keys: _Ring, values: _Ring
) -> None:
    """Gradient of one block of queries of one head."""
    place = _queries_place(plan, refs)
    _as_producer(functools.partial(_send_keys, plan, refs, place, keys, values))

    @_as_consumer
    def _(consumer: jax.Array) -> None:
        queries = place.block * plan.tile.queries + consumer * (plan.tile.queries // CONSUMERS)
        rows = pl.ds(queries, plan.tile.queries // CONSUMERS)
        statistics = [ref.at[place.batch, place.head, rows] for ref in (refs.lse_BNT, refs.delta_BNT)]
        dout = refs.dout_BTNH.at[place.batch, rows, place.head]
        q, *segments = _query_sources(refs, place, rows, refs.q_BTNH)
        q_smem, dout_smem, lse_smem, delta_smem, *segments = kept.load(consumer, [q, dout, *statistics, *segments])
        lse_T, delta_T, segments_T = lse_smem[...], delta_smem[...], _loaded(segments)
        slope, first_query = _slope(refs, place.head), refs.limits_B3[place.batch, 0] + queries

        def tile(step: jax.Array, dq_TH: jax.Array) -> jax.Array:
            stage, block = jax.lax.rem(step, jnp.int32(plan.tile.stages)), place.first + step
            full = _full(refs, place, block)
            k_smem, *segments = keys.receive(stage)
            (v_smem,) = values.receive(stage)
            scores_TS, dweights_TS = _multiply(
                plan, _Product(q_smem, k_smem, transpose=True), _Product(dout_smem, v_smem, transpose=True)
            )
            values.release(stage)
            pairs = _Pairs(first_query, block * plan.tile.keys, 0, segments_T, _loaded(segments))
            scores_TS = _masked(plan, refs, place, slope, full, pairs, scores_TS)
            weights_TS = jnp.exp2(scores_TS * plan.log2_scale - _along(0, lse_T, scores_TS))
            dscores_TS = weights_TS * (dweights_TS - _along(0, delta_T, scores_TS))
            (dq_TH,) = _multiply(plan, _Product(dscores_TS.astype(plan.dtype), k_smem, sums=dq_TH))
            keys.release(stage)
            return dq_TH

        dq_TH = jax.lax.fori_loop(0, place.steps, tile, jnp.zeros(q_smem.shape, jnp.float32))
        q_smem[...] = (dq_TH * plan.scale).astype(plan.dtype)
        _store((q_smem, dq_ref.at[place.batch, rows, place.head]))


def attention_key_gradients(
    plan: _Plan, refs: _Operands, dk_ref: Any, dv_ref: Any, kept: _Kept, queries: _Ring, douts: _Ring
) -> None:
    """Gradients of one block of keys and values of one head, from all its query heads; scores are transposed, [S,T]."""
    place = _place(refs, jax.lax.axis_index("block"))
    # The walk is over the blocks of the first query head of the group, then over those of the next one.
    steps = place.steps * plan.group

    def at(place: _Place, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The query head and the block of queries."""
        if plan.group == 1:
            return place.head, place.first + step
        return place.head * plan.group + jax.lax.div(step, place.steps), place.first + jax.lax.rem(step, place.steps)

    def sources(step: jax.Array) -> tuple[list[Any], list[Any]]:
        head, block = at(place, step)
        rows = pl.ds(block * plan.tile.queries, plan.tile.queries)
        q, *segments = _query_sources(refs, place._replace(head=head), rows, refs.q_BTNH)
        lse, delta = (ref.at[place.batch, head, rows] for ref in (refs.lse_BNT, refs.delta_BNT))
        return [q, lse, *segments], [refs.dout_BTNH.at[place.batch, rows, head], delta]

    _as_producer(functools.partial(_send, plan, steps, (queries, douts), sources))

    @_as_consumer
    def _(consumer: jax.Array) -> None:
        keys = place.block * plan.tile.keys + consumer * (plan.tile.keys // CONSUMERS)
        rows = pl.ds(keys, plan.tile.keys // CONSUMERS)
        own = [ref.at[place.batch, rows, place.head] for ref in (refs.k_BSKH, refs.v_BSKH)]
        segments = [] if refs.key_segments_BS is None else [refs.key_segments_BS.at[place.batch, rows]]
        k_smem, v_smem, *segments = kept.load(consumer, [*own, *segments])
        segments_S = _loaded(segments)

        def tile(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            dk_SH, dv_SH = carry
            stage = jax.lax.rem(step, jnp.int32(plan.tile.stages))
            # What follows from the place is read anew, and not kept in registers, of which there are none to spare.
            head, block = at(_place(refs, place.block), step)
            full, slope, offset = _full(refs, place, block), _slope(refs, head), refs.limits_B3[place.batch, 0]
            q_smem, lse_smem, *segments = queries.receive(stage)
            (scores_ST,) = _multiply(plan, _Product(k_smem, q_smem, transpose=True))
            pairs = _Pairs(offset + block * plan.tile.queries, keys, 1, _loaded(segments), segments_S)
            scores_ST = _masked(plan, refs, place, slope, full, pairs, scores_ST)
            weights_ST = jnp.exp2(scores_ST * plan.log2_scale - _along(1, lse_smem[...], scores_ST))
            dout_smem, delta_smem = douts.receive(stage)
            dv_SH, dweights_ST = _multiply(
                plan,
                _Product(weights_ST.astype(plan.dtype), dout_smem, sums=dv_SH),
                _Product(v_smem, dout_smem, transpose=True),
            )
            dscores_ST = weights_ST * (dweights_ST - _along(1, delta_smem[...], scores_ST))
            douts.release(stage)
            (dk_SH,) = _multiply(plan, _Product(dscores_ST.astype(plan.dtype), q_smem, sums=dk_SH))
            queries.release(stage)
            return dk_SH, dv_SH

        zeros = jnp.zeros(k_smem.shape, jnp.float32)
        dk_SH, dv_SH = jax.lax.fori_loop(0, steps, tile, (zeros, zeros))
        k_smem[...] = (dk_SH * plan.scale).astype(plan.dtype)
        v_smem[...] = dv_SH.astype(plan.dtype)
        _store(*((smem, ref.at[place.batch, rows, place.head]) for smem, ref in ((k_smem, dk_ref), (v_smem, dv_ref))))


# Their parts.


class _Place(NamedTuple):
    """Which block of which head a program has, and the blocks of the other side that it walks over."""

    block: jax.Array
    head: jax.Array
    batch: jax.Array
    first: jax.Array
    steps: jax.Array


def _place(refs: _Operands, block: jax.Array) -> _Place:
    head, batch = jax.lax.axis_index("head"), jax.lax.axis_index("batch")
    first, last = refs.ranges_BX4[batch, block, 0], refs.ranges_BX4[batch, block, 1]
    return _Place(block, head, batch, first, last - first)


def _queries_place(plan: _Plan, refs: _Operands) -> _Place:
    # The last block first: under causality it has the most keys to visit, and short programs fill the end best.
    blocks = pl.cdiv(plan.num_queries, plan.tile.queries)
    return _place(refs, blocks - 1 - jax.lax.axis_index("block"))


def _as_producer(body: Callable[[], None]) -> None:
    @pl.when(jax.lax.axis_index("warpgroup") == CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        body()


def _as_consumer(body: Callable[[jax.Array], None]) -> None:
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        body(warpgroup)


def _send_keys(plan: _Plan, refs: _Operands, place: _Place, keys: _Ring, values: _Ring) -> None:
    kv = jax.lax.div(place.head, jnp.int32(plan.group))

    def sources(step: jax.Array) -> tuple[list[Any], list[Any]]:
        rows = pl.ds((place.first + step) * plan.tile.keys, plan.tile.keys)
        segments = [] if refs.key_segments_BS is None else [refs.key_segments_BS.at[place.batch, rows]]
        return [refs.k_BSKH.at[place.batch, rows, kv], *segments], [refs.v_BSKH.at[place.batch, rows, kv]]

    _send(plan, place.steps, (keys, values), sources)


def _send(plan: _Plan, steps: jax.Array, rings: tuple[_Ring, ...], sources: Callable[..., Any]) -> None:
    """The producer's work: what `sources(step)` names goes into the rings."""

    def send(step: jax.Array, _: None) -> None:
        stage = jax.lax.rem(step, jnp.int32(plan.tile.stages))
        for ring, blocks in zip(rings, sources(step), strict=True):
            pl.when(step >= plan.tile.stages)(functools.partial(plgpu.barrier_wait, ring.free.at[stage]))
            ring.send(stage, blocks)

    jax.lax.fori_loop(0, steps, send, None)
    for stage in range(plan.tile.stages):  # stay until every block has been used
        for ring in rings:
            pl.when(steps > stage)(functools.partial(plgpu.barrier_wait, ring.free.at[stage]))


def _query_sources(refs: _Operands, place: _Place, rows: Any, x_BTNH: Any) -> list[Any]:
    """A block of rows of one head, and their segment ids if there are any."""
    segments = [] if refs.query_segments_BT is None else [refs.query_segments_BT.at[place.batch, rows]]
    return [x_BTNH.at[place.batch, rows, place.head], *segments]


def _loaded(segments: list[Any]) -> jax.Array | None:
    return segments[0][...] if segments else None


def _full(refs: _Operands, place: _Place, block: jax.Array) -> jax.Array:
    """Whether every pair of the tile with this block of the other side is visible."""
    ranges_4 = refs.ranges_BX4.at[place.batch, place.block]
    return (block >= ranges_4[2]) & (block < ranges_4[3])


def _slope(refs: _Operands, head: jax.Array) -> jax.Array | None:
    return None if refs.slopes_N is None else refs.slopes_N[head]


class _Pairs(NamedTuple):
    """The pairs of a tile: the indices of the first query and key, the axis of the queries, segment ids."""

    first_query: jax.Array
    first_key: jax.Array
    query_axis: int
    query_segments: jax.Array | None
    key_segments: jax.Array | None


def _masked(
    plan: _Plan,
    refs: _Operands,
    place: _Place,
    slope: jax.Array | None,
    full: jax.Array,
    pairs: _Pairs,
    scores: jax.Array,
) -> jax.Array:
    """Scores of a tile with ALiBi, HIDDEN where the query does not see the key unless the tile is `full`."""
    axis = pairs.query_axis
    # Vectors that are repeated: a matrix of indices would hold a register for each of its elements.
    query = _along(axis, pairs.first_query + jax.lax.iota(jnp.int32, scores.shape[axis]), scores)
    key = _along(1 - axis, pairs.first_key + jax.lax.iota(jnp.int32, scores.shape[1 - axis]), scores)
    if slope is not None:
        scores = scores + slope * (key - query).astype(jnp.float32)

    def hide(scores: jax.Array) -> jax.Array:
        seen = visible(
            query,
            key,
            refs.limits_B3[place.batch, 1],
            causal=plan.causal,
            window=refs.limits_B3[place.batch, 2] if plan.windowed else None,
            query_segments=None if pairs.query_segments is None else _along(axis, pairs.query_segments, scores),
            key_segments=None if pairs.key_segments is None else _along(1 - axis, pairs.key_segments, scores),
        )
        return jnp.where(seen, scores, HIDDEN)

    return jax.lax.cond(full, lambda scores: scores, hide, scores)


class _Product(NamedTuple):
    """sums + left @ right, or right^T; `left` may be in registers, `right` is in shared memory."""

    left: Any
    right: Any
    sums: jax.Array | None = None
    transpose: bool = False


def _multiply(plan: _Plan, *products: _Product) -> tuple[jax.Array, ...]:
    """Float32 results of the products, which run one after the other without waiting in between."""
    starts = tuple(_start(product) for product in products)
    if plan.interpret:
        return tuple(start + _plain_product(product) for start, product in zip(starts, products, strict=True))

    def run(sums: tuple[Any, ...]) -> None:
        for total, product in zip(sums, products, strict=True):
            right = plgpu.transpose_ref(product.right, (1, 0)) if product.transpose else product.right
            plgpu.wgmma(total, product.left, right)

    result: tuple[jax.Array, ...] = pl.run_state(run)(tuple(plgpu.ACC.init(start) for start in starts))
    return result


def _start(product: _Product) -> jax.Array:
    if product.sums is not None:
        return product.sums
    columns = product.right.shape[0 if product.transpose else 1]
    return jnp.zeros((product.left.shape[0], columns), jnp.float32)


def _plain_product(product: _Product) -> jax.Array:
    contracted = (((1,), (1 if product.transpose else 0,)), ((), ()))
    return jax.lax.dot_general(product.left[...], product.right[...], contracted, preferred_element_type=jnp.float32)


def _along(axis: int, x: jax.Array, like: jax.Array) -> jax.Array:
    """A vector that lies along `axis` of a matrix, repeated over the other axis."""
    return jax.lax.broadcast_in_dim(x, like.shape, [axis])


def _store(*copies: tuple[Any, Any]) -> None:
    """Shared to global memory."""
    plgpu.commit_smem()
    for source, target in copies:
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)
