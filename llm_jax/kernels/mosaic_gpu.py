"""Fused attention for Hopper GPUs (sm_90): Pallas kernels on Mosaic GPU, with wgmma and TMA, forward and backward.

One warpgroup of a program copies and two multiply (`warpgroups`). The mathematics is that of `pallas_gpu`: an online
softmax that saves the log-sum-exp of each row, and a backward pass that recomputes the weights of a tile from it, once
for the queries and once for keys and values, so that no two programs add to one place. (Dao, "FlashAttention-2",
algorithms 1 and 2; the roles of the warpgroups: Shah and others, "FlashAttention-3", section 3.1.)

The TMA reads zeros beyond the end of an array and writes nothing there, so lengths need not divide by the blocks; they
divide by 8, as Mosaic cuts no tile of 8 rows in shared memory. As tiles go from there to the tensor cores without
passing through registers, rows that take no part are zeroed before the kernels, where XLA merges it with what made
them; under plain causality or a window there are none. Softmax is computed in base 2: the saved log-sum-exp is in base
2 as well.

Interpretation runs the same bodies on JAX's model of the copies and barriers. What only the hardware does (layouts,
fences, the order of asynchronous instructions) it does not show.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, G query heads per key/value head,
H head dim, X query blocks, Y key blocks. Inside a kernel T and S are the sizes of a consumer's tile.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llm_jax.errors import require
from llm_jax.kernels.choice import Problem, check_supported, unsupported
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.ranges import Ranges, key_ranges, query_ranges
from llm_jax.kernels.reference import HIDDEN, LOWEST
from llm_jax.kernels.tile import visible
from llm_jax.kernels.warpgroups import (
    CONSUMERS,
    Kept,
    Product,
    Ring,
    as_consumer,
    as_producer,
    interpreter,
    kept,
    multiply,
    ring,
    send,
    store,
)

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
TILE_ROWS = 8  # of a matrix in shared memory
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
MISCOMPILED = (12080, 12091)  # from this CUDA on and before that one; JAX's own kernel refuses them too


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
    def matrix(self) -> tuple[int, Any]:
        """Row size and dtype of what passes through shared memory."""
        return self.head_dim, self.dtype

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


def refuses(problem: Problem) -> str | None:
    """Why these kernels cannot serve a problem, or None."""
    if not any(name in problem.device_kind for name in HOPPER):
        return f"it runs on Hopper GPUs ({', '.join(HOPPER)}), not on {problem.device_kind}"
    if MISCOMPILED[0] <= cuda_version() < MISCOMPILED[1]:
        return (
            f"JAX's CUDA is {cuda_version()}, and from 12.8 to 12.9 its compiler makes wrong programs of such kernels"
        )
    unserved = unsupported(problem.dtype, problem.head_dim, DTYPES, HEAD_DIMS)
    return unserved or _uneven(problem.num_queries, problem.num_keys)


def cuda_version() -> int:
    """Of the CUDA that JAX runs on, such as 13000 for 13.0; 0 where there is none."""
    from jax._src.lib import cuda_versions

    return 0 if cuda_versions is None else int(cuda_versions.cuda_runtime_get_version())


def _uneven(num_queries: int, num_keys: int) -> str | None:
    if num_queries % TILE_ROWS or num_keys % TILE_ROWS:
        return f"its lengths are multiples of {TILE_ROWS}, not {num_queries} queries and {num_keys} keys: pad them"
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
      q_BTNH: bfloat16 or float16; head dim 64 or 128; T and S are multiples of 8.
      k_BSKH: of q's dtype; query head n reads key/value head n // (N / K).
      v_BSKH: like `k_BSKH`.
      mask: the rules.
      blocks: tile sizes; by default those of `BLOCKS`. What a program keeps (queries of `forward` and
        `query_gradients`, keys of `key_gradients`) is a multiple of 128, what it walks over a multiple of 64.
      interpret: run the kernels' bodies on JAX's model of the hardware, on a CPU.

    Raises `UserError` for another dtype, head dim or length.
    """
    check_supported("'mosaic_gpu'", (q_BTNH, k_BSKH, v_BSKH), DTYPES, HEAD_DIMS)
    reason = _uneven(q_BTNH.shape[1], k_BSKH.shape[1])
    require(reason is None, f"attention: 'mosaic_gpu' cannot serve this call: {reason}")
    blocks = BLOCKS[q_BTNH.shape[3]] if blocks is None else blocks
    _check_blocks(blocks)
    k_BSKH, v_BSKH = mask.clean_keys(q_BTNH.shape[1], k_BSKH, v_BSKH)
    return _attention((blocks, interpret), mask.scale_queries(q_BTNH), k_BSKH, v_BSKH, mask)


def _check_blocks(blocks: Blocks) -> None:
    kept = (blocks.forward.queries, blocks.key_gradients.keys, blocks.query_gradients.queries)
    walked = (blocks.forward.keys, blocks.key_gradients.queries, blocks.query_gradients.keys)
    fits = all(size % 128 == 0 for size in kept) and all(size % 64 == 0 for size in walked)
    require(fits, f"attention: Hopper blocks keep a multiple of 128 rows and walk over a multiple of 64, not {blocks}")


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
    padded_lse = jax.ShapeDtypeStruct((B, N, X * plan.tile.queries), jnp.float32)
    lse_smem = plgpu.SMEM((CONSUMERS, plan.tile.queries // CONSUMERS), jnp.float32)
    scratch = (*_scratch_by_queries(plan, operands, matrices=1, statistics=0), lse_smem)
    out_BTNH, lse_BNT = _call(attention_forward, plan, (X, N, B), operands, (_like(q_BTNH), padded_lse), scratch)
    out_BTNH = checkpoint_name(out_BTNH, "attention_out")
    lse_BNT = checkpoint_name(lse_BNT[:, :, :T], "attention_lse")
    return out_BTNH, _Residuals(q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, lse_BNT)


def _backward(
    options: tuple[Blocks, bool], residuals: _Residuals, dout_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    blocks, interpret = options
    q, k, v, mask, out_BTNH, lse_BNT = residuals
    (B, T, N, _), (_, S, K, _) = q.shape, k.shape
    if T > S or mask.visible_keys(T, S) is not None:
        # A query that sees nothing, and its output's gradient, may be NaN: 0 * NaN must not reach a key.
        sees_BTN1 = (lse_BNT < jnp.inf).transpose(0, 2, 1)[..., None]
        q, dout_BTNH = jnp.where(sees_BTN1, q, 0), jnp.where(sees_BTN1, dout_BTNH, 0)
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
    scratch = _scratch_by_queries(plan, refs, matrices=2, statistics=2)
    (dq_BTNH,) = _call(attention_query_gradients, plan, grid, refs, (_like(q),), scratch)
    plan = _plan(blocks.key_gradients, q, k, mask, interpret)
    refs = operands(plan, query_ranges)
    grid = (pl.cdiv(S, plan.tile.keys), K, B)
    scratch = _scratch_by_keys(plan, refs)
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
        interpret=interpreter() if plan.interpret else None,
        kernel_name=kernel.__name__,
    )(*used)
    return tuple(x[:, : shape[1]] for x, shape in zip(results, shapes, strict=True))


def _whole_blocks(plan: _Plan, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix per head with its rows filled up: interpretation copies nothing across an end."""
    if len(shape) != 4:
        return shape
    return (shape[0], shape[1] + -shape[1] % math.lcm(plan.tile.queries, plan.tile.keys), *shape[2:])


def _scratch_by_queries(plan: _Plan, operands: _Operands, matrices: int, statistics: int) -> tuple[Any, ...]:
    """Of a program that keeps queries and walks over keys and values."""
    segments, (matrix, stages, rows) = _segment_dtypes(operands), (plan.matrix, plan.tile.stages, plan.tile.keys)
    own = kept(plan.tile.queries, [matrix] * matrices, [jnp.float32] * statistics + segments)
    return own, ring(stages, rows, [matrix], segments), ring(stages, rows, [matrix], [])


def _scratch_by_keys(plan: _Plan, operands: _Operands) -> tuple[Any, ...]:
    """Of a program that keeps keys and values and walks over queries and output gradients."""
    segments, (matrix, stages, rows) = _segment_dtypes(operands), (plan.matrix, plan.tile.stages, plan.tile.queries)
    own = kept(plan.tile.keys, [matrix] * 2, segments)
    return own, ring(stages, rows, [matrix], [jnp.float32, *segments]), ring(stages, rows, [matrix], [jnp.float32])


def _segment_dtypes(operands: _Operands) -> list[Any]:
    return [] if operands.query_segments_BT is None else [jnp.int32]


# The kernels.


def attention_forward(
    plan: _Plan, refs: _Operands, out_ref: Any, lse_ref: Any, own: Kept, keys: Ring, values: Ring, lse_smem: Any
) -> None:
    """Output and base-2 log-sum-exp of one block of queries of one head; inf for a query that sees nothing."""
    place, product = _queries_place(plan, refs), functools.partial(multiply, interpret=plan.interpret)
    as_producer(functools.partial(_send_keys, plan, refs, place, keys, values))

    @as_consumer
    def _(consumer: jax.Array) -> None:
        queries = place.block * plan.tile.queries + consumer * (plan.tile.queries // CONSUMERS)
        rows = pl.ds(queries, plan.tile.queries // CONSUMERS)
        q_smem, *segments = own.load(
            consumer, [refs.q_BTNH.at[place.batch, rows, place.head], *_segments(refs.query_segments_BT, place, rows)]
        )
        segments_T, slope = _loaded(segments), _slope(refs, place.head)
        first_query = refs.limits_B3[place.batch, 0] + queries

        def tile(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out_TH, highest_T, sums_T = carry
            block = place.first + step
            full = _full(refs, place, block)
            k_smem, *segments = keys.receive(step)
            (scores_TS,) = product(Product(q_smem, k_smem, transpose=True))
            pairs = _Pairs(first_query, block * plan.tile.keys, 0, segments_T, _loaded(segments))
            scores_TS = _masked(plan, refs, place, slope, full, pairs, scores_TS)
            keys.release(step)
            new_highest_T = jnp.maximum(highest_T, jnp.max(scores_TS, axis=1) * plan.log2_scale)
            weights_TS = jnp.exp2(scores_TS * plan.log2_scale - _along(0, new_highest_T, scores_TS))
            shrink_T = jnp.exp2(highest_T - new_highest_T)
            sums_T = sums_T * shrink_T + jnp.sum(weights_TS, axis=1)
            out_TH = out_TH * _along(0, shrink_T, out_TH)
            (v_smem,) = values.receive(step)
            (out_TH,) = product(Product(weights_TS.astype(plan.dtype), v_smem, sums=out_TH))
            values.release(step)
            return out_TH, new_highest_T, sums_T

        start_T = jnp.zeros((plan.tile.queries // CONSUMERS,), jnp.float32)
        first = (jnp.zeros(q_smem.shape, jnp.float32), start_T + LOWEST, start_T)
        out_TH, highest_T, sums_T = jax.lax.fori_loop(0, place.steps, tile, first)
        sees_T = sums_T > 0.0
        sums_T = jnp.where(sees_T, sums_T, 1.0)
        q_smem[...] = (out_TH / _along(0, sums_T, out_TH)).astype(plan.dtype)  # in place of the queries, now used up
        lse_smem[consumer] = jnp.where(sees_T, highest_T + jnp.log2(sums_T), jnp.inf)
        store(
            (q_smem, out_ref.at[place.batch, rows, place.head]),
            (lse_smem.at[consumer], lse_ref.at[place.batch, place.head, rows]),
        )


def attention_query_gradients(plan: _Plan, refs: _Operands, dq_ref: Any, own: Kept, keys: Ring, values: Ring) -> None:
    """Gradient of one block of queries of one head."""
    place, product = _queries_place(plan, refs), functools.partial(multiply, interpret=plan.interpret)
    as_producer(functools.partial(_send_keys, plan, refs, place, keys, values))

    @as_consumer
    def _(consumer: jax.Array) -> None:
        queries = place.block * plan.tile.queries + consumer * (plan.tile.queries // CONSUMERS)
        rows = pl.ds(queries, plan.tile.queries // CONSUMERS)
        matrices = [ref.at[place.batch, rows, place.head] for ref in (refs.q_BTNH, refs.dout_BTNH)]
        statistics = [ref.at[place.batch, place.head, rows] for ref in (refs.lse_BNT, refs.delta_BNT)]
        ids = _segments(refs.query_segments_BT, place, rows)
        q_smem, dout_smem, lse_smem, delta_smem, *segments = own.load(consumer, [*matrices, *statistics, *ids])
        lse_T, delta_T, segments_T = lse_smem[...], delta_smem[...], _loaded(segments)
        slope, first_query = _slope(refs, place.head), refs.limits_B3[place.batch, 0] + queries

        def tile(step: jax.Array, dq_TH: jax.Array) -> jax.Array:
            block = place.first + step
            full = _full(refs, place, block)
            k_smem, *segments = keys.receive(step)
            (v_smem,) = values.receive(step)
            scores_TS, dweights_TS = product(
                Product(q_smem, k_smem, transpose=True), Product(dout_smem, v_smem, transpose=True)
            )
            values.release(step)
            pairs = _Pairs(first_query, block * plan.tile.keys, 0, segments_T, _loaded(segments))
            scores_TS = _masked(plan, refs, place, slope, full, pairs, scores_TS)
            weights_TS = jnp.exp2(scores_TS * plan.log2_scale - _along(0, lse_T, scores_TS))
            dscores_TS = weights_TS * (dweights_TS - _along(0, delta_T, scores_TS))
            (dq_TH,) = product(Product(dscores_TS.astype(plan.dtype), k_smem, sums=dq_TH))
            keys.release(step)
            return dq_TH

        dq_TH = jax.lax.fori_loop(0, place.steps, tile, jnp.zeros(q_smem.shape, jnp.float32))
        q_smem[...] = (dq_TH * plan.scale).astype(plan.dtype)
        store((q_smem, dq_ref.at[place.batch, rows, place.head]))


def attention_key_gradients(
    plan: _Plan, refs: _Operands, dk_ref: Any, dv_ref: Any, own: Kept, queries: Ring, douts: Ring
) -> None:
    """Gradients of one block of keys and values of one head, from all its query heads; scores are transposed, [S,T]."""
    place, product = _place(refs, jax.lax.axis_index("block")), functools.partial(multiply, interpret=plan.interpret)
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
        q, dout = (ref.at[place.batch, rows, head] for ref in (refs.q_BTNH, refs.dout_BTNH))
        lse, delta = (ref.at[place.batch, head, rows] for ref in (refs.lse_BNT, refs.delta_BNT))
        return [q, lse, *_segments(refs.query_segments_BT, place, rows)], [dout, delta]

    as_producer(functools.partial(send, steps, (queries, douts), sources))

    @as_consumer
    def _(consumer: jax.Array) -> None:
        keys = place.block * plan.tile.keys + consumer * (plan.tile.keys // CONSUMERS)
        rows = pl.ds(keys, plan.tile.keys // CONSUMERS)
        matrices = [ref.at[place.batch, rows, place.head] for ref in (refs.k_BSKH, refs.v_BSKH)]
        k_smem, v_smem, *segments = own.load(consumer, [*matrices, *_segments(refs.key_segments_BS, place, rows)])
        segments_S = _loaded(segments)

        def tile(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            dk_SH, dv_SH = carry
            # What follows from the place is read anew, and not kept in registers, of which there are none to spare.
            head, block = at(_place(refs, place.block), step)
            full, slope, offset = _full(refs, place, block), _slope(refs, head), refs.limits_B3[place.batch, 0]
            q_smem, lse_smem, *segments = queries.receive(step)
            (scores_ST,) = product(Product(k_smem, q_smem, transpose=True))
            pairs = _Pairs(offset + block * plan.tile.queries, keys, 1, _loaded(segments), segments_S)
            scores_ST = _masked(plan, refs, place, slope, full, pairs, scores_ST)
            weights_ST = jnp.exp2(scores_ST * plan.log2_scale - _along(1, lse_smem[...], scores_ST))
            dout_smem, delta_smem = douts.receive(step)
            dv_SH, dweights_ST = product(
                Product(weights_ST.astype(plan.dtype), dout_smem, sums=dv_SH),
                Product(v_smem, dout_smem, transpose=True),
            )
            dscores_ST = weights_ST * (dweights_ST - _along(1, delta_smem[...], scores_ST))
            douts.release(step)
            (dk_SH,) = product(Product(dscores_ST.astype(plan.dtype), q_smem, sums=dk_SH))
            queries.release(step)
            return dk_SH, dv_SH

        zeros = jnp.zeros(k_smem.shape, jnp.float32)
        dk_SH, dv_SH = jax.lax.fori_loop(0, steps, tile, (zeros, zeros))
        k_smem[...] = (dk_SH * plan.scale).astype(plan.dtype)
        v_smem[...] = dv_SH.astype(plan.dtype)
        store(*((smem, ref.at[place.batch, rows, place.head]) for smem, ref in ((k_smem, dk_ref), (v_smem, dv_ref))))


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


def _send_keys(plan: _Plan, refs: _Operands, place: _Place, keys: Ring, values: Ring) -> None:
    kv = jax.lax.div(place.head, jnp.int32(plan.group))

    def sources(step: jax.Array) -> tuple[list[Any], list[Any]]:
        rows = pl.ds((place.first + step) * plan.tile.keys, plan.tile.keys)
        k, v = (ref.at[place.batch, rows, kv] for ref in (refs.k_BSKH, refs.v_BSKH))
        return [k, *_segments(refs.key_segments_BS, place, rows)], [v]

    send(place.steps, (keys, values), sources)


def _segments(ids: Any, place: _Place, rows: Any) -> list[Any]:
    return [] if ids is None else [ids.at[place.batch, rows]]


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
    key = _along(1 - axis, pairs.first_key + jax.lax.iota(jnp.int32, scores.shape[1 - axis]), scores)
    query = key  # where nothing looks at it: Mosaic finds no layout for a value without a use
    if slope is not None or plan.causal or plan.windowed:
        query = _along(axis, pairs.first_query + jax.lax.iota(jnp.int32, scores.shape[axis]), scores)
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


def _along(axis: int, x: jax.Array, like: jax.Array) -> jax.Array:
    """A vector that lies along `axis` of a matrix, repeated over the other axis."""
    return jax.lax.broadcast_in_dim(x, like.shape, [axis])
