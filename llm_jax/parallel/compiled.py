"""Reading a compiled step: its FLOPs, its collectives and what runs beside them, out of XLA's text.

What XLA prints is one module: computations of instructions, in the order in which they run. A loop's body is printed
once and runs `known_trip_count` times (a TPU's program has the bound in the loop's condition instead); a collective
names its groups of devices in one of several notations; a Pallas kernel is a call whose FLOPs only its name tells. XLA
for CPUs widens bfloat16: a program for CPUs does not tell how many bytes one for accelerators moves.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.errors import require
from llm_jax.parallel.links import KINDS, Collective

BITS = {"pred": 8, "token": 0, "opaque": 0}  # others have theirs in their name: bf16, f8e4m3fn, s32, c64
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{\s*$")
START = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = ")
AXIS_PART = re.compile(r"'?([\w-]+)'?(?::\((\d+)\)(\d+))?")
OPERAND = re.compile(r"%([\w.-]+)")
# Computations that an instruction runs: a reduction's are scalar, and of no interest here.
CALLS = re.compile(r"\b(?:calls|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)")
# Products of a Pallas kernel for attention over the pairs of queries and keys, by a part of its name.
ATTENTION_PRODUCTS = {"key_gradients": 4, "query_gradients": 3, "forward": 2}


class Instruction(NamedTuple):
    """A line of a computation: `%name = shape operation(arguments), attributes`."""

    name: str
    shape: str
    operation: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names among the arguments."""
        return OPERAND.findall(re.sub(r"\{[^{}]*\}", "", self.arguments))


@dataclasses.dataclass(frozen=True)
class Module:
    """A program's computations by name, each in the order of its schedule."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Communication:
    """A collective of a compiled program, and whether anything runs while it does."""

    collective: Collective
    channel: int
    is_async: bool  # started at one place and awaited at another
    hidden: bool  # with matrix products or kernels in between


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What a compiled step computes and moves, on one device."""

    flops: float
    communication: tuple[Communication, ...]

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Without what runs beside them."""
        return tuple(entry.collective for entry in self.communication)

    def hidden_share(self, *kinds: str) -> float:
        """Which share of the collectives of these kinds, as often as they run, has compute between start and end."""
        chosen = [entry for entry in self.communication if entry.collective.kind in kinds]
        total = sum(entry.collective.count for entry in chosen)
        return sum(entry.collective.count for entry in chosen if entry.hidden) / total if total else 1.0


def read(text: str, sizes: Mapping[str, int], hosts: Sequence[int], visible_keys: float) -> CompiledStep:
    """What a program says of itself.

    Args:
      text: of `Compiled.as_text()`.
      sizes: of the mesh's axes.
      hosts: the host of every device, in the mesh's order.
      visible_keys: how many keys a query of the model's attention sees on average.

    Raises `UserError` where a loop's length or a notation cannot be read.
    """
    module = parse(text)
    flops = 0.0
    communication = []
    for name, times in repetitions(module).items():
        instructions = module.computations[name]
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        work = [_flops(module, instruction, shapes, visible_keys) for instruction in instructions]
        flops += times * sum(work)
        for found in _communication(module, name, work, sizes, hosts):
            if found.collective.members > 1:
                collective = found.collective._replace(count=times)
                communication.append(dataclasses.replace(found, collective=collective))
    return CompiledStep(flops, tuple(communication))


def parse(text: str) -> Module:
    """The computations of a module's text, whose instructions may span lines."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header and "=" not in line.partition(" (")[0]:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            if START.match(line) or not current:
                current.append(line)
            else:
                current[-1] += " " + line.strip()
    require(bool(entry), "this is no compiled program of XLA: it has no ENTRY computation")
    found = {name: tuple(_instruction(line) for line in lines) for name, lines in computations.items()}
    return Module(found, entry)


def _instruction(line: str) -> Instruction:
    match = START.match(line)
    require(match is not None, f"cannot read the instruction {line[:120]!r} of a compiled program")
    rest = line[match.end() :]  # type: ignore[union-attr]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing - 1]
    return Instruction(match[2], shape, rest[:opening], arguments, rest[closing:])  # type: ignore[index]


def _closing(text: str, opening: int) -> int:
    """The place after the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text)


def repetitions(module: Module) -> dict[str, float]:
    """How often each computation runs in a step, but for those inside fusions, which are part of an instruction."""
    times: dict[str, float] = {}

    def visit(name: str, count: float) -> None:
        times[name] = times.get(name, 0.0) + count
        for instruction in module.computations[name]:
            if instruction.operation in ("while", "call", "conditional", "async-start"):
                inner = count * (trip_count(module, instruction) if instruction.operation == "while" else 1)
                for called in called_computations(instruction):
                    visit(called, inner)

    visit(module.entry, 1.0)
    return times


def called_computations(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs, without a loop's condition and without reductions."""
    attributes = instruction.attributes
    if instruction.operation in ("call", "call-start"):
        attributes = attributes.replace("to_apply=", "calls=")
    return [name.strip(" %") for found in CALLS.findall(attributes) for name in found.strip("{}").split(",") if name]


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a loop's body runs. Raises `UserError` where neither the loop nor its condition tells."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)
    instructions = [] if condition is None else _with_inner(module, condition[1])
    bounds = [int(line.arguments) for line in instructions if line.operation == "constant" and line.arguments.isdigit()]
    require(len(bounds) > 0, f"cannot tell how often the loop {loop.name} of a compiled program runs")
    return max(bounds)


def _with_inner(module: Module, name: str) -> list[Instruction]:
    """The instructions of a computation and of the fusions in it."""
    found = []
    for instruction in module.computations[name]:
        found.append(instruction)
        if instruction.operation == "fusion":
            for called in called_computations(instruction):
                found += _with_inner(module, called)
    return found


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Every array of a shape as (dtype, dimensions)."""
    return [(kind, tuple(int(n.strip("<=")) for n in sizes.split(",") if n)) for kind, sizes in ARRAY.findall(shape)]


def size(shape: str) -> float:
    """Bytes of all arrays of a shape together."""
    return sum(_bits(kind) / 8 * math.prod(dimensions) for kind, dimensions in arrays(shape))


def _bits(kind: str) -> int:
    number = re.search(r"\d+", kind)
    return BITS[kind] if kind in BITS else int(number[0]) if number else 0


def _flops(module: Module, instruction: Instruction, shapes: Mapping[str, str], visible_keys: float) -> float:
    """Of the matrix products that an instruction is or has inside; nothing else is counted."""
    operation = instruction.operation
    if operation == "fusion":
        total = 0.0
        for name in called_computations(instruction):
            inner = module.computations[name]
            inside = {line.name: line.shape for line in inner}
            total += sum(_flops(module, line, inside, visible_keys) for line in inner)
        return total
    operands = [arrays(shapes[name]) for name in instruction.operands if name in shapes]
    if operation == "dot":
        return _dot_flops(instruction, operands)
    if operation == "convolution":
        return _convolution_flops(instruction, operands)
    if operation == "custom-call":
        return _call_flops(instruction, operands, visible_keys)
    return 0.0


def _dot_flops(instruction: Instruction, operands: Sequence[list]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    left = operands[0][0][1]
    depth = math.prod(left[int(axis)] for axis in contracted[1].split(",") if axis) if contracted else 1
    return 2.0 * math.prod(arrays(instruction.shape)[0][1]) * depth


def _convolution_flops(instruction: Instruction, operands: Sequence[list]) -> float:
    """As a TPU's compiler writes a product. Taps of a window that lie in its padding are not counted."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    require(labels is not None, f"the convolution {instruction.name} of a compiled program has no dim_labels")
    left, right, out = labels.groups()  # type: ignore[union-attr]
    left_sizes, right_sizes = operands[0][0][1], operands[1][0][1]
    out_sizes = arrays(instruction.shape)[0][1]
    products = float(right_sizes[right.index("i")])
    for label, extent in zip(out, out_sizes):
        if not label.isdigit():
            products *= extent
            continue
        window = {
            name: value.split("x")[int(label)] for name, value in re.findall(r"(\w+)=([\dx_-]+)", _window(instruction))
        }
        products *= _taps(extent, right_sizes[right.index(label)], left_sizes[left.index(label)], window)
    return 2.0 * products


def _window(instruction: Instruction) -> str:
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    return found[1] if found else ""


def _taps(outputs: int, taps: int, inputs: int, window: Mapping[str, str]) -> int:
    """How many pairs of an output and a tap of the window read an input along one dimension."""
    stride, spread = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    apart, before = int(window.get("lhs_dilate", 1)), int(window.get("pad", "0_0").partition("_")[0])
    places = np.arange(outputs)[:, None] * stride + np.arange(taps)[None] * spread - before
    return int(np.sum((places >= 0) & (places <= (inputs - 1) * apart) & (places % apart == 0)))


def _call_flops(instruction: Instruction, operands: Sequence[list], visible_keys: float) -> float:
    """Of a library's matrix product, or of this project's kernels for attention, which their names tell apart."""
    if "cublas" in instruction.attributes and "matmul" in instruction.attributes + "gemm":
        contracted = re.search(r'"lhs_contracting_dimensions":\["?(\d+)', instruction.attributes)
        depth = operands[0][0][1][int(contracted[1])] if contracted else operands[0][0][1][-1]
        return 2.0 * math.prod(arrays(instruction.shape)[0][1]) * depth
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    if source is None or "attention" not in source[1]:
        return 0.0
    kernel = source[1].rpartition("attention_")[2] if "pallas_call" in source[1] else ""
    products = next((count for name, count in ATTENTION_PRODUCTS.items() if name in kernel), 0)
    queries = max((math.prod(dimensions) for operand in operands for _, dimensions in operand), default=0)
    return 2.0 * products * queries * visible_keys


def _communication(
    module: Module, name: str, work: Sequence[float], sizes: Mapping[str, int], hosts: Sequence[int]
) -> Iterator[Communication]:
    """The collectives of one computation; an asynchronous one is at two places or more, and counted once."""
    instructions = module.computations[name]
    shapes = {instruction.name: instruction.shape for instruction in instructions}
    places: dict[tuple[str, int], list[int]] = {}
    found: dict[tuple[str, int], tuple[Instruction, Mapping[str, str]]] = {}
    names: dict[str, tuple[str, int]] = {}  # of the instructions that start something
    for place, instruction in enumerate(instructions):
        if instruction.operation.endswith(("-done", "-update")) and instruction.operands[0] in names:
            names[instruction.name] = key = names[instruction.operands[0]]
            places[key].append(place)
            continue
        for inner, inside in _collectives_in(module, instruction, shapes):
            key = (instruction.name if instruction.operation != "fusion" else "", _channel(inner))
            places.setdefault(key, []).append(place)
            found.setdefault(key, (inner, inside))
            names[instruction.name] = key
    for key, (inner, inside) in found.items():
        first, last = places[key][0], places[key][-1]
        is_async = last > first and '"is_sync":true' not in inner.attributes
        hidden = is_async and sum(work[first : last + 1]) > 0
        yield Communication(_collective(inner, inside, sizes, hosts), key[1], is_async, hidden)


def _collectives_in(
    module: Module, instruction: Instruction, shapes: Mapping[str, str]
) -> Iterator[tuple[Instruction, Mapping[str, str]]]:
    """The collectives that an instruction is, or has inside, and the shapes that are known there."""
    if instruction.operation.removesuffix("-start") in KINDS:
        yield instruction, shapes
    elif instruction.operation in ("fusion", "call-start"):  # calls are started on a TPU's SparseCores
        for called in called_computations(instruction):
            inside = {line.name: line.shape for line in module.computations[called]}
            for line in module.computations[called]:
                for found, known in _collectives_in(module, line, inside):
                    # So a TPU writes one that its TensorCore does, of which only a part comes out.
                    is_scatter = found.operation == "all-reduce" and called.startswith("all-reduce-scatter")
                    yield found._replace(operation="reduce-scatter") if is_scatter else found, known


def _channel(instruction: Instruction) -> int:
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return int(found[1]) if found else 0


def _collective(
    instruction: Instruction, shapes: Mapping[str, str], sizes: Mapping[str, int], hosts: Sequence[int]
) -> Collective:
    """Its bytes, and the mesh axes and hosts of its groups."""
    kind = instruction.operation.removesuffix("-start")
    groups = replica_groups(instruction.attributes, len(hosts))
    members = groups.shape[1]
    operand = sum(size(shapes[name]) for name in instruction.operands)
    places = np.stack(np.unravel_index(groups, tuple(sizes.values())), axis=-1)
    axes = tuple(axis for i, axis in enumerate(sizes) if np.any(places[:, :, i] != places[:, :1, i]))
    together = np.asarray(hosts)[groups]
    in_host = max(int(np.max(np.unique(row, return_counts=True)[1])) for row in together)
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    whole = operand * members if kind == "all-gather" else operand
    return Collective(kind, axes, whole, members, in_host, 1.0, source[1] if source else "")


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """The groups of devices [groups, members] that a collective is among, whatever the notation.

    Lists `{{0,1},{2,3}}`, ranges `[2,2]<=[2,2]T(1,0)`, meshes `mesh['a'=2,'b'=4] {'b'}` with parts of axes
    `'b':(2)2` and an order of devices `device_ids=([2,4]<=[4,2]T(1,0))`; nothing or `{}` is one group of all. The pairs
    of a permutation are groups of two.
    """
    text = re.search(r"(?:replica_groups|source_target_pairs)=(.*)", attributes)
    rest = text[1] if text else "{}"
    if rest.startswith("{{"):
        rows = re.findall(r"\{([\d,]+)\}", rest[: rest.index("}}") + 2])
        return np.array([[int(number) for number in row.split(",")] for row in rows])
    if rest.startswith("["):
        return _range(rest)
    if rest.lstrip("@").startswith("mesh"):
        return _mesh_groups(rest)
    require(rest.startswith("{}"), f"cannot read the devices of a collective: {rest[:80]!r}")
    return np.arange(devices)[None]


def _range(text: str) -> np.ndarray:
    """Numbers in an order: `[2,4]<=[4,2]T(1,0)`, counted from 0 in the second shape, transposed, in the first shape.

    Without the first shape, `[4,2]T(1,0)`, it is that of the transposed numbers. A list may follow a shape, `[2]1,0`,
    or stand alone.
    """
    match = re.match(r"(?:\[([\d,]+)\](?:<=)?)?(?:\[([\d,]+)\])?(?:T\(([\d,]+)\))?(\d[\d,]*)?", text)
    shape, source, order, listed = match.groups()  # type: ignore[union-attr]
    require(bool(shape or listed), f"cannot read the devices of a collective: {text[:80]!r}")
    if listed:
        return np.array(_numbers(listed))
    counted = _numbers(source or shape)
    numbers = np.arange(math.prod(counted)).reshape(counted)
    numbers = numbers.transpose(_numbers(order)) if order else numbers
    return numbers.reshape(_numbers(shape)) if source else numbers


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _mesh_groups(text: str) -> np.ndarray:
    match = re.match(r"@?mesh[\[<]([^\]>]*)[\]>](.*?)\s*\{([^}]*)\}", text)
    require(match is not None, f"cannot read the devices of a collective: {text[:80]!r}")
    axes, order, chosen = match.groups()  # type: ignore[union-attr]
    sizes = {name.strip("' "): int(extent) for name, extent in (axis.split("=") for axis in axes.split(","))}
    listed = re.search(r"device_ids=\((.*)\)|\(devices=(.*)\)", order)
    devices = _range(listed[1] or listed[2]) if listed else np.arange(math.prod(sizes.values()))
    # Every axis is split into before, chosen and after, so that parts of axes are axes of their own.
    shape, grouped = [], []
    parts = {name: (int(before or 1), int(part or 0)) for name, before, part in AXIS_PART.findall(chosen)}
    for name, extent in sizes.items():
        before, part = parts.get(name, (1, 1))
        part = part or extent
        shape += [before, part, extent // (before * part)]
        grouped.append(len(shape) - 2)
    others = [axis for axis in range(len(shape)) if axis not in grouped]
    members = math.prod(shape[axis] for axis in grouped)
    return devices.reshape(shape).transpose(others + grouped).reshape(-1, members)
