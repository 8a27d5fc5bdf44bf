"""Reading XLA's optimised programs: the largest array in them, and what their operations read and write."""

import re

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
SHAPE = re.compile(r"\b(pred|bf16|f16|f32|f64|[su](?:4|8|16|32|64)|f8\w+)\[([\d,]*)\]")
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<operation>[a-z][\w-]*)\((?P<operands>[^)]*)\)"
)
# These are calls of kernels that Pallas made, whose own traffic is counted by `traffic`.
PALLAS = re.compile(r'custom_call_target="(?:__gpu\$xla\.gpu\.triton|mosaic_gpu|tpu_custom_call)')
# A TPU's arrays in its vector or scalar memory, as their layouts say.
ON_CHIP = re.compile(r"\b\w+\[[\d,]*\]\{[^{}]*T\([^{}]*S\([1-9]\)\}")
# These name memory, and move none.
VIEWS = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id")


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """All shapes in a text, each as (dtype, dimensions)."""
    return [(kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in SHAPE.findall(text)]


def size(kind: str, dimensions: tuple[int, ...]) -> int:
    """Bytes of an array."""
    bits = int(re.sub(r"\D", "", kind)[:2]) if kind not in BYTES and not kind.startswith("f8") else 8
    each = BYTES.get(kind, max(bits // 8, 1))
    for dimension in dimensions:
        each *= dimension
    return each


def in_memory(text: str) -> str:
    """The program without the insides of its fusions and reductions, whose arrays are never in memory."""
    inside = set(re.findall(r"(?:calls|to_apply)=%([\w.-]+)", text))
    blocks = re.split(r"\n(?=(?:ENTRY )?%)", text)
    return "\n".join(block for block in blocks if block.split(" ")[0].lstrip("%") not in inside)


def largest(text: str) -> tuple[str, int]:
    """The largest array of a program as it is written in it, and its bytes."""
    kind, dimensions = max(arrays(text), key=lambda array: size(*array))
    return f"{kind}[{','.join(map(str, dimensions))}]", size(kind, dimensions)


def has_scores(text: str, num_queries: int, num_keys: int) -> bool:
    """Whether any array of a program has a number for every pair of a query and a key."""
    least = min(num_queries, num_keys)
    return any(sum(n >= least for n in dimensions) >= 2 for _, dimensions in arrays(text))


def moved(text: str) -> int | None:
    """Bytes that the entry computation's operations outside of Pallas kernels read from memory and write to it.

    Each array counts once per operation, those in a TPU's own memories not at all. None where there is a loop or a
    branch: how often it runs, and what of its arrays a round takes, is not in the text.
    """
    sizes: dict[str, int] = {}
    read: dict[str, int] = {}  # by operations that are started at one place and done at another
    total = 0
    for line in text.partition("\nENTRY ")[2].splitlines():
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        name, operation = match["name"], match["operation"]
        operands = re.findall(r"%([\w.-]+)", match["operands"])
        sizes[name] = sum(size(*array) for array in arrays(ON_CHIP.sub("", match["shape"])))
        if operation in ("while", "conditional", "call"):
            return None
        if operation.endswith("-start"):
            read[name] = sum(sizes.get(operand, 0) for operand in operands)
        elif operation.endswith("-done"):
            total += sizes[name] + read.pop(operands[0], 0)
        elif operation not in VIEWS and not PALLAS.search(line):
            total += sizes[name] + sum(sizes.get(operand, 0) for operand in operands)
    return total
