"""What a Pallas kernel moves and multiplies, counted by walking its program over its whole grid.

Every block's program is followed with its own place in the grid: loops run as often as they would, branches are taken
or not. Only integers that are known before the kernel starts are computed (places, ranges of blocks, lengths); numbers
that depend on queries, keys or values stay unknown, and a loop or branch that hangs on one of those cannot be counted.

On a GPU every load and store of the program counts, whether a cache serves it or not; where one has a mask, only what
lies within its array. On a TPU a block of an operand counts when the pipeline fetches it: when its place differs from
that of the step before.
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.aot import jaxprs
from benchmarks.aot.jaxprs import UNKNOWN, Reference

SMALL = 64  # numbers in an array that is followed inside a kernel
MOST_PROGRAMS = 300_000


class NotCounted(ValueError):
    """The program cannot be followed; the message says why."""


@dataclasses.dataclass
class Work:
    """Bytes to and from the device's memory, and floating-point operations of matrix products."""

    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0

    def add(self, other: "Work", times: int = 1) -> None:
        """Add the other's counts, `times` over."""
        self.bytes_read += times * other.bytes_read
        self.bytes_written += times * other.bytes_written
        self.flops += times * other.flops


_NUMPY: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
    "max": max,
    "min": min,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "sign": lambda x: (x > 0) - (x < 0),
    "div": lambda x, y: math.trunc(x / y),
    "rem": lambda x, y: int(math.fmod(x, y)),
}
_CALLS = ("jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "checkpoint")


def count(function: Callable[..., Any], *arguments: Any) -> dict[str, Work]:
    """The work of each Pallas kernel in `function`, by the kernel's name; arguments may be ShapeDtypeStructs."""
    closed = jax.make_jaxpr(function)(*arguments)
    found: dict[str, Work] = {}
    _outer(closed.jaxpr, closed.consts, [UNKNOWN] * len(closed.jaxpr.invars), found)
    return found


def _outer(jaxpr: Any, consts: Any, inputs: list[Any], found: dict[str, Work]) -> list[Any]:
    """Follow a program outside of kernels: what does not depend on the arguments is computed."""
    known = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, inputs))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else known.get(atom, UNKNOWN)

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        inner = jaxprs.inner_jaxpr(equation)
        if name in ("pallas_call", "mpmd_map"):
            label = _label(equation) or f"kernel_{len(found)}"
            work = _kernel(equation, values) if name == "pallas_call" else _WarpgroupWalk(equation, values).count()
            found.setdefault(label, Work()).add(work)
            results = [UNKNOWN] * len(equation.outvars)
        elif name in _CALLS and inner is not None:
            results = _outer(inner.jaxpr, inner.consts, values, found)
        elif all(value is not UNKNOWN for value in values):
            results = _compute(equation, values)
        elif name in ("scan", "while", "cond") and re.search("pallas_call|mpmd_map", str(equation)):
            raise NotCounted(f"a kernel inside of a {name}")
        else:
            results = [UNKNOWN] * len(equation.outvars)
        known.update(zip(equation.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]


def _label(equation: Any) -> str:
    """A kernel's name, or the innermost `jax.named_scope` that it stands in, as the compiler will call it."""
    scopes = str(equation.source_info.name_stack).split("/")
    return equation.params["name"] or re.sub(r"\W", "_", scopes[-1])


def _compute(equation: Any, values: list[Any]) -> list[Any]:
    results = equation.primitive.bind(*values, **equation.params)
    return results if equation.primitive.multiple_results else [results]


def _kernel(equation: Any, values: list[Any]) -> Work:
    mapping = equation.params["grid_mapping"]
    dynamic = mapping.num_dynamic_grid_bounds
    bounds = iter(values[:dynamic])
    grid = tuple(size if isinstance(size, int) else int(_need(next(bounds), "the grid")) for size in mapping.grid)
    if math.prod(grid) > MOST_PROGRAMS:
        raise NotCounted(f"{math.prod(grid)} programs")
    numbers = [None if value is UNKNOWN else np.asarray(value) for value in values[dynamic:]]
    on_tpu = "mosaic" in type(equation.params["compiler_params"]).__module__ and "gpu" not in str(
        type(equation.params["compiler_params"]).__module__
    )
    walk = _TpuWalk if on_tpu else _GpuWalk
    return walk(equation.params["jaxpr"], mapping, numbers, grid).count()


def _need(value: Any, what: str) -> Any:
    if value is UNKNOWN:
        raise NotCounted(f"{what} depends on data")
    return value


class _Walk:
    """Follows the program of a kernel, block by block."""

    def __init__(self, jaxpr: Any, mapping: Any, numbers: list[np.ndarray | None], grid: tuple[int, ...]):
        self.jaxpr, self.mapping, self.numbers, self.grid = jaxpr, mapping, numbers, grid
        self.place: tuple[int, ...] = ()
        # The kernel does not know of axes that vmap added.
        self.own_axes = [axis for axis in range(len(grid)) if axis not in mapping.vmapped_dims]
        self.work = Work()
        self.plain: dict[Any, tuple[Any, Work | None]] = {}  # loop bodies that are the same every time

    def count(self) -> Work:
        for place in itertools.product(*map(range, self.grid)):
            self.place = place
            self.body(self.jaxpr, (), self.references())
        return self.work

    def references(self) -> list[Reference]:
        """What the kernel's parameters stand for in the current block."""
        raise NotImplementedError

    def block_index(self, block_mapping: Any) -> tuple[int, ...]:
        """Where in its array a parameter's block lies, in blocks."""
        closed = block_mapping.index_map_jaxpr
        prefetched = [Reference(x, False) for x in self.numbers[: self.mapping.num_index_operands]]
        index = self.body(closed.jaxpr, closed.consts, [*self.place, *prefetched])
        return tuple(int(_need(i, "a block's place")) for i in index)

    def body(self, jaxpr: Any, consts: Any, inputs: Any) -> list[Any]:
        """Follow one program; unknown results are UNKNOWN."""
        known = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, inputs))

        def read(atom: Any) -> Any:
            return atom.val if hasattr(atom, "val") else known.get(atom, UNKNOWN)

        for equation in jaxpr.eqns:
            results = self.equation(equation, [read(atom) for atom in equation.invars])
            if results is not None:
                known.update(zip(equation.outvars, results))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, values: list[Any]) -> list[Any] | None:
        """The results of one operation, None where all are unknown."""
        name = equation.primitive.name
        inner = jaxprs.inner_jaxpr(equation)
        if name == "program_id":
            return [self.place[self.own_axes[equation.params["axis"]]]]
        if name == "num_programs":
            return [self.grid[self.own_axes[equation.params["axis"]]]]
        if name in jaxprs.LOADS or name in jaxprs.STORES:
            return self.access(equation, values, name in jaxprs.STORES)
        if name == "dot_general":
            self.work.flops += jaxprs.product_flops(equation)
            return None
        if name == "cond":
            branch = equation.params["branches"][int(_need(values[0], "a branch"))]
            return self.body(branch.jaxpr, branch.consts, values[1:])
        if name == "while":
            return self.while_loop(equation, values)
        if name == "scan":
            return self.scan(equation, values)
        if name == "run_scoped":
            jaxpr = equation.params["jaxpr"]
            scratch = [Reference(None, False) for _ in jaxpr.invars]
            return self.body(jaxpr, values, scratch)
        if name in ("dma_start", "copy_gmem_to_smem", "copy_smem_to_gmem", "async_copy"):
            raise NotCounted("copies of its own")
        if name in _CALLS and inner is not None:
            return self.body(inner.jaxpr, inner.consts, values)
        return self.number(equation, values)

    def number(self, equation: Any, values: list[Any]) -> list[Any] | None:
        """Arithmetic on known integers."""
        if not equation.outvars or any(value is UNKNOWN or isinstance(value, Reference) for value in values):
            return None
        name = equation.primitive.name
        if equation.outvars[0].aval.shape == () and np.issubdtype(equation.outvars[0].aval.dtype, np.floating):
            return None
        if name in _NUMPY and all(np.ndim(value) == 0 for value in values):
            return [_NUMPY[name](*(v.item() if isinstance(v, np.generic) else v for v in values))]
        if name == "select_n":
            return [values[1 + int(values[0])]] if np.ndim(values[0]) == 0 else None
        if name == "convert_element_type" and np.ndim(values[0]) == 0:
            kind = equation.params["new_dtype"]
            return [bool(values[0]) if kind == np.bool_ else int(values[0])]
        if any(variable.aval.size > SMALL for variable in equation.outvars) or not values:
            return None
        typed = [np.asarray(v, atom.aval.dtype) for v, atom in zip(values, equation.invars)]
        try:
            return [np.asarray(result)[()] for result in _compute(equation, typed)]
        except NotImplementedError:  # it means something on the device only
            return None

    def access(self, equation: Any, values: list[Any], stores: bool) -> list[Any] | None:
        """A load or a store."""
        reference = values[0]
        moved = equation.invars[1].aval if stores and equation.primitive.name == "swap" else equation.outvars[0].aval
        if reference.counts:
            size = jaxprs.accessed(equation, values, moved.shape) * moved.dtype.itemsize
            self.work.add(Work(bytes_written=size) if stores else Work(bytes_read=size))
        if stores or reference.numbers is None or moved.size > SMALL:
            return None
        indices = jaxprs.known_indices(equation, values)
        return None if indices is None else [functools.reduce(operator.getitem, indices, reference.numbers)[()]]

    def while_loop(self, equation: Any, values: list[Any]) -> list[Any]:
        parameters = equation.params
        condition, body = parameters["cond_jaxpr"], parameters["body_jaxpr"]
        first, second = parameters["cond_nconsts"], parameters["body_nconsts"]
        of_condition, of_body = values[:first], values[first : first + second]
        carry = values[first + second :]
        counter = jaxprs.counter(condition.jaxpr, body.jaxpr, second)
        plain = self.plain_body(body.jaxpr, [*of_body, *carry])
        if counter is not None and plain is not None:
            at, limit = counter
            end = [*of_condition, *carry][limit]
            trips = max(0, int(_need(end, "a loop")) - int(_need(carry[at], "a loop")))
            self.work.add(plain, trips)
            return [UNKNOWN] * len(carry)
        while _need(self.body(condition.jaxpr, condition.consts, [*of_condition, *carry])[0], "a loop"):
            carry = self.body(body.jaxpr, body.consts, [*of_body, *carry])
        return carry

    def scan(self, equation: Any, values: list[Any]) -> list[Any]:
        parameters = equation.params
        body, length = parameters["jaxpr"], parameters["length"]
        consts, carried = parameters["num_consts"], parameters["num_carry"]
        plain = self.plain_body(body.jaxpr, values)
        if plain is not None:
            self.work.add(plain, length)
            return [UNKNOWN] * len(equation.outvars)
        carry = values[consts : consts + carried]
        for _ in range(length):
            slices = [UNKNOWN] * (len(values) - consts - carried)
            carry = self.body(body.jaxpr, body.consts, [*values[:consts], *carry, *slices])[:carried]
        return [*carry, *[UNKNOWN] * (len(equation.outvars) - carried)]

    def plain_body(self, jaxpr: Any, values: list[Any]) -> Work | None:
        """The work of a loop's body that has no loop or branch in it, the same in every round; else None."""
        key = id(jaxpr), *(value.extent for value in values if isinstance(value, Reference))
        if key not in self.plain:
            work = None
            if not jaxprs.branches(jaxpr):
                before, self.work = self.work, Work()
                hidden = [value if isinstance(value, Reference) else UNKNOWN for value in values]
                self.body(jaxpr, (), hidden)
                work, self.work = self.work, before
            self.plain[key] = (jaxpr, work)
        return self.plain[key][1]


class _GpuWalk(_Walk):
    """A GPU's blocks read and write the device's memory themselves."""

    def references(self) -> list[Reference]:
        mapped = [*self.numbers, *[None] * self.mapping.num_outputs]
        found = []
        for block_mapping, numbers in zip(self.mapping.block_mappings, mapped):
            shown = None
            if numbers is not None and np.issubdtype(numbers.dtype, np.integer):
                shown = jaxprs.block(numbers, block_mapping.block_shape, self.block_index(block_mapping))
            found.append(Reference(shown, True, self.extent(block_mapping)))
        return [*found, *[Reference(None, False)] * self.mapping.num_scratch_operands]

    def extent(self, block_mapping: Any) -> tuple[int, ...]:
        """How much of the present block lies within its array; () where all blocks do, entirely."""
        parts = list(zip(jaxprs.sizes(block_mapping.block_shape), jaxprs.array(block_mapping).shape))
        if all(size is None or whole % size == 0 for size, whole in parts):
            return ()
        index = self.block_index(block_mapping)
        return tuple(min(size, whole - i * size) for (size, whole), i in zip(parts, index) if size is not None)


class _TpuWalk(_Walk):
    """On a TPU a pipeline brings a kernel the blocks of its operands, and takes its results away."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.last: list[tuple[int, ...] | None] = [None] * len(self.mapping.block_mappings)

    def references(self) -> list[Reference]:
        prefetched = self.mapping.num_index_operands
        found = [Reference(x, False) for x in self.numbers[:prefetched]]
        inputs = self.mapping.num_inputs
        mapped = [*self.numbers[prefetched:], *[None] * self.mapping.num_outputs]
        for number, (block_mapping, numbers) in enumerate(zip(self.mapping.block_mappings, mapped)):
            index = self.block_index(block_mapping)
            if index != self.last[number]:
                self.last[number] = index
                size = jaxprs.block_bytes(block_mapping)
                self.work.add(Work(bytes_read=size) if number < inputs else Work(bytes_written=size))
            shown = None
            if numbers is not None and np.issubdtype(numbers.dtype, np.integer) and numbers.size < 1e6:
                shown = jaxprs.block(numbers, block_mapping.block_shape, index)
            found.append(Reference(shown, False))
        return [*found, *[Reference(None, False)] * self.mapping.num_scratch_operands]


class _WarpgroupWalk(_Walk):
    """On Mosaic for GPUs each warpgroup of a program is followed by itself; they copy and multiply by commands."""

    def __init__(self, equation: Any, values: list[Any]):
        (mesh,), (jaxpr,) = equation.params["meshes"], equation.params["jaxprs"]
        self.names = (*mesh.grid_names, mesh.thread_name)
        self.inputs = [
            Reference(None if value is UNKNOWN else np.asarray(value), counts=True)
            for value in [*values, *[UNKNOWN] * len(equation.outvars)]
        ]
        mapping = types.SimpleNamespace(vmapped_dims=())
        super().__init__(jaxpr, mapping, [], (*mesh.grid, mesh.num_threads or 1))

    def references(self) -> list[Reference]:
        return self.inputs

    def equation(self, equation: Any, values: list[Any]) -> list[Any] | None:
        name, parameters = equation.primitive.name, equation.params
        if name == "axis_index":
            return [self.place[self.names.index(parameters["axis_name"])]]
        if name == "copy_gmem_to_smem":
            self.work.add(Work(bytes_read=jaxprs.part_bytes(equation.invars[0], parameters["src_transforms_treedef"])))
            return None
        if name == "copy_smem_to_gmem":
            self.work.add(
                Work(bytes_written=jaxprs.part_bytes(equation.invars[1], parameters["dst_transforms_treedef"]))
            )
            return None
        if name == "wgmma_ref":
            sums, left = equation.invars[0].aval, equation.invars[1]
            size = jaxprs.part_bytes(left, parameters["a_transforms_tree"]) // left.aval.dtype.itemsize
            self.work.flops += 2 * size * sums.shape[1]
            return None
        if name == "run_state":
            held = [value if isinstance(value, Reference) else _held(value) for value in values]
            self.body(parameters["jaxpr"], (), held)
            return None
        return super().equation(equation, values)


def _held(value: Any) -> Reference:
    return Reference(None if value is UNKNOWN else np.asarray(value), counts=False)
