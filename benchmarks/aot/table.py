"""Rows of measurements as Markdown tables, one for GPUs and one for TPUs."""

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
    except (KeyError, TypeError):
        return "-"


def compiled(rows: list[Row], platform_of: Callable[[str], str]) -> str:
    """The tables of what was compiled, and under them the reasons of what was not."""
    parts = []
    for platform, own in (("gpu", GPU_COLUMNS), ("tpu", TPU_COLUMNS)):
        shown = [row for row in rows if platform_of(row["target"]) == platform and "reason" not in row]
        if shown:
            parts.append(markdown(HEAD | own | COMMON, shown))
    failed = [row for row in rows if "reason" in row]
    if failed:
        parts.append("Not compiled:\n\n" + markdown(HEAD | {"reason": lambda row: row["reason"]}, failed))
    return "\n".join(parts)


def _millions(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / 1e6:,.0f}"


def _tensor(row: Row) -> str:
    return ", ".join(f"{count} {name}" for name, count in row["tensor_instructions"].items()) or "none"


def _largest(row: Row) -> str:
    return row["largest_array"] + (" (scores)" if row["has_scores"] else "")


def _moved(row: Row) -> float:
    """Of Pallas kernels by their construction, of anything else by the operations in its program."""
    return row["moved_bytes"] if "kernel" in row else row["program_bytes"]


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
}
TPU_COLUMNS: Columns = {
    "kernel": lambda row: row["kernel"],
    "bundles": lambda row: str(row["bundles"]),
    "matrix instructions": lambda row: str(row["matrix_instructions"]),
    "over least": lambda row: f"{row['over_least']:.2f}",
    "spills/fills": lambda row: f"{row['spills']}/{row['fills']}",
    "VMEM KiB": lambda row: f"{row['vmem_bytes'] / 1024:,.0f}",
}
COMMON: Columns = {
    "MB moved": lambda row: f"{_moved(row) / 1e6:,.0f}",
    "least MB": _millions("least_bytes"),
    "products over least": lambda row: f"{row['flops'] / row['least_flops']:.2f}",
    "tiles visited": lambda row: f"{row['tiles_visited']:.1%}",
    "temporary MB": _millions("temporary_bytes"),
    "largest array": _largest,
}
