"""Fused attention for TPUs in Pallas (Mosaic): forward, key/value gradients and query gradients, one kernel each.

The score matrix is walked in tiles; nothing of its size is ever stored. The forward pass keeps a running maximum, sum
and output per query block and saves the log-sum-exp; the two backward passes recompute the probabilities of a tile
from it. (Dao, "FlashAttention-2", algorithms 1 and 2, with the backward loop split in two so that each result has one
writer.) Which tiles there are is a list made before the kernel starts, from `ranges`: a grid as long as that list walks
over it, so that a tile without a visible pair costs nothing at all, and a tile with only visible pairs takes a branch
without a mask.

Softmax is computed in base 2, the exponential that the hardware has, and the saved log-sum-exp is in base 2 as well: to
change its base would round it again, and its error is one that all weights of the row share.

Layout. Mosaic tiles the last two dimensions, so the kernels work on [B,N,T,H]; the change of axes outside fuses into
whatever makes or takes the arrays. A value per query lies along the lanes in memory ([1,T], compact), and is turned
into a column, repeated over the lanes, where a kernel has the queries in rows. The key gradients' kernel works on
transposed tiles [S,T], so that it needs no columns and no transposed products.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, G query heads per key/value head,
H head dim, X query blocks, Y key blocks, L lanes. Inside a tile T and S are the tile's sizes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.errors import require
from llm_jax.kernels import ranges, tile
from llm_jax.kernels.choice import Problem, check_supported, unsupported
from llm_jax.kernels.chunked import Tile
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import HIDDEN, LOWEST

LANES = 128
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float32")
LOG2E = math.log2(math.e)

# A step of the grid is an int32: above four flags 13 bits for the inner block, above those 14 for the outer one.
_BEGINS, _ENDS, _VISITS, _FULL = 1, 2, 4, 8
_INNER, _OUTER = 4, 17
_MOST_BLOCKS = 2 ** (_OUTER - _INNER)
# The list of steps lies in scalar memory, 1 MiB on these chips, which the compiler wants a part of.
_LARGEST_LIST = 900 * 1024
_INSTEAD = "take shorter sequences, fewer rows on a device, or implementation='chunked'"


class Blocks(NamedTuple):
    """The tile of each pass; on a TPU the sizes are multiples of 128."""

    forward: Tile = Tile(512, 512)
    key_gradients: Tile = Tile(512, 512)
    query_gradients: Tile = Tile(512, 512)


# By head dim and bytes per number: all the same for now. Compiled for a TPU v5e, the bundles with products of a tile
# take 0.92 to 1.08 times the matrix units' own cycles at head dims 64, 128 and 256, in float32 at 256 as well. Tiles of
# 1024 x 512 take 4 % less at head dim 64, but 11 % more pairs lie in those that 4096 causal tokens visit.
BLOCKS = {(head_dim, size): Blocks() for head_dim in HEAD_DIMS for size in (2, 4)}


def refuses(problem: Problem) -> str | None:
    """Why these kernels cannot serve a problem, or None."""
    if problem.platform != "tpu":
        return f"it runs on TPUs, not on {problem.platform}"
    by_row = {"query_segment_ids", "key_lengths", "query_offset"} & set(problem.features)
    rows = problem.batch if by_row else 1
    if refusal := unsupported(problem.dtype, problem.head_dim, DTYPES, HEAD_DIMS):
        return refusal
    blocks = BLOCKS[problem.head_dim, jnp.dtype(problem.dtype).itemsize]
    return _too_long(rows, problem.num_queries, problem.num_keys, blocks)


def _too_long(rows: int, num_queries: int, num_keys: int, blocks: Blocks) -> str | None:
    sides = [(pl.cdiv(num_queries, size.queries), pl.cdiv(num_keys, size.keys)) for size in blocks]
    most = max(map(max, sides))
    if most > _MOST_BLOCKS:
        return f"{most} blocks of a sequence are more than the {_MOST_BLOCKS} that a step can name: {_INSTEAD}"
    tiles = max(map(math.prod, sides))
    if 4 * rows * tiles <= _LARGEST_LIST:
        return None
    return f"the list of {tiles} tiles for each of {rows} masks does not fit into scalar memory: {_INSTEAD}"


def tpu_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attention` by fused TPU kernels, [B,T,N,H] in q's dtype; every field of the mask is honoured.

    The output carries the checkpoint name "attention_out", the saved log-sum-exp (float32, base 2) "attention_lse".

    Args:
      q_BTNH: bfloat16 or float32, as are keys and values; head dim 32, 64, 96, 128, 192 or 256. Lengths need not
        divide by the blocks.
      k_BSKH: N is a multiple of K; keys are not repeated in memory.
      v_BSKH: of the keys' shape.
      mask: what is visible, the ALiBi slopes and the queries' scale.
      blocks: sizes of the tiles; by default those of `BLOCKS`.
      interpret: run on any platform, slowly; blocks may then be of any size.

    Raises `UserError` for another dtype or head dim, for lengths of more tiles than scalar memory can list, and for
    blocks that are not multiples of 128 unless interpreted.
    """
    check_supported("'pallas_tpu'", (q_BTNH, k_BSKH, v_BSKH), DTYPES, HEAD_DIMS)
    blocks = BLOCKS[q_BTNH.shape[3], q_BTNH.dtype.itemsize] if blocks is None else blocks
    for sizes in blocks:
        fits = interpret or all(size % LANES == 0 for size in sizes)
        require(fits, f"attention: blocks of 'pallas_tpu' must be multiples of {LANES}, not {tuple(sizes)}")
    plan = _plan(q_BTNH, k_BSKH, mask, blocks, interpret)
    refusal = _too_long(plan.batch if plan.by_row else 1, plan.queries, plan.keys, plan.blocks)
    require(refusal is None, f"attention: 'pallas_tpu' cannot serve this call: {refusal}")
    return _attention(plan, mask.scale_queries(q_BTNH), k_BSKH, v_BSKH, mask)


class _Plan(NamedTuple):
    """What the kernels know when they are compiled."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    windowed: bool
    biased: bool
    by_row: bool  # the tiles differ from one row of the batch to the next
    blocks: Blocks
    interpret: bool

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def lanes(self, size: Tile) -> int:
        """Of a column of values: a register's, or fewer where a tile is narrower (interpretation only)."""
        return math.gcd(LANES, *size)

    @property
    def scale(self) -> float:
        """Of the products, so that a power of two takes the place of the exponential."""
        return LOG2E / math.sqrt(self.head_dim)


def _plan(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask, blocks: Blocks, interpret: bool) -> _Plan:
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    rows = (mask.query_segment_ids, mask.key_lengths, mask.query_offset)
    fitted = Blocks(*(Tile(_fitted(size.queries, T), _fitted(size.keys, S)) for size in blocks))
    return _Plan(
        batch=B,
        queries=T,
        keys=S,
        heads=N,
        kv_heads=K,
        head_dim=H,
        causal=mask.causal,
        windowed=mask.window is not None,
        biased=mask.slopes is not None,
        by_row=any(row is not None and jnp.ndim(row) > 0 for row in rows),
        blocks=fitted,
        interpret=interpret,
    )


def _fitted(size: int, length: int) -> int:
    """No block is longer than the sequence needs it to be."""
    return min(size, LANES * pl.cdiv(length, LANES))


class _Residuals(NamedTuple):
    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    mask: AttentionMask
    out_BTNH: jax.Array
    lse_BN1T: jax.Array  # base 2; padded to whole blocks of the forward pass


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask) -> jax.Array:
    return _forward(plan, q_BTNH, k_BSKH, v_BSKH, mask)[0]


def _forward(
    plan: _Plan, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, _Residuals]:
    size = plan.blocks.forward
    k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in mask.clean_keys(plan.queries, k_BSKH, v_BSKH))
    q_BNTH = q_BTNH.swapaxes(1, 2)
    inputs = {"q": q_BNTH, "k": k_BKSH, "v": v_BKSH}
    row = (plan.batch, plan.heads, 1, _whole(plan.queries, size.queries))
    outputs = {"out": _like(q_BNTH), "lse": jax.ShapeDtypeStruct(row, jnp.float32)}
    statistic, out = (size.queries, plan.lanes(size)), (size.queries, plan.head_dim)
    results = _call(plan, _forward_kernel, size, mask, inputs, outputs, [statistic, statistic, out])
    out_BTNH = checkpoint_name(results["out"].swapaxes(1, 2), "attention_out")
    lse_BN1T = checkpoint_name(results["lse"], "attention_lse")
    return out_BTNH, _Residuals(q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, lse_BN1T)


def _backward(plan: _Plan, residuals: _Residuals, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, lse_BN1T = residuals
    k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in mask.clean_keys(plan.queries, k_BSKH, v_BSKH))
    q_BNTH, dout_BNTH = _clean_queries(plan, q_BTNH, dout_BTNH, mask, lse_BN1T)
    out_BNTH = out_BTNH.swapaxes(1, 2)
    delta_BN1T = jnp.sum(dout_BNTH.astype(jnp.float32) * out_BNTH.astype(jnp.float32), axis=3)[:, :, None]
    inputs = {"q": q_BNTH, "k": k_BKSH, "v": v_BKSH, "dout": dout_BNTH}
    inputs |= {"lse": _row(plan, lse_BN1T), "delta": _row(plan, delta_BN1T)}

    size = plan.blocks.key_gradients
    outputs, gradient = {"dk": _like(k_BKSH), "dv": _like(v_BKSH)}, (size.keys, plan.head_dim)
    dkv = _call(plan, _key_gradients_kernel, size, mask, inputs, outputs, [gradient, gradient], by_keys=True)

    size = plan.blocks.query_gradients
    statistic, gradient = (size.queries, plan.lanes(size)), (size.queries, plan.head_dim)
    scratch = [statistic, statistic, gradient]
    dq = _call(plan, _query_gradients_kernel, size, mask, inputs, {"dq": _like(q_BNTH)}, scratch)
    return dq["dq"].swapaxes(1, 2), dkv["dk"].swapaxes(1, 2), dkv["dv"].swapaxes(1, 2), None


_attention.defvjp(_forward, _backward)


def _clean_queries(
    plan: _Plan, q_BTNH: jax.Array, dout_BTNH: jax.Array, mask: AttentionMask, lse_BN1T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """[B,N,T,H], zero where a query saw nothing: a weight of 0 times NaN would otherwise reach a key's gradient."""
    q_BNTH, dout_BNTH = q_BTNH.swapaxes(1, 2), dout_BTNH.swapaxes(1, 2)
    fields = (mask.window, mask.query_segment_ids, mask.query_offset, mask.key_lengths)
    if all(field is None for field in fields):
        return q_BNTH, dout_BNTH
    saw_BNT1 = lse_BN1T[:, :, 0, : plan.queries, None] > LOWEST / 2
    return jnp.where(saw_BNT1, q_BNTH, 0), jnp.where(saw_BNT1, dout_BNTH, 0)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _whole(length: int, block: int) -> int:
    return block * pl.cdiv(length, block)


def _pad(row: jax.Array, length: int) -> jax.Array:
    """Cut or padded with zeros to a length along the last axis."""
    row = row[..., :length]
    return jnp.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, length - row.shape[-1])])


def _row(plan: _Plan, row_BN1T: jax.Array) -> jax.Array:
    """A value per query, as long as the blocks of either backward pass are together."""
    sizes = (plan.blocks.key_gradients.queries, plan.blocks.query_gradients.queries)
    return _pad(row_BN1T, max(_whole(plan.queries, size) for size in sizes))


class _Scalars(NamedTuple):
    """What the kernels and their index maps read from scalar memory."""

    steps: jax.Array  # [R*C], for R lists of C steps
    window: jax.Array  # [1]
    offset: jax.Array  # [B]
    lengths: jax.Array  # [B], of the keys
    slopes: jax.Array  # [N]


def _steps(found: ranges.Ranges, inner_blocks: int) -> tuple[jax.Array, jax.Array]:
    """The tiles to visit in order, int32 [R*C] for ranges [R,X], and how many steps the longest list has.

    A step is a block of the side that a kernel writes (the outer one) with a block of the other, and what to do there.
    A block without a visible pair still gets a step that writes its zeros. Steps beyond the end of a list repeat the
    last blocks, so that nothing is fetched for them (see `_locate` for the heads of a group).
    """
    outer_blocks = found.first.shape[1]
    counts_RX = jnp.maximum(found.last - found.first, 1)
    ends_RX = jnp.cumsum(counts_RX, axis=1, dtype=jnp.int32)
    step_C = jnp.arange(outer_blocks * inner_blocks, dtype=jnp.int32)
    search = functools.partial(jnp.searchsorted, side="right", method="compare_all")
    outer_RC = jnp.minimum(jax.vmap(search, (0, None))(ends_RX, step_C), outer_blocks - 1).astype(jnp.int32)

    def of(values_RX: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values_RX, outer_RC, axis=1)

    within_RC = step_C - of(ends_RX - counts_RX)
    here_RC = of(found.first) + within_RC
    live_RC = step_C < ends_RX[:, -1:]
    visits_RC = live_RC & (here_RC < of(found.last))
    full_RC = visits_RC & (here_RC >= of(found.full_first)) & (here_RC < of(found.full_last))
    flags_RC = (
        _BEGINS * (live_RC & (within_RC == 0))
        + _ENDS * (live_RC & (within_RC == of(counts_RX) - 1))
        + _VISITS * visits_RC
        + _FULL * full_RC
    )
    inner_RC = jnp.clip(here_RC, 0, jnp.maximum(of(found.last) - 1, 0))
    steps_RC = (outer_RC << _OUTER) | (inner_RC << _INNER) | flags_RC.astype(jnp.int32)
    return steps_RC.ravel(), jnp.max(ends_RX[:, -1])


class _Place(NamedTuple):
    """Where a step of the grid is."""

    b: jax.Array
    n: jax.Array
    k: jax.Array
    x: jax.Array
    y: jax.Array
    begins: jax.Array
    ends: jax.Array
    masked: jax.Array  # a tile to visit, with a mask
    full: jax.Array  # a tile to visit, without one


def _locate(plan: _Plan, size: Tile, by_keys: bool, *grid: Any) -> _Place:
    """The place of step (row of the batch, head, step, head of the group); the last argument is the scalars."""
    b, h, step, g, scalars = grid
    inner_heads = plan.group if by_keys else 1
    stride = pl.cdiv(plan.queries, size.queries) * pl.cdiv(plan.keys, size.keys)
    at = (b * stride if plan.by_row else 0) + step
    packed = scalars.steps[at]
    outer, inner = packed >> _OUTER, (packed >> _INNER) & ((1 << (_OUTER - _INNER)) - 1)
    flags = packed & ((1 << _INNER) - 1)
    visits, full = (flags & _VISITS) != 0, (flags & _FULL) != 0
    # Where nothing is visited all heads of a group look at the last one's blocks: a block is fetched when it changes.
    n = h * inner_heads + jnp.where(visits, g, inner_heads - 1)
    return _Place(
        b=b,
        n=n,
        k=jax.lax.div(n, jnp.int32(plan.group)),  # a floor would be more work, and n is not negative
        x=inner if by_keys else outer,
        y=outer if by_keys else inner,
        begins=((flags & _BEGINS) != 0) & (g == 0),
        ends=((flags & _ENDS) != 0) & (g == inner_heads - 1),
        masked=visits & ~full,
        full=full,
    )


def _specs(plan: _Plan, size: Tile, locate: Callable[..., _Place]) -> dict[str, pl.BlockSpec]:
    """How each input and output is cut into blocks."""

    def spec(block: tuple[int | None, ...], index: Callable[[_Place], tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(block, lambda *grid: index(locate(*grid)))

    queries = spec((None, None, size.queries, plan.head_dim), lambda at: (at.b, at.n, at.x, 0))
    keys = spec((None, None, size.keys, plan.head_dim), lambda at: (at.b, at.k, at.y, 0))
    statistic = spec((None, None, 1, size.queries), lambda at: (at.b, at.n, 0, at.x))
    return {
        **dict.fromkeys(("q", "out", "dout", "dq"), queries),
        **dict.fromkeys(("k", "v", "dk", "dv"), keys),
        **dict.fromkeys(("lse", "delta"), statistic),
        "query_segments": spec((None, 1, size.queries), lambda at: (at.b, 0, at.x)),
        "key_segments": spec((None, 1, size.keys), lambda at: (at.b, 0, at.y)),
    }


def _call(
    plan: _Plan,
    kernel: Callable[..., None],
    size: Tile,
    mask: AttentionMask,
    inputs: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    scratch: Sequence[tuple[int, ...]],
    *,
    by_keys: bool = False,
) -> dict[str, jax.Array]:
    """Run a kernel over the tiles that the mask leaves, those of one block of queries (or of keys) in a row."""
    side = ranges.query_ranges if by_keys else ranges.key_ranges
    found = side(mask, plan.batch if plan.by_row else 1, plan.queries, plan.keys, size)
    blocks = pl.cdiv(plan.queries, size.queries), pl.cdiv(plan.keys, size.keys)
    steps, count = _steps(found, blocks[0] if by_keys else blocks[1])
    locate = functools.partial(_locate, plan, size, by_keys)
    inputs = inputs | _segments(plan, size, mask)
    specs = _specs(plan, size, locate)
    heads = (plan.kv_heads, count, plan.group) if by_keys else (plan.heads, count, 1)
    run = pl.pallas_call(
        functools.partial(kernel, plan, size, locate),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(plan.batch, *heads),
            in_specs=[{name: specs[name] for name in inputs}],
            out_specs={name: specs[name] for name in outputs},
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        interpret=plan.interpret,
        name=kernel.__name__.strip("_"),
    )
    # Under remat a kernel whose results were saved is dead code. JAX removes that of a jit, but never a bare kernel.
    results: dict[str, jax.Array] = jax.jit(run)(_scalars(plan, mask, steps), inputs)
    return results


def _scalars(plan: _Plan, mask: AttentionMask, steps: jax.Array) -> _Scalars:
    offset = jnp.asarray(0 if mask.query_offset is None else mask.query_offset, jnp.int32)
    lengths = plan.keys if mask.key_lengths is None else jnp.minimum(mask.key_lengths, plan.keys)
    return _Scalars(
        steps=steps,
        window=jnp.reshape(jnp.asarray(0 if mask.window is None else mask.window, jnp.int32), (1,)),
        offset=jnp.broadcast_to(offset, (plan.batch,)),
        lengths=jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), (plan.batch,)),
        slopes=jnp.zeros((plan.heads,)) if mask.slopes is None else mask.slopes.astype(jnp.float32) * LOG2E,
    )


def _segments(plan: _Plan, size: Tile, mask: AttentionMask) -> dict[str, jax.Array]:
    if mask.query_segment_ids is None or mask.key_segment_ids is None:
        return {}
    return {
        "query_segments": _pad(mask.query_segment_ids[:, None], _whole(plan.queries, size.queries)),
        "key_segments": _pad(mask.key_segment_ids[:, None], _whole(plan.keys, size.keys)),
    }


def _tiles(at: _Place, body: Callable[[bool], None]) -> None:
    """Run `body(masked)` once, if the step visits a tile."""
    pl.when(at.masked)(functools.partial(body, True))
    pl.when(at.full)(functools.partial(body, False))


def _here(locate: Callable[..., _Place], scalars: _Scalars) -> _Place:
    return locate(*map(pl.program_id, range(4)), scalars)


def _forward_kernel(
    plan: _Plan,
    size: Tile,
    locate: Callable[..., _Place],
    scalars: _Scalars,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    highest_ref: Any,
    sums_ref: Any,
    out_ref: Any,
) -> None:
    """Output and log-sum-exp of a block of queries, key block by key block.

    The statistics are repeated over the lanes; a lane of the sums has only its own keys until the end.
    """
    at = _here(locate, scalars)

    @pl.when(at.begins)
    def _() -> None:
        highest_ref[...] = jnp.full_like(highest_ref, LOWEST)
        sums_ref[...] = jnp.zeros_like(sums_ref)
        out_ref[...] = jnp.zeros_like(out_ref)

    def visit(masked: bool) -> None:
        v_SH = _rows(inputs["v"], at.y, size.keys, plan.keys, masked)
        scores_TS = _scores(plan, size, at, scalars, inputs, query_axis=0)
        if masked:
            scores_TS = jnp.where(_visible(plan, size, at, scalars, inputs, query_axis=0), scores_TS, HIDDEN)
        highest_TL = jnp.maximum(highest_ref[...], jnp.max(scores_TS, axis=1, keepdims=True))
        shrink_TL = jnp.exp2(highest_ref[...] - highest_TL)
        weights_TS = jnp.exp2(scores_TS - _widen(highest_TL, size.keys))
        sums_ref[...] = sums_ref[...] * shrink_TL + _fold(weights_TS, sums_ref.shape[1])
        products_TH = _product(weights_TS.astype(v_SH.dtype), v_SH)
        out_ref[...] = out_ref[...] * _widen(shrink_TL, plan.head_dim) + products_TH
        highest_ref[...] = highest_TL

    _tiles(at, visit)

    @pl.when(at.ends)
    def _() -> None:
        sums_T1 = jnp.sum(sums_ref[...], axis=1, keepdims=True)
        sums_T1 = jnp.where(sums_T1 > 0, sums_T1, 1.0)
        outputs["out"][...] = (out_ref[...] / sums_T1).astype(outputs["out"].dtype)
        lse_TL = highest_ref[...] + jnp.log2(sums_T1)
        outputs["lse"][...] = lse_TL.T[:1]


def _key_gradients_kernel(
    plan: _Plan,
    size: Tile,
    locate: Callable[..., _Place],
    scalars: _Scalars,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    dk_ref: Any,
    dv_ref: Any,
) -> None:
    """Gradients of a block of keys and of values: over the blocks of queries, and over the heads of the group."""
    at = _here(locate, scalars)

    @pl.when(at.begins)
    def _() -> None:
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    def visit(masked: bool) -> None:
        q_TH, dout_TH = (_rows(inputs[name], at.x, size.queries, plan.queries, masked) for name in ("q", "dout"))
        weights_ST = jnp.exp2(_scores(plan, size, at, scalars, inputs, query_axis=1) - inputs["lse"][...])
        if masked:
            weights_ST = jnp.where(_visible(plan, size, at, scalars, inputs, query_axis=1), weights_ST, 0.0)
        dv_ref[...] += _product(weights_ST.astype(dout_TH.dtype), dout_TH)
        dweights_ST = _product(inputs["v"][...], dout_TH, transposed=True)
        dscores_ST = weights_ST * (dweights_ST - inputs["delta"][...])
        dk_ref[...] += _product(dscores_ST.astype(q_TH.dtype), q_TH)

    _tiles(at, visit)

    @pl.when(at.ends)
    def _() -> None:
        outputs["dk"][...] = (dk_ref[...] * plan.head_dim**-0.5).astype(outputs["dk"].dtype)
        outputs["dv"][...] = dv_ref[...].astype(outputs["dv"].dtype)


def _query_gradients_kernel(
    plan: _Plan,
    size: Tile,
    locate: Callable[..., _Place],
    scalars: _Scalars,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    lse_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
) -> None:
    """The gradient of a block of queries, key block by key block."""
    at = _here(locate, scalars)

    @pl.when(at.begins)
    def _() -> None:
        lse_ref[...] = _column(inputs["lse"][...], lse_ref.shape[1])
        delta_ref[...] = _column(inputs["delta"][...], delta_ref.shape[1])
        dq_ref[...] = jnp.zeros_like(dq_ref)

    def visit(masked: bool) -> None:
        k_SH, v_SH = (_rows(inputs[name], at.y, size.keys, plan.keys, masked) for name in ("k", "v"))
        scores_TS = _scores(plan, size, at, scalars, inputs, query_axis=0)
        weights_TS = jnp.exp2(scores_TS - _widen(lse_ref[...], size.keys))
        if masked:
            weights_TS = jnp.where(_visible(plan, size, at, scalars, inputs, query_axis=0), weights_TS, 0.0)
        dweights_TS = _product(inputs["dout"][...], v_SH, transposed=True)
        dscores_TS = weights_TS * (dweights_TS - _widen(delta_ref[...], size.keys))
        dq_ref[...] += _product(dscores_TS.astype(k_SH.dtype), k_SH)

    _tiles(at, visit)

    @pl.when(at.ends)
    def _() -> None:
        outputs["dq"][...] = (dq_ref[...] * plan.head_dim**-0.5).astype(outputs["dq"].dtype)


def _scores(
    plan: _Plan, size: Tile, at: _Place, scalars: _Scalars, inputs: dict[str, Any], *, query_axis: int
) -> jax.Array:
    """Scores of a tile times log2(e), [T,S] or [S,T]."""
    q_TH, k_SH = inputs["q"][...], inputs["k"][...]
    left, right = (q_TH, k_SH) if query_axis == 0 else (k_SH, q_TH)
    scores = _product(left, right, transposed=True) * plan.scale
    if not plan.biased:
        return scores
    query, key = _indices(size, at, scalars, query_axis)
    return scores + scalars.slopes[at.n] * (key - query).astype(jnp.float32)


def _indices(size: Tile, at: _Place, scalars: _Scalars, query_axis: int) -> tuple[jax.Array, jax.Array]:
    """The indices of a tile's queries among the keys, and of its keys, int32 [T,S] or [S,T] both."""
    shape = (size.queries, size.keys) if query_axis == 0 else (size.keys, size.queries)
    query = jax.lax.broadcasted_iota(jnp.int32, shape, query_axis) + (at.x * size.queries + scalars.offset[at.b])
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis) + at.y * size.keys
    return query, key


def _visible(
    plan: _Plan, size: Tile, at: _Place, scalars: _Scalars, inputs: dict[str, Any], *, query_axis: int
) -> jax.Array:
    """Which pairs of a tile are visible, bool [T,S] or [S,T]; in the latter, no query beyond the end is."""
    query, key = _indices(size, at, scalars, query_axis)
    queries, keys = None, None
    if "query_segments" in inputs:
        queries, keys = inputs["query_segments"][...], inputs["key_segments"][...]
        if query_axis == 0:
            queries = _widen(_column(queries, plan.lanes(size)), size.keys)
        else:
            keys = _widen(_column(keys, plan.lanes(size)), size.queries)
    window = scalars.window[0] if plan.windowed else None
    seen = tile.visible(
        query,
        key,
        scalars.lengths[at.b],
        causal=plan.causal,
        window=window,
        query_segments=queries,
        key_segments=keys,
    )
    if query_axis == 1 and plan.queries % size.queries:
        seen = seen & (query - scalars.offset[at.b] < plan.queries)
    return seen


def _rows(ref: Any, block: jax.Array, size: int, length: int, masked: bool) -> jax.Array:
    """A block [size, H], zero beyond the sequence's end, where memory holds anything."""
    rows = ref[...]
    if not masked or length % size == 0:
        return rows
    index = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) + block * size
    return jnp.where(index < length, rows, jnp.zeros_like(rows))


def _product(left: jax.Array, right: jax.Array, *, transposed: bool = False) -> jax.Array:
    """left @ right, or left @ right.T, in float32."""
    # For 16-bit inputs the setting of the caller's context has no meaning; float32 follows it.
    precision = None if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contracted = ((1,), (1 if transposed else 0,))
    return jax.lax.dot_general(
        left, right, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _column(row_1T: jax.Array, lanes: int) -> jax.Array:
    """[1,T] to [T,L], the same in every lane."""
    return jnp.broadcast_to(row_1T, (lanes, row_1T.shape[1])).T


def _widen(column_TL: jax.Array, width: int) -> jax.Array:
    """[T,L], the same in every lane, to [T,width]."""
    lanes = column_TL.shape[1]
    return jnp.tile(column_TL, (1, pl.cdiv(width, lanes)))[:, :width]


def _fold(x_TS: jax.Array, lanes: int) -> jax.Array:
    """[T,S] to [T,L]: the sum over whole registers, which needs nothing to cross the lanes."""
    return functools.reduce(jnp.add, (x_TS[:, start : start + lanes] for start in range(0, x_TS.shape[1], lanes)))
