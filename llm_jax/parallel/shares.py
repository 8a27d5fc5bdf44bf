"""What every process of a job has a part of: putting the parts together, telling each other. All call it at once."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.parallel import distributed


def gather(value: Any) -> list[Any]:
    """What every process gives, in their order: values that JSON has."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(own)))
    padded = multihost_utils.process_allgather(np.pad(own, (0, sizes.max() - len(own))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes)]


def from_first(make: Callable[[], Any]) -> Any:
    """What the first process makes, a value that JSON has: for what depends on files that it alone writes."""
    return gather(make() if distributed.is_first() else None)[0]


def all_rows(tree: Any) -> Any:
    """The rows of all processes as numpy arrays: of arrays on a mesh, or of arrays of which each process has a part."""
    return multihost_utils.process_allgather(tree, tiled=True)


def own_rows(whole: Any) -> Any:
    """This process's part of the rows of all, as they lie over the data axes of a mesh; of numpy arrays."""
    return jax.tree.map(lambda rows: np.split(rows, jax.process_count())[jax.process_index()], whole)
