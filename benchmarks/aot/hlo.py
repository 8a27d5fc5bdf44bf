"""Reading XLA's optimised programs: the largest array in them, and what their operations read and write."""

import re

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
SHAPE = re.compile(r"\b(pred|bf16|f16|f32|f64|[su](?:4|8|16|32|64)|f8\w+)\[([\d,]*)\]")
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<operation>[a-z][\w-]*)\((?P<operands>[^)]*)\)"
)
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


def moved(text: str) -> int:
    """Bytes that the operations of the entry computation read and write, each array once per operation."""
    sizes: dict[str, int] = {}
    total = 0
    for line in text.partition("\nENTRY ")[2].splitlines():
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        sizes[match["name"]] = sum(size(*array) for array in arrays(match["shape"]))
        if match["operation"] not in VIEWS and not match["operation"].endswith("-done"):
            operands = re.findall(r"%([\w.-]+)", match["operands"])
            total += sizes[match["name"]] + sum(sizes.get(name, 0) for name in operands)
    return total
