"""What every process of a job has a part of: putting the parts together, telling each other. All call it at once."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

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
    return multihost_utils.process_allgather(tree, tiled=True)


def own_rows(whole: Any, mesh: Mesh) -> Any:
    """This process's part of the rows of all, in the order in which they lie over a mesh; of numpy arrays."""

    def one(rows: np.ndarray) -> np.ndarray:
        sharding = NamedSharding(mesh, rules.partition_spec(("batch",)))
        indices = sharding.addressable_devices_indices_map((len(rows),)).values()
        parts = {index[0].indices(len(rows)) for index in indices if index is not None}
        return np.concatenate([rows[slice(*part)] for part in sorted(parts)])

    return jax.tree.map(one, whole)
