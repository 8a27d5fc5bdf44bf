"""Reading the TPU's compiler: a kernel's final bundles, how full its matrix units are, spills and vector memory.

A bundle is what a core issues in a cycle, at best. The matrix units' least is the cycles that they alone would take
for the same products, each unit taking one row of 128 numbers a cycle; bundles over that least is the figure of merit:
1.0 is a kernel whose other work hides behind its products altogether.
"""

import json
import re
from pathlib import Path

from llm_jax.parallel.absent import Target

UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"
BUNDLES = "-final_bundles.txt"
ROWS = {"f32": 8, "bf16": 16, "f16": 16, "s8": 32, "u8": 32}  # that one instruction hands to a matrix unit

PRODUCT = re.compile(r"= vmatmul\.(?:mubr\.|msk\.|mskw\.)*(\w+)")
LABEL = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(L[HBE]|P[BF]|CT)?\s*:")
BRANCH = re.compile(r"\bsbr\.rel\b")
# Metadata may have line ends in it, so that an instruction goes on up to the next one.
INSTRUCTION = re.compile(
    r"%([\w.-]+) = [^\n]*?custom_call_target=\"tpu_custom_call\".*?(?=\n\s*(?:ROOT )?%|\n}\n|\Z)", re.DOTALL
)


def parse_utilization(text: str) -> dict[str, int]:
    """The number of bundles, and of each unit's slots in use over all of them, from the compiler's static table."""
    lines = text.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    start = next(number for number, line in enumerate(lines) if line.startswith("== UTILIZATION")) + 1
    rows = [[int(n) for n in line.split()] for line in lines[start:] if line.strip()]
    return {"bundles": len(rows)} | {name: sum(row[i] for row in rows) for i, name in enumerate(names)}


def parse_blocks(text: str) -> list[tuple[int, int]]:
    """Straight runs of bundles with products in them: (bundles, rows handed to the matrix units), in order."""
    blocks: list[list[int]] = [[0, 0]]
    for line in text.splitlines():
        match = LABEL.match(line)
        if match is None:
            continue
        if match[1]:
            blocks.append([0, 0])
        blocks[-1][0] += 1
        blocks[-1][1] += sum(ROWS.get(kind, 8) for kind in PRODUCT.findall(line))
        if BRANCH.search(line):
            blocks.append([0, 0])
    return [(bundles, rows) for bundles, rows in blocks if rows]


def scoped_memory(hlo: str) -> dict[str, int]:
    """Vector memory in bytes of each Pallas kernel, by the name of its instruction in the optimised HLO."""
    found = {}
    for match in INSTRUCTION.finditer(hlo):
        used = re.search(r'"used_scoped_memory_configs":(\[[^\]]*\])', match[0])
        sizes = [int(entry["size"]) for entry in json.loads(used[1])] if used else []
        found[match[1]] = max(sizes, default=0)
    return found


def kernels(target: Target, files: list[Path], hlo: str) -> list[dict[str, object]]:
    """One entry per kernel that Pallas made, from the files that one compilation wrote and its optimised HLO."""
    entries = []
    for name, memory in scoped_memory(hlo).items():
        tables = [file for file in files if f"-{name}-" in file.name and file.name.endswith(UTILIZATION)]
        bundles = [file for file in files if f"-{name}-" in file.name and file.name.endswith(BUNDLES)]
        if tables and bundles:
            entries.append({"kernel": name, **_figures(target, tables[0], bundles[0]), "vmem_bytes": memory})
    return entries


def _figures(target: Target, table: Path, bundles: Path) -> dict[str, object]:
    used = parse_utilization(table.read_text())
    text = bundles.read_text()
    blocks = parse_blocks(text)
    rows = sum(rows for _, rows in blocks)
    return {
        "bundles": used["bundles"],
        "product_bundles": sum(count for count, _ in blocks),
        "matrix_instructions": len(PRODUCT.findall(text)),
        "matrix_least": rows / target.matrix_units,
        "over_least": sum(count for count, _ in blocks) * target.matrix_units / rows if rows else None,
        "spills": used["VSTORE:SPILL"],
        "fills": used["VLOAD:FILL"],
    }
