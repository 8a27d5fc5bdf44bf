"""What every process of a job has a part of: putting the parts together, telling each other. All call it at once."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax.parallel import distributed, rules


def gather(value: Any) -> list[Any]:
    """What every process gives, in their order: values that JSON has. Raises as `distributed.wait_for_all`."""
    if jax.process_count() == 1:
        return [value]
    return [json.loads(text) for text in distributed.exchange("shares", json.dumps(value))]


def from_first(make: Callable[[], Any]) -> Any:
    """What the first process makes, a value that JSON has: for what depends on files that it alone writes."""
    return gather(make() if distributed.is_first() else None)[0]


def all_rows(tree: Any) -> Any:
    """The rows of all processes as numpy arrays: of arrays on a mesh, or of arrays of which each process has a part."""
    return jax.tree.map(lambda x: np.asarray(x) if jax.process_count() == 1 else _gathered(x), tree)


def _gathered(x: Any) -> np.ndarray:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        processes = Mesh(np.array(jax.devices()).reshape(jax.process_count(), -1), ("processes", "local"))
        x = multihost_utils.host_local_array_to_global_array(np.asarray(x), processes, PartitionSpec("processes"))
    everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
    return np.asarray(settled(jax.jit(_same, out_shardings=everywhere)(x)).addressable_data(0))


def _same(x: jax.Array) -> jax.Array:
    """A function that keeps its name, so that JAX compiles it once for each shape and not in every call."""
    return x


def settled(tree: Any) -> Any:
    """Arrays that a program with collectives makes, when all of this process's devices have done with it.

    Whoever takes a value from the first device begins the next program while the others may be at the end of this one.
    On CPUs nothing keeps the two apart: what one device of the next program sends, another takes for this one's, and
    both wait for ever. So programs of which none needs what another makes each have to be waited for in this way.
    """
    return jax.block_until_ready(tree)


def own_rows(whole: Any, mesh: Mesh) -> Any:
    """This process's part of the rows of all, in the order in which they lie over a mesh; of numpy arrays."""

    def one(rows: np.ndarray) -> np.ndarray:
        sharding = NamedSharding(mesh, rules.partition_spec(("batch",)))
        indices = sharding.addressable_devices_indices_map((len(rows),)).values()
        parts = {index[0].indices(len(rows)) for index in indices if index is not None}
        return np.concatenate([rows[slice(*part)] for part in sorted(parts)])

    return jax.tree.map(one, whole)
