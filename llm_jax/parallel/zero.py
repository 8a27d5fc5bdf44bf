"""When a weight is made whole for compute: where it is used, once a step, or in two stages.

Master weights, their gradients and the optimiser's state are always divided over all devices. What differs, per group
of layers (`LayerGroup.gather`), is when compute gets a weight whole, in the compute dtype:

* "layer": where it is used, forwards and backwards (ZeRO-3: Rajbhandari et al., 2020).
* "step": once, before a step's microbatches (ZeRO-1 and 2: no more traffic, more memory).
* "group": over `replica` once a step, then over `data` where it is used: slow links between groups of hosts carry it
  once, and each group keeps one whole copy (hierarchical partitioning: ZeRO++, Wang et al., 2023).

A gradient is summed and divided among the devices in the backward pass of each microbatch, in float32 where
`models.linear` makes it, so that what adds up over microbatches is a shard.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from llm_jax.parallel.rules import RULES, LogicalAxes, axis_size, constrain, partition_spec

# Axes over which a parameter is gathered for compute; the others stay sharded.
GATHERED = ("embed",)
# What becomes of such an axis before a step's microbatches.
EARLY: dict[str, str | None] = {"step": None, "group": "embed_in_group"}
SUBLANES, LANES = 8, 128  # of a tile of a TPU's memory


@flax.struct.dataclass
class Gathered:
    """A parameter of which something was gathered early. Gradients flow to the master."""

    master: jax.Array  # first, because Flax compares the first leaf with the shape that a layer states
    early: jax.Array  # in the compute dtype

    @property
    def dtype(self) -> jnp.dtype:
        """That of the master and of its gradient."""
        return self.master.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's."""
        return self.master.shape

    @property
    def ndim(self) -> int:
        """How many dimensions that is."""
        return self.master.ndim


def gather_early(params: Any, axes: Any, when: str, dtype: jnp.dtype) -> Any:
    """What is gathered of each parameter before a step's microbatches: to be joined with `attach`.

    Args:
      params: nested dicts. Leaves that are not plain arrays (quantised, or under an adapter) are left for later.
      axes: the logical axes of each.
      when: "layer" (nothing is gathered), "step" or "group".
      dtype: in which it is gathered and computed with.
    """
    if when == "layer":
        return None

    def one(parameter: Any, names: LogicalAxes) -> jax.Array | None:
        if not isinstance(parameter, jax.Array):
            return None
        shard = constrain(jax.lax.stop_gradient(parameter).astype(dtype), *names)
        return constrain(shard, *(EARLY[when] if axis in GATHERED else axis for axis in names))

    return jax.tree.map(one, params, axes, is_leaf=lambda node: not isinstance(node, dict))


def attach(params: Any, early: Any) -> Any:
    """The parameters with what `gather_early` made of them."""

    def one(early: jax.Array | None, parameter: Any) -> Any:
        return parameter if early is None else Gathered(parameter, early)

    return jax.tree.map(one, early, params, is_leaf=lambda node: node is None)


def attached(params: Any, name: str) -> Any:
    """`params[name]` with what was gathered of it early, if anything (see `models.gather_once`)."""
    return attach(params[name], params.get("gathered", {}).get(name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(parameter: jax.Array | Gathered, axes: LogicalAxes, dtype: jnp.dtype) -> jax.Array:
    """A parameter as compute uses it: cast to `dtype` first, then gathered over the axes in `GATHERED`.

    Its gradient comes back in the parameter's own dtype and layout. What is summed over the devices before that has
    the dtype in which the caller's backward pass made it: `models.linear` makes its own in float32.
    """
    if isinstance(parameter, Gathered):
        part = parameter.early.astype(dtype)
    else:  # The constraint keeps the cast on the shard: without it the gather would move the wider dtype.
        part = constrain(parameter.astype(dtype), *axes)
    return constrain(part, *(None if axis in GATHERED else axis for axis in axes))


def _gather_forward(parameter: jax.Array | Gathered, axes: LogicalAxes, dtype: jnp.dtype) -> tuple[jax.Array, Any]:
    empty = jax.tree.map(lambda array: jnp.zeros((0,), array.dtype), parameter)
    return gather(parameter, axes, dtype), empty


def _gather_backward(axes: LogicalAxes, dtype: jnp.dtype, empty: Any, gradient: jax.Array) -> tuple[Any]:
    del dtype
    return (gradient_of(empty, gradient, axes),)


gather.defvjp(_gather_forward, _gather_backward)


def summed(product: Callable[..., jax.Array], rows: Sequence[jax.Array], parameter: Any, axes: LogicalAxes) -> Any:
    """`product(*rows)`, a gradient [as the parameter] that is a sum over rows: `gradient_of` sums it over the devices.

    On a torus it is summed and divided here, as `scattered_sum` does. Elsewhere XLA sees by itself that what it sums
    is divided afterwards.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _is_torus(mesh) or "embed" not in axes:
        return product(*rows)
    dimension, devices = axes.index("embed"), axis_size(mesh, "embed")
    if axis_size(mesh, "heads") > 1 or rows[0].shape[0] % devices or not _fills_tiles(parameter, dimension, devices):
        return product(*rows)

    def part(*own: jax.Array) -> jax.Array:
        return scattered_sum(product(*own), dimension, RULES["embed"])

    own = PartitionSpec(RULES["batch"])
    return jax.shard_map(part, in_specs=(own,) * len(rows), out_specs=partition_spec(axes), check_vma=False)(*rows)


def scattered_sum(part: jax.Array, dimension: int, mesh_axes: tuple[str, ...]) -> jax.Array:
    """Inside `jax.shard_map`: every device's share, along a dimension, of the sum of their parts.

    Over a whole torus libtpu makes an all-reduce of it, which moves twice as much, unless shares are whole tiles: so
    they are summed as rows of `LANES` numbers, filled up to a tile.
    """
    devices = jax.lax.axis_size(mesh_axes)
    if not _is_torus(jax.sharding.get_abstract_mesh()) or not _fills_tiles(part, dimension, devices):
        return jax.lax.psum_scatter(part, mesh_axes, scatter_dimension=dimension, tiled=True)
    front = jnp.moveaxis(part, dimension, 0)
    size = front.size // devices
    rows = jnp.pad(front.reshape(devices, size), ((0, 0), (0, -size % (SUBLANES * LANES)))).reshape(-1, LANES)
    share = jax.lax.psum_scatter(rows, mesh_axes, scatter_dimension=0, tiled=True)
    share = jax.lax.optimization_barrier(share).reshape(-1)[:size]  # libtpu would take the end off before the sum
    return jnp.moveaxis(share.reshape(front.shape[0] // devices, *front.shape[1:]), 0, dimension)


def _is_torus(mesh: AbstractMesh) -> bool:
    device = mesh.abstract_device
    return device is not None and device.platform == "tpu" and mesh.size > 1


def _fills_tiles(array: Any, dimension: int, devices: int) -> bool:
    """Whether an array divides, into shares of at least a tile: there is little to fill up."""
    return array.shape[dimension] % devices == 0 and math.prod(array.shape) >= devices * SUBLANES * LANES


def gradient_of(parameter: Any, gradient: jax.Array, axes: LogicalAxes) -> Any:
    """A parameter's gradient [as the parameter], each device's sum, as one of all devices: summed and divided.

    What leaves a device for it has the wider of the two dtypes; the result has the parameter's dtype and layout.
    """
    wide = gradient.astype(jnp.promote_types(gradient.dtype, parameter.dtype))
    shard = constrain(wide, *axes).astype(parameter.dtype)
    return Gathered(shard, None) if isinstance(parameter, Gathered) else shard  # type: ignore[arg-type]  # no gradient
