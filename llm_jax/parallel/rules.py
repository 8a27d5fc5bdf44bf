"""Logical axes of arrays, and the one table that lays them out over the mesh.

A parameter names its axes where it is declared, an activation where it is constrained. Everything about placement
(sharded initialisation, optimiser state, checkpoints) follows from those names and `RULES`. The functions read the
mesh from the context (`jax.set_mesh`) and leave arrays alone when there is none.
"""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llm_jax.errors import UserError, require

LogicalAxes = tuple[str | None, ...]

RULES: dict[str, tuple[str, ...]] = {
    # Parameters: sharded over every device (ZeRO-3) by `embed` and one tensor-parallel axis.
    "embed": ("replica", "data"),
    "embed_in_group": ("data",),  # its part that is gathered within a group of hosts
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "head_dim": (),
    "layers": (),
    # Activations.
    "batch": ("replica", "data"),
    "sequence": ("tensor",),  # the residual stream between tensor-parallel regions
}


def partition_spec(axes: LogicalAxes) -> PartitionSpec:
    """The mesh axes of each dimension. Raises `UserError` if two dimensions claim the same mesh axis."""
    entries = [RULES[axis] if axis is not None else () for axis in axes]
    used = [mesh_axis for entry in entries for mesh_axis in entry]
    require(len(used) == len(set(used)), f"logical axes {axes} use a mesh axis twice: {used}")
    return PartitionSpec(*(entry or None for entry in entries))


def axis_size(mesh: Mesh | AbstractMesh, axis: str | None) -> int:
    """Over how many devices a logical axis is divided."""
    size = 1
    for mesh_axis in RULES[axis] if axis is not None else ():
        size *= mesh.shape[mesh_axis]
    return size


def shardings(axes_tree: Any, abstract_tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A `NamedSharding` for each parameter. Raises `UserError` naming the one whose dimension does not divide."""

    def one(path: jax.tree_util.KeyPath, array: Any, axes: LogicalAxes) -> NamedSharding:
        for size, axis in zip(array.shape, axes, strict=True):
            devices = axis_size(mesh, axis)
            if size % devices:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(
                    f"parameter {name}: its {axis!r} axis of size {size} does not divide over {devices} devices "
                    f"(mesh {dict(mesh.shape)}); choose a mesh whose {' x '.join(RULES[str(axis)])} divides {size}"
                )
        return NamedSharding(mesh, partition_spec(axes))

    return jax.tree_util.tree_map_with_path(one, abstract_tree, axes_tree)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay an activation out by its logical axes; without a mesh in context, `x` itself.

    A length that the tensor axis does not divide (one decoded token) is left unsharded: sharding the sequence only
    saves memory, and such a length has none to save.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    kept = tuple(
        None if axis == "sequence" and size % axis_size(mesh, axis) else axis
        for size, axis in zip(x.shape, axes, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, partition_spec(kept))
