"""Finds block sizes for a fused attention kernel: times every candidate, or compiles them where there is no device.

    python -m benchmarks.tune_attention --kernel=pallas_gpu --case=baichuan2_7b
    .venv-aot/bin/python -m benchmarks.tune_attention --kernel=pallas_gpu --case=baichuan2_7b --aot=a100

On a GPU or TPU each candidate's pass is timed. With --aot nothing runs: candidates are compiled for the named device
and ranked, on a GPU by spilled bytes, then by bytes moved, then by the warps that fit on a multiprocessor; on a TPU by
bundles over the matrix units' least, which includes what spills cost, then by bytes moved. The three kernels are
searched one after the other, each with the best of the ones before. Ends with the entry to paste into the module's
table. Candidates that a compiler or the device refuses are listed with the reason.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.aot import tiles
from benchmarks.aot.cases import CASES, Case
from benchmarks.aot.kernels import KERNELS, Kernel, fits, named
from benchmarks.aot.options import positive
from llm_jax.errors import UserError, require
from llm_jax.parallel.absent import TARGETS, environment

Row = dict[str, Any]
TUNED = [kernel.name for kernel in KERNELS if kernel.module]


def timed(kernel: Kernel, case: Case, candidates: list[Any], which: str, options: argparse.Namespace) -> list[Row]:
    """A row per candidate with the seconds of its pass, forward or backward, on this machine's device."""
    import jax

    from benchmarks import attention_device

    shapes, extra = attention_device.cases.inputs(case), {"interpret": True} if options.interpret else {}
    arguments = attention_device.draw((*shapes, shapes[0]))
    rows = []
    for blocks in candidates:
        row: Row = {"blocks": tiles.as_lists(blocks)}
        try:
            run = kernel.build(case, blocks=blocks, **extra)
            function = jax.jit(run if which == "forward" else attention_device.gradients(run))
            used = arguments[:3] if which == "forward" else arguments
            row["seconds"] = attention_device.seconds(function, used, options.rounds, options.calls)
        except Exception as reason:  # too large for the device
            row["reason"] = attention_device.one_line(reason)
        report(row)
        rows.append(row)
    return rows


def compiled(kernel: Kernel, case: Case, candidates: list[Any], which: str, options: argparse.Namespace) -> list[Row]:
    """The rows of each candidate, compiled for the absent device `options.aot`.

    A candidate that ends the compiler's process, as a lack of memory or a fault of the compiler do, is a reason, and
    the ones after it get a new process. Raises `UserError` if the process cannot even start.
    """
    rows: list[Row] = []
    left = [tiles.as_lists(blocks) for blocks in candidates]
    while left:
        found, status = _compile(kernel, case, left, which, options)
        rows += found
        done = [row["blocks"] for row in found]
        left = [blocks for blocks in left if blocks not in done]
        if left:
            require(status < 0, f"compiling for {options.aot} ended with status {status}; the error is above")
            rows.append({"blocks": left.pop(0), "reason": f"the compiler's process was ended by signal {-status}"})
            report(rows[-1])
    return rows


def _compile(
    kernel: Kernel, case: Case, candidates: list[Any], which: str, options: argparse.Namespace
) -> tuple[list[Row], int]:
    """What one process makes of the candidates until its end, and its exit status."""
    sizes = [json.dumps(blocks) for blocks in candidates]
    with tempfile.TemporaryDirectory() as folder:
        names = [f"--target={options.aot}", f"--case={case.name}", f"--kernel={kernel.name}", f"--dump={folder}"]
        command = [sys.executable, "-m", "benchmarks.aot.compile", *names, f"--pass={which}"]
        command += [f"--head_dim={case.head_dim}", "--blocks", *sizes]
        variables = environment(TARGETS[options.aot], Path(folder))
        rows = []
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    rows.append(json.loads(line))
                    report(rows[-1])
    return rows, process.returncode


def report(row: Row) -> None:
    """One line of progress."""
    shown = ("kernel", "seconds", "registers", "spilled_bytes", "occupancy", "over_least", "spills", "reason")
    figures = " ".join(f"{name}={row[name]}" for name in shown if row.get(name) is not None)
    if figures:  # the row of a whole pass has none of these
        print(f"{row['blocks']} {figures}", file=sys.stderr)


def rank(rows: list[Row], field: str) -> list[list[list[int]]]:
    """The candidates that worked, best first. `field` names the kernel that differs between them."""
    by_blocks: dict[str, list[Row]] = {}
    for row in rows:
        by_blocks.setdefault(json.dumps(row["blocks"]), []).append(row)
    good = {key: found for key, found in by_blocks.items() if not any("reason" in row for row in found)}
    return [json.loads(key) for key in sorted(good, key=lambda key: _cost(good[key], field))]


def _cost(rows: list[Row], field: str) -> tuple[float, ...]:
    if "seconds" in rows[0]:
        return (rows[0]["seconds"],)
    kernels = [row for row in rows if "kernel" in row]
    if not kernels:
        return (math.inf,)
    own = [row for row in kernels if field in row["kernel"]] or kernels
    moved = sum(row.get("moved_bytes", math.inf) for row in kernels)
    if "over_least" in own[0]:
        return max(row["over_least"] or 0.0 for row in own), moved
    spilled = sum(sum(row.get("spilled_bytes", ())) for row in own)
    return spilled, moved, -min(row.get("occupancy", 0.0) for row in own)


def search(kernel: Kernel, case: Case, options: argparse.Namespace) -> Any:
    """The best blocks, one kernel of the module after the other."""
    blocks = tiles.default_blocks(kernel.module, case.head_dim)
    for field, which in tiles.PASSES_OF.items():
        candidates = tiles.candidates(kernel.module, blocks, field)[: options.most]
        print(f"{field}: {len(candidates)} candidates", file=sys.stderr)
        look = compiled if options.aot else timed
        ranked = rank(look(kernel, case, candidates, which, options), field)
        require(bool(ranked), f"{kernel.name}: no candidate for {field} works; the reasons are above")
        blocks = tiles.from_lists(kernel.module, ranked[0])
    return blocks


def check_device(kernel: Kernel, options: argparse.Namespace) -> None:
    """Raise `UserError` if the kernel is not for the device that it is to be tuned for, or if there is none."""
    if options.aot:
        target = TARGETS[options.aot]
        suits = fits(kernel, target.platform, target.compute)
        require(suits, f"{kernel.name} is not written for --aot={options.aot}")
    elif not options.interpret:
        from benchmarks import attention_device
        from llm_jax.kernels import choice

        platform, kind = choice.device()
        suits = fits(kernel, platform, attention_device.compute_capability())
        ways = "--aot=DEVICE compiles for one that is not here, --interpret tries a tiny case on the CPU"
        require(suits, f"{kernel.name} is not written for what is here ({kind}): {ways}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=TUNED, required=True)
    parser.add_argument("--case", choices=CASES, default="baichuan2_7b")
    parser.add_argument("--head_dim", type=int, help="in place of the case's own")
    parser.add_argument("--aot", choices=TARGETS, help="compile for this absent device instead of timing")
    parser.add_argument("--most", type=positive, default=1000, help="candidates per kernel at most")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--calls", type=positive, default=10)
    parser.add_argument("--interpret", action="store_true", help="a tiny case on the CPU, to see that everything runs")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Search, and print the entry of the table."""
    options = parse(arguments)
    kernel, case = named(options.kernel), CASES[options.case]
    check_device(kernel, options)
    if options.interpret:
        case = Case("tiny", 64, 2, 2, 64)
    if options.head_dim:
        case = case._replace(head_dim=options.head_dim)
    blocks = search(kernel, case, options)
    print(f"head dim {case.head_dim}, bfloat16: {tiles.entry(blocks)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
