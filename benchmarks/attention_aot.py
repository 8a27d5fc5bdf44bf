"""Compiles fused attention for accelerators that are not here, and reads what the compilers made of it.

    make aot
    .venv-aot/bin/python -m benchmarks.attention_aot --targets a100 v5p --cases baichuan2_7b --kernels pallas_gpu xla

Forward, backward and decoding kernels of this project, of JAX itself, and XLA's own unfused attention, bfloat16, at
the models' sizes; decoding over int8 caches too. Prints, per kernel: registers, spills and shared memory and the
occupancy they allow, tensor-core instructions (GPU); final bundles against the matrix units' least, spills, vector
memory (TPU); bytes moved by construction. Then, per pass with all that is around its kernels: bytes moved against the
least possible, products against those of visible pairs alone, tiles visited of all tiles, the largest array. What
cannot be compiled is a row with the reason. Nothing runs, so there are no times: those are for
`benchmarks.attention_device` on a real accelerator.

Rows go to OUTPUT/attention_aot.jsonl, the tables to OUTPUT/attention_aot.md; rows of an earlier run that were not
compiled again stay. Ends with status 1 if nothing compiled. Needs the environment that `make aot` makes.
"""

import argparse
import concurrent.futures
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.aot import table
from benchmarks.aot.cases import CASES, PASSES
from benchmarks.aot.kernels import KERNELS, fits, named
from benchmarks.aot.options import add_names, positive
from llm_jax.errors import UserError, require
from llm_jax.parallel.absent import TARGETS, environment

Job = tuple[str, str, str]  # target, case, kernel
Row = dict[str, Any]
LONGEST_SECONDS = 1800


def jobs(targets: list[str], case_names: list[str], kernel_names: list[str]) -> list[Job]:
    """Every combination that makes sense: kernels of the target's platform and generation."""
    return [
        (target, case, kernel.name)
        for target in targets
        for case in case_names
        for kernel in KERNELS
        if kernel.name in kernel_names and fits(kernel, TARGETS[target].platform, TARGETS[target].compute)
    ]


def run(job: Job) -> list[Row]:
    """The rows of one job, compiled in a process of its own: the compilers read their settings when it starts."""
    target, case, kernel = job
    with tempfile.TemporaryDirectory() as folder:
        variables = environment(TARGETS[target], Path(folder))
        names = [f"--target={target}", f"--case={case}", f"--kernel={kernel}", f"--dump={folder}"]
        command = [sys.executable, "-m", "benchmarks.aot.compile", *names]
        try:
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            return _failed(job, [], f"not done within {LONGEST_SECONDS} s")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return found + _failed(job, found, f"the compiler's process ended with status {done.returncode}: {last}")
    return found


def _failed(job: Job, found: list[Row], reason: str) -> list[Row]:
    """A row for each pass that gave none."""
    target, case, name = job
    missing = [which for which in named(name).passes if which not in {row["pass"] for row in found}]
    head = {"target": target, "case": case, "implementation": name}
    return [head | {"pass": which, "reason": reason} for which in missing]


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """The old rows with those of the same target, case and implementation replaced, in the order of the tables.

    Old rows of what exists no longer are dropped.
    """
    fresh = {_key(row) for row in new}
    names = [kernel.name for kernel in KERNELS]
    orders = ("target", list(TARGETS)), ("case", list(CASES)), ("pass", list(PASSES)), ("implementation", names)
    kept = [row for row in old if all(row[field] in order for field, order in orders)]
    rows = [row for row in kept if _key(row) not in fresh] + new
    return sorted(rows, key=lambda row: [order.index(row[field]) for field, order in orders])


def _key(row: Row) -> tuple[Any, ...]:
    return row["target"], row["case"], row["implementation"]


def write(output: Path, rows: list[Row]) -> str:
    """Write the rows and their tables; return the tables."""
    text = table.compiled(rows, lambda name: TARGETS[name].platform)
    (output / "attention_aot.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (output / "attention_aot.md").write_text(text)
    return text


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_names(parser, "--targets", TARGETS)
    add_names(parser, "--cases", CASES)
    add_names(parser, "--kernels", [kernel.name for kernel in KERNELS])
    parser.add_argument("--jobs", type=positive, default=1, help="compile so many at once; each takes 1 to 3 GB")
    parser.add_argument("--output", type=Path, default=Path("runs/attention_aot"))
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Compile everything that was asked for, writing the tables after every job; the status to end with."""
    options = parse(arguments)
    wanted = jobs(options.targets, options.cases, options.kernels)
    require(bool(wanted), "none of these kernels is written for any of these targets")
    for name in options.targets:
        environment(TARGETS[name], options.output)  # a missing wheel is told before the first compilation
    options.output.mkdir(parents=True, exist_ok=True)
    stored = options.output / "attention_aot.jsonl"
    rows = [json.loads(line) for line in stored.read_text().splitlines()] if stored.exists() else []
    started, text, compiled = time.monotonic(), "", False
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for number, (job, found) in enumerate(zip(wanted, pool.map(run, wanted)), 1):
            compiled |= any("reason" not in row for row in found)
            rows = merge(rows, found)
            text = write(options.output, rows)
            spent = time.monotonic() - started
            left = spent / number * (len(wanted) - number)
            print(f"{number}/{len(wanted)} {' '.join(job)}: {spent:.0f} s, about {left:.0f} s left", file=sys.stderr)
    print(text)
    return 0 if compiled else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
