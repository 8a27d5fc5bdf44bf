"""Reading the programs of Pallas kernels as JAX holds them: blocks and their places, loads and stores, loops.

Values that a program has are numbers where they are known before it starts, `Reference` for memory, else `UNKNOWN`.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

UNKNOWN = object()
LOADS = ("get", "masked_load", "load")
STORES = ("swap", "masked_swap", "store", "addupdate")


@dataclasses.dataclass(eq=False)
class Reference:
    """Memory that a kernel reads and writes: its numbers where they are known, and whether access to it counts.

    `extent` is how much of each of its dimensions lies within the array, if it may be less than the whole block.
    """

    numbers: np.ndarray | None
    counts: bool
    extent: tuple[int, ...] = ()


def inner_jaxpr(equation: Any) -> Any:
    """The program that an operation calls, or None."""
    for name in ("jaxpr", "call_jaxpr", "call"):
        if name in equation.params and hasattr(equation.params[name], "jaxpr"):
            return equation.params[name]
    return None


def part_bytes(variable: Any, transforms: Any) -> int:
    """Of the part of a reference, or of the whole array, that a command takes."""
    shape = variable.aval.shape
    for step in () if transforms is None else transforms.unflatten([0] * transforms.num_leaves):
        if hasattr(step, "indices"):
            shape = tuple(part.size for part in step.indices if hasattr(part, "size"))
    return math.prod(shape) * variable.aval.dtype.itemsize


def sizes(block_shape: Any) -> list[int | None]:
    """Rows of a block along each dimension; None where the dimension is dropped."""
    found: list[int | None] = []
    for size in block_shape:
        plain = size if isinstance(size, int) else getattr(size, "block_size", None)
        found.append(plain)
    return found


def block(numbers: np.ndarray, block_shape: Any, index: tuple[int, ...]) -> np.ndarray:
    """The part of an array that a kernel sees at a place in its grid."""
    where: list[Any] = []
    for size, i in zip(sizes(block_shape), index):
        where.append(i if size is None else slice(i * size, (i + 1) * size))
    return numbers[tuple(where)]


def array(block_mapping: Any) -> Any:
    """Shape and dtype of the array that the blocks are of."""
    return getattr(block_mapping, "array_aval", None) or block_mapping.array_shape_dtype


def block_bytes(block_mapping: Any) -> int:
    """Of one whole block."""
    return math.prod(size or 1 for size in sizes(block_mapping.block_shape)) * array(block_mapping).dtype.itemsize


def accessed(equation: Any, values: list[Any], shape: tuple[int, ...]) -> int:
    """How many numbers a load or store of `shape` moves: all, or with a mask those that lie within the array.

    A part of the block whose place is not known counts as if it lay at the block's start.
    """
    extent, everything = values[0].extent, math.prod(shape)
    if not extent or "args_tree" not in equation.params:
        return everything
    arguments = jax.tree_util.tree_unflatten(equation.params["args_tree"], values)
    transforms, mask = arguments[1], arguments[3 if equation.primitive.name in STORES else 2]
    if mask is None or len(transforms) > 1:
        return everything
    parts = transforms[0].indices if transforms else [slice(0, size) for size in shape]
    within, asked = 1, 1
    for part, available in zip(parts, extent):
        if hasattr(part, "start"):
            size = part.stop if isinstance(part, slice) else part.size
            start = 0 if part.start is UNKNOWN else int(part.start)
            within, asked = within * max(0, min(size, available - start)), asked * size
    return within if asked == everything else everything


def known_indices(equation: Any, values: list[Any]) -> list[tuple[Any, ...]] | None:
    """The places that a load takes one in the other, for numpy; None where one of them is not known."""
    if "args_tree" in equation.params:
        transforms = jax.tree_util.tree_unflatten(equation.params["args_tree"], values)[1]
    else:
        transforms = jax.tree_util.tree_unflatten(equation.params["tree"], values[1:])
    steps = []
    for transform in transforms:
        step = [_known_part(part) for part in getattr(transform, "indices", (UNKNOWN,))]
        if any(part is UNKNOWN for part in step):
            return None
        steps.append(tuple(step))
    return steps


def _known_part(part: Any) -> Any:
    if hasattr(part, "start") and part.start is not UNKNOWN:
        return slice(int(part.start), int(part.start) + part.size)
    return UNKNOWN if part is UNKNOWN or hasattr(part, "start") or np.ndim(part) else int(part)


def branches(jaxpr: Any) -> bool:
    """Whether a program has a loop or a branch in it."""
    for equation in jaxpr.eqns:
        inner = inner_jaxpr(equation)
        if equation.primitive.name in ("while", "cond", "scan", "run_scoped", "run_state"):
            return True
        if inner is not None and branches(inner.jaxpr):
            return True
    return False


def counter(condition: Any, body: Any, body_consts: int) -> tuple[int, int] | None:
    """(carry that counts, input of the condition that it is held against) of a loop `for i in range(a, b)`."""
    if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
        return None
    left, right = condition.eqns[0].invars
    if hasattr(left, "val") or hasattr(right, "val"):
        return None
    consts = len(condition.invars) - len(body.outvars)
    at, limit = condition.invars.index(left) - consts, condition.invars.index(right)
    if at < 0 or (limit >= consts and body.outvars[limit - consts] is not body.invars[body_consts + limit - consts]):
        return None
    for equation in body.eqns:
        if equation.outvars[0] is body.outvars[at] and equation.primitive.name == "add":
            source, step = equation.invars
            by_one = hasattr(step, "val") and int(step.val) == 1
            return (at, limit) if by_one and source is body.invars[body_consts + at] else None
    return None


def product_flops(equation: Any) -> int:
    """Floating-point operations of a matrix product."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
