"""Pallas kernels on a mesh: each device runs the kernel on its own sequences and heads.

The compiler's partitioner cannot look into a Pallas call, so `jax.shard_map` cuts the arrays by the table of
`parallel.rules`: the batch over `replica` and `data`, heads (and with them their ALiBi slopes) over `tensor`. No number
is moved between devices for it.

Lengths are whole on every device. A mesh axis for the length of the sequence would be named in the second place of
`QUERY_AXES` and of the mask's `query_segment_ids` and `query_scale`; the body would gather keys and values over it
(their axes stay as they are) and add `jax.lax.axis_index(axis) * T` to `query_offset`, which is all that a kernel needs
to know about where its queries lie. Passing keys around in a ring would instead call the kernel once per part of the
keys and merge the outputs by their log-sum-exp.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from llm_jax.errors import require
from llm_jax.kernels.choice import Implementation, Problem
from llm_jax.parallel.rules import RULES, LogicalAxes

QUERY_AXES: LogicalAxes = ("batch", None, "heads", None)  # of q_BTNH and the output
KEY_AXES: LogicalAxes = ("batch", None, "kv_heads", None)  # of k_BSKH and v_BSKH
MASK_AXES: dict[str, LogicalAxes] = {
    "window": (),
    "query_segment_ids": ("batch", None),
    "key_segment_ids": ("batch", None),
    "query_offset": ("batch",),  # or a scalar
    "key_lengths": ("batch",),
    "slopes": ("heads",),
    "query_scale": ("batch", None),
}


def on_shards(
    kernel: Implementation,
    axes: tuple[LogicalAxes, ...] = (QUERY_AXES, KEY_AXES, KEY_AXES),
    out_axes: LogicalAxes = QUERY_AXES,
) -> Implementation:
    """The kernel run `per_shard`; it refuses what does not divide over the mesh in context, or what it cannot serve."""

    def refuses(problem: Problem) -> str | None:
        return _explicit() or _indivisible(problem) or kernel.refuses(_of_one_shard(problem))

    return Implementation(per_shard(kernel.run, axes, out_axes), refuses)


def per_shard(
    run: Callable[..., jax.Array],
    axes: tuple[LogicalAxes, ...] = (QUERY_AXES, KEY_AXES, KEY_AXES),
    out_axes: LogicalAxes = QUERY_AXES,
) -> Callable[..., jax.Array]:
    """`run(*arrays, mask)`, called on every device of the mesh in context with its part of the arrays and the mask.

    Without a mesh, on a mesh that divides nothing, and inside a `jax.shard_map` over all of its axes, `run` itself is
    called. A surrounding `jax.shard_map` needs `check_vma=False`, as Pallas calls do not say over what they vary.

    Args:
      run: takes arrays and an `AttentionMask`, returns an array; it is differentiated where it lies.
      axes: for each argument before the mask, the logical axes of its leading dimensions (of every leaf of a tree).
      out_axes: those of the result.

    The result raises `UserError` on a mesh whose axes are explicit.
    """

    @functools.wraps(run)
    def sharded(*arguments: Any) -> jax.Array:
        *arrays, mask = arguments
        free = _free_axes()
        if math.prod(free.values()) == 1:
            return run(*arrays, mask)
        refusal = _explicit()
        require(refusal is None, f"attention: {refusal}")
        # Plain numbers stay outside, so that they stay static.
        fields = {name: getattr(mask, name) for name in MASK_AXES}
        fields = {name: value for name, value in fields.items() if isinstance(value, jax.Array | np.ndarray)}
        specs = {name: _spec(MASK_AXES[name][: value.ndim], free) for name, value in fields.items()}

        def local(arrays: list[Any], fields: dict[str, jax.Array]) -> jax.Array:
            return run(*arrays, dataclasses.replace(mask, **fields))

        return jax.shard_map(
            local,
            in_specs=([_spec(names, free) for names in axes], specs),
            out_specs=_spec(out_axes, free),
            axis_names=set(free),
            check_vma=False,
        )(arrays, fields)

    return sharded


def _free_axes() -> dict[str, int]:
    """The axes of the mesh in context, and their sizes, that no surrounding `jax.shard_map` has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, axis_type in types if axis_type != AxisType.Manual}


def _spec(axes: LogicalAxes, free: dict[str, int]) -> PartitionSpec:
    entries = [tuple(name for name in RULES[axis] if name in free) if axis is not None else () for axis in axes]
    return PartitionSpec(*(entry or None for entry in entries))


def _shares(axis: str) -> int:
    """Over how many devices a logical axis is divided here."""
    free = _free_axes()
    return math.prod(free[name] for name in RULES[axis] if name in free)


def _explicit() -> str | None:
    """Why the mesh in context cannot be cut over, or None: under explicit axes arrays would have to be cut already."""
    mesh = jax.sharding.get_abstract_mesh()
    if math.prod(_free_axes().values()) == 1 or AxisType.Explicit not in mesh.axis_types:
        return None
    name = mesh.axis_names[mesh.axis_types.index(AxisType.Explicit)]
    return f"the mesh's axis {name!r} is explicit: make the mesh with axis_types=(AxisType.Auto, ...)"


def _indivisible(problem: Problem) -> str | None:
    rows, heads = _shares("batch"), _shares("kv_heads")
    if problem.batch % rows:
        return f"{problem.batch} sequences do not divide over {rows} devices ({' x '.join(RULES['batch'])})"
    if problem.num_kv_heads % heads:
        over = f"{heads} devices ({' x '.join(RULES['kv_heads'])})"
        return f"{problem.num_kv_heads} key/value heads do not divide over {over}"
    return None


def _of_one_shard(problem: Problem) -> Problem:
    rows, heads = _shares("batch"), _shares("kv_heads")
    return problem._replace(
        batch=problem.batch // rows, num_heads=problem.num_heads // heads, num_kv_heads=problem.num_kv_heads // heads
    )
