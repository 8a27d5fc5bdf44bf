"""Times and correctness of the attention kernels on the GPU or TPU of this machine, as a table.

    python -m benchmarks.attention_device --output=runs/attention_device
    python -m benchmarks.attention_device --interpret --output=runs/try      # on a CPU, tiny: only whether all runs

Every implementation of the platform, this project's and JAX's own, at the models' sizes, bfloat16: forward, forward
and backward together, decoding over a cache in bfloat16 and in int8. Errors are relative (L2) to plain JAX in float32
on the same numbers (in training the chunked attention), for the output and each gradient. Rates count the products of
visible pairs alone, two forward and seven with the backward pass, whatever a kernel really does; beside them is what
the device reaches on a large matrix product now, and its peak.
Writes OUTPUT/attention_device.csv and .md; a row that failed has the reason.
"""

import argparse
import csv
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.aot import cases, table
from benchmarks.aot.cases import CASES, Case
from benchmarks.aot.compile import one_line
from benchmarks.aot.kernels import KERNELS, Kernel, fits, named
from benchmarks.aot.options import add_names, positive
from llm_jax.errors import UserError, require
from llm_jax.kernels import choice
from llm_jax.kernels.chunked import chunked_attention
from llm_jax.parallel import hardware

Row = dict[str, Any]
TINY = {
    case.name: case
    for case in (
        Case("tiny", 64, 2, 2, 64, decode_batch=2),
        Case("tiny_alibi", 64, 2, 2, 64, alibi=True, decode_batch=2),
        Case("tiny_window", 64, 2, 1, 64, window=16, decode_batch=2),
    )
}
MEASURES = ("forward", "training", *cases.DECODING)


def seconds(function: Callable[..., Any], arguments: tuple[Any, ...], rounds: int, calls: int) -> float:
    """Median over rounds of the time of one call, of `calls` in a row."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def gemm_rate(size: int, rounds: int) -> float:
    """Operations a second of a square matrix product in bfloat16 on this device."""
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), (left, right), rounds, 10)


def draw(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[jax.Array, ...]:
    """Normal numbers, or any codes for int8."""
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return tuple(_draw(key, x) for key, x in zip(keys, shapes))


def _draw(key: jax.Array, x: jax.ShapeDtypeStruct) -> jax.Array:
    if x.dtype == jnp.int8:
        return jax.random.randint(key, x.shape, -127, 128, jnp.int8)
    return jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)


def draw_cache(case: Case, which: str, dtype: str) -> tuple[jax.Array, ...]:
    """The arguments of decoding: every slot is written, and the scales of codes make them about normal."""
    q, k, v, lengths, *scales = cases.decode_inputs(case, which, dtype)
    full_B = jnp.full(lengths.shape, case.length, jnp.int32)
    uniform = 127 / 3**0.5  # the standard deviation of the codes
    return *draw((q, k, v)), full_B, *(jnp.full(x.shape, 1 / uniform, x.dtype) for x in scales)


def gradients(run: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Output and gradients of `run` for a given gradient of the output."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, pullback = jax.vjp(run, q, k, v)
        return out, *pullback(dout)

    return both


def error(expected: jax.Array, actual: jax.Array) -> float:
    """Relative, in L2."""
    expected, actual = expected.astype(jnp.float32), actual.astype(jnp.float32)
    return float(jnp.linalg.norm((expected - actual).ravel()) / jnp.linalg.norm(expected.ravel()))


def measure(kernel: Kernel, case: Case, options: argparse.Namespace) -> list[Row]:
    """A row for each measure of one implementation."""
    extra = {"interpret": True} if options.interpret and kernel.interprets else {}
    decoding = tuple(which for which in kernel.passes if which in cases.DECODING)
    head = {"case": case.name, "implementation": kernel.name}
    rows = []
    for which in decoding or ("forward", "training"):
        try:
            run = kernel.build(case, **extra)
            rows.append(head | {"measure": which} | _measured(run, kernel, case, which, options))
        except Exception as reason:  # a kernel that cannot do this case, or that the device refuses
            rows.append(head | {"measure": which, "reason": one_line(reason)})
    return rows


def _measured(
    run: Callable[..., jax.Array], kernel: Kernel, case: Case, which: str, options: argparse.Namespace
) -> Row:
    function: Callable[..., Any]
    arguments: tuple[jax.Array, ...]
    wanted: tuple[jax.Array, ...]
    if which in cases.DECODING:
        function, arguments = run, draw_cache(case, which, kernel.dtype)
        wanted, flops = (_exact_decoding(case, arguments),), cases.least_flops(case, which)
    else:
        queries, *keys = cases.inputs(case, kernel.dtype)
        arguments = draw((queries, *keys, queries))
        wanted, flops = _exact(case, arguments), cases.least_flops(case, "forward")
        function = gradients(run)
        if which == "forward":
            function, arguments, wanted = run, arguments[:3], wanted[:1]
        else:
            flops += cases.least_flops(case, "backward")
    compiled = jax.jit(function)
    found = jax.tree.leaves(compiled(*arguments))
    errors = dict(zip(("error", "error_dq", "error_dk", "error_dv"), map(error, wanted, found)))
    spent = seconds(compiled, arguments, options.rounds, options.calls)
    return {"seconds": spent, "rate": flops / spent, **errors}


def _exact(case: Case, arguments: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Output and gradients of the same numbers in float32."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return chunked_attention(q, k, v, case.mask())

    with jax.default_matmul_precision("highest"):
        return jax.jit(gradients(run))(*(x.astype(jnp.float32) for x in arguments))


def _exact_decoding(case: Case, arguments: tuple[jax.Array, ...]) -> jax.Array:
    """The output of the same numbers in float32."""
    wide = (x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arguments)
    with jax.default_matmul_precision("highest"):
        result: jax.Array = jax.jit(named("xla_decode").build(case))(*wide)
    return result


def _share(base: str) -> Callable[[Row], str]:
    return lambda row: f"{row['rate'] / row[base]:.1%}"


COLUMNS: table.Columns = {
    "case": lambda row: row["case"],
    "measure": lambda row: row["measure"],
    "implementation": lambda row: row["implementation"],
    "ms": lambda row: f"{1e3 * row['seconds']:.3f}",
    "TFLOP/s": lambda row: f"{row['rate'] / 1e12:.1f}",
    "of a matrix product's rate": _share("gemm_rate"),
    "of the peak": _share("peak"),
    "error": lambda row: f"{row['error']:.1e}",
    "error of gradients": lambda row: f"{max(row[name] for name in ('error_dq', 'error_dk', 'error_dv')):.1e}",
    "reason": lambda row: row["reason"],
}


def write(output: Path, device_kind: str, rate: float, rows: list[Row]) -> str:
    """Write the rows as CSV and as a table; return the table."""
    rows = [row | {"gemm_rate": rate, "peak": hardware.peak_of(device_kind)} for row in rows]
    text = f"{device_kind}, matrix product {rate / 1e12:.1f} TFLOP/s\n\n" + table.markdown(COLUMNS, rows)
    (output / "attention_device.md").write_text(text)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(output / "attention_device.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return text


def chosen(options: argparse.Namespace) -> tuple[list[Kernel], list[Case]]:
    """The implementations and cases to run here. Raises `UserError` on a CPU that is not to interpret."""
    platform, _ = choice.device()
    require(platform != "cpu" or options.interpret, "no GPU or TPU here: --interpret runs tiny cases on the CPU")
    asked = [named(name) for name in options.kernels]
    if options.interpret:
        plain = ("chunked", "xla", "xla_decode")
        return [kernel for kernel in asked if kernel.interprets or kernel.name in plain], list(TINY.values())
    kernels = [kernel for kernel in asked if fits(kernel, platform, compute_capability())]
    return kernels, [CASES[name] for name in options.cases]


def compute_capability() -> tuple[int, int]:
    """Of this machine's NVIDIA GPU, such as (9, 0); (0, 0) for any other device."""
    version = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.devices()[0], "compute_capability", "")))
    return (int(version[1]), int(version[2])) if version else (0, 0)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_names(parser, "--cases", CASES)
    add_names(parser, "--kernels", [kernel.name for kernel in KERNELS])
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--calls", type=positive, default=10, help="calls in a row that are timed together")
    parser.add_argument("--interpret", action="store_true", help="tiny cases on the CPU, to see that everything runs")
    parser.add_argument("--output", type=Path, default=Path("runs/attention_device"))
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure everything, writing the table after every implementation."""
    options = parse(arguments)
    kernels, sizes = chosen(options)
    options.output.mkdir(parents=True, exist_ok=True)
    device_kind = choice.device()[1]
    rate, rows, text = gemm_rate(256 if options.interpret else 8192, options.rounds), [], ""
    for case in sizes:
        for kernel in kernels:
            print(f"{case.name} {kernel.name}", file=sys.stderr)
            rows += measure(kernel, case, options)
            text = write(options.output, device_kind, rate, rows)
    print(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
