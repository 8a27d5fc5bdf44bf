"""Rows of measurements as Markdown tables: kernels on GPUs, kernels on TPUs, whole passes, and what is missing."""

import operator
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def markdown(columns: Columns, rows: Iterable[Row]) -> str:
    """A table with a line per row; a cell whose number a row does not have shows a dash."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(show, row) for show in columns.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(show: Callable[[Row], str], row: Row) -> str:
    try:
        return show(row).replace("|", "\\|")
    except (KeyError, TypeError, ZeroDivisionError):
        return "-"


def compiled(rows: list[Row], platform_of: Callable[[str], str]) -> str:
    """The tables of what was compiled, and under them the reasons of what was not, or was but could not be counted."""
    parts = []
    for platform, own in (("gpu", GPU_COLUMNS), ("tpu", TPU_COLUMNS)):
        kernels = [row for row in rows if platform_of(row["target"]) == platform and "kernel" in row]
        if kernels:
            parts.append(markdown(HEAD | own, kernels))
    whole = [row for row in rows if "least_bytes" in row]
    if whole:
        parts.append(markdown(HEAD | PASS_COLUMNS, whole))
    for title, field in (("Not compiled", "reason"), ("Bytes and products not counted", "not_counted")):
        failed = [row for row in rows if field in row]
        if failed:
            parts.append(f"{title}:\n\n" + markdown(HEAD | {"reason": operator.itemgetter(field)}, failed))
    return "\n".join(parts)


def _millions(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / 1e6:,.0f}"


def _tensor(row: Row) -> str:
    return ", ".join(f"{count} {name}" for name, count in row["tensor_instructions"].items()) or "none"


def _tiles(row: Row) -> str:
    return f"{row['flops'] / row['dense_flops']:.1%}"


def _largest(row: Row) -> str:
    return row["largest_array"] + (" (scores)" if row["has_scores"] else "")


def moved(row: Row) -> float:
    """Bytes of a whole pass: of its Pallas kernels by their construction and of XLA's operations around them.

    Raises TypeError or KeyError where one of the two could not be counted.
    """
    kernels = row["moved_bytes"] if "not_counted" in row else row.get("moved_bytes", 0)
    return float(kernels + row["outside_bytes"])


HEAD: Columns = {
    "device": lambda row: row["target"],
    "case": lambda row: row["case"],
    "pass": lambda row: row["pass"],
    "implementation": lambda row: row["implementation"],
}
GPU_COLUMNS: Columns = {
    "kernel": lambda row: row["kernel"],
    "registers": lambda row: str(row["registers"]),
    "spilled bytes": lambda row: "/".join(map(str, row["spilled_bytes"])),
    "shared KiB": lambda row: f"{row['shared_bytes'] / 1024:.0f}",
    "threads": lambda row: str(row["threads"]),
    "occupancy": lambda row: f"{row['occupancy']:.1%} ({row['occupancy_limit']})",
    "tensor cores": _tensor,
    "MB moved": _millions("moved_bytes"),
    "tiles visited": _tiles,
}
TPU_COLUMNS: Columns = {
    "kernel": lambda row: row["kernel"],
    "bundles": lambda row: str(row["bundles"]),
    "matrix instructions": lambda row: str(row["matrix_instructions"]),
    "over least": lambda row: f"{row['over_least']:.2f}",
    "spills/fills": lambda row: f"{row['spills']}/{row['fills']}",
    "VMEM KiB": lambda row: f"{row['vmem_bytes'] / 1024:,.0f}",
    "MB moved": _millions("moved_bytes"),
    "tiles visited": _tiles,
}
PASS_COLUMNS: Columns = {
    "MB moved": lambda row: f"{moved(row) / 1e6:,.0f}",
    "of it outside kernels": _millions("outside_bytes"),
    "least MB": _millions("least_bytes"),
    "products over least": lambda row: f"{row['flops'] / row['least_flops']:.2f}",
    "tiles visited": _tiles,
    "temporary MB": _millions("temporary_bytes"),
    "largest array": _largest,
}
