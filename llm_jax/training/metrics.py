"""Where a run's numbers go: `metrics.jsonl`, TensorBoard and a progress line; and how fast the hardware could be."""

import functools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from llm_jax.parallel import hardware

FILE = "metrics.jsonl"
FAILED = "failed"  # the kind of the record that ends a diverged run


def peak_flops() -> float | None:
    """FLOP/s of all devices together: from the table, on a CPU as the first process has measured its own.

    None for a device that is not in the table.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return gemm_flops() if jax.process_index() == 0 else None
    peak = hardware.peak_of(device.device_kind)
    return peak * jax.device_count() if peak else None


@functools.cache
def gemm_flops(size: int = 2048, repeats: int = 5) -> float:
    """The FLOP/s of a float32 [size, size] matrix product on the default device: median of `repeats`, measured once."""
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / median(seconds)


class Recorder:
    """Writes records to `workdir/metrics.jsonl` and TensorBoard, and shows the progress of a run.

    Records past `start_step` are dropped when a run resumes there, so that the file is always one run's curve.
    Only the first process writes. `shows=False` leaves out the progress.
    """

    def __init__(self, workdir: Path, start_step: int, total_steps: int, shows: bool = True) -> None:
        self._shows = shows and jax.process_index() == 0
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        path = workdir / FILE
        keep_until(path, start_step)
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console, disable=not (shows and self._console.is_terminal))
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, status="compiling")
        self._progress.start()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if not self._writes:
            return
        self._progress.stop()
        if kind is None:  # on a full disk TensorBoard's thread has ended, and closing would wait for it for ever
            self._file.close()
            self._tensorboard.close()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._shows:
            self._progress.update(self._task, completed=step)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append one record; `kind` is "train", "heldout", or `FAILED`."""
        if not self._writes:
            return
        record = {"kind": kind, "step": step, **{name: _plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, float):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def status(self, step: int, total_steps: int, text: str, seconds_left: float) -> None:
        """Show `text` beside the bar, or as a line where there is no terminal."""
        if not self._shows:
            return
        if self._console.is_terminal:
            self._progress.update(self._task, status=text)
        else:
            self._console.print(f"step {step}/{total_steps} {text} left {seconds_left:.0f} s", soft_wrap=True)


def _plain(value: float) -> float | int:
    return int(value) if isinstance(value, int | np.integer) else float(value)


def keep_until(path: Path, step: int) -> None:
    """Drop a file's records of later steps, and lines that are no records, as a last one that was cut short."""
    if not path.exists():
        return
    kept = [f"{line}\n" for line in path.read_text().splitlines() if _step(line) <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)


def _step(line: str) -> float:
    """The step of a record; infinite for a line that is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, IndexError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def read(workdir: Path, kind: str) -> list[dict[str, float]]:
    """All records of one kind, in order."""
    lines = (workdir / FILE).read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
