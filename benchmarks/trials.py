"""How many of a sweep's smallest trials are trained in an hour, in six ways.

    python -m benchmarks.trials [--config=configs/scaling_laws/cpu.py] [--trials=10] [--rounds=1]

The trials of least compute of a study's grid. One after the other:

- alone: `python -m experiments.pretrain` for each, which compiles for itself;
- processes: the same, and they share a compilation cache;
- one_process: in one process, as a sweep of `launcher.together=1` trains them;
- together: in one process, those of one shape in one compiled step.

As many at once as the machine has cores, each process with cores of its own, through the launcher `processes`:

- processes_at_once: every trial in a process of its own, with a shared compilation cache;
- sweep: those of one shape in one process and one compiled step, as the sweep of configs/scaling_laws/cpu.py trains
  them.

No way finds anything compiled when it starts, and each writes to folders of its own; the ways take turns. Prints one
JSON line per way; the ratios named `speed_over_...` are medians of those within a round.
`busy_elsewhere` is the share of the machine that other programs took meanwhile; `processor_seconds` suffer less from
them. The dataset is made in the study's --workdir, if it is not there.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.peers.turns import ROOT, machine_busy_seconds
from experiments import runner, scaling_laws
from experiments.trials import execute
from llm_jax import config as config_lib
from llm_jax.errors import require
from llm_jax.scaling import launch, sweep
from llm_jax.scaling.config import ScalingConfig
from llm_jax.scaling.trial import CONFIG, Trial

WAYS = ("alone", "processes", "one_process", "together", "processes_at_once", "sweep")


def smallest(study: ScalingConfig, count: int) -> list[Trial]:
    """The trials of least compute of the study's grid."""
    return sorted(sweep.expand(study)[0], key=lambda trial: trial.compute)[:count]


def groups_of(way: str, study: ScalingConfig, trials: Sequence[Trial]) -> list[list[Trial]]:
    """Which trials train in one compiled step."""
    most = study.launcher.together if way in ("together", "sweep") else 1
    return sweep.together(trials, dataclasses.replace(study.launcher, together=most))


def train(way: str, study: ScalingConfig, trials: Sequence[Trial], folder: Path) -> None:
    """Train all trials in one way."""
    groups = groups_of(way, study, trials)
    if way in ("processes_at_once", "sweep"):
        at_once = dataclasses.replace(study.launcher, kind="processes", parallel=os.cpu_count() or 1, retries=0)
        problems = launch.run(groups, execute, at_once, folder, console=Console(quiet=True), poll_seconds=0.2)
        require(not problems, "; ".join(problems.values()))
        return
    files = [[str(folder / trial.name / CONFIG) for trial in group] for group in groups]
    if way in ("one_process", "together"):
        return _wait_for("benchmarks.peers.sweep", json.dumps(files))
    for trial in trials:
        if way == "alone":
            shutil.rmtree(folder / "cache", ignore_errors=True)
        path = folder / trial.name
        _wait_for("experiments.pretrain", f"--config={path / CONFIG}", f"--workdir={path}")


def _wait_for(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True, capture_output=True)


def take_turn(way: str, study: ScalingConfig, trials: Sequence[Trial], folder: Path) -> dict[str, float]:
    """Train all trials in one way, from nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    for trial in trials:
        config_lib.save(trial.config, folder / trial.name / CONFIG)
    os.environ |= {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    start, busy, own = time.perf_counter(), machine_busy_seconds(), _processor_seconds()
    train(way, study, trials, folder)
    seconds, processor = time.perf_counter() - start, _processor_seconds() - own
    elsewhere = machine_busy_seconds() - busy - processor
    capacity = seconds * (os.cpu_count() or 1)
    return {"seconds": seconds, "processor_seconds": processor, "busy_elsewhere": max(0.0, elsewhere / capacity)}


def _processor_seconds() -> float:
    """Of all programs that this one has run."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def report(way: str, count: int, turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The JSON line of one way."""

    def median(key: str) -> float:
        return statistics.median(turn[key] for turn in turns[way])

    def ratio(other: str, key: str) -> float:
        pairs = zip(turns[other], turns[way], strict=True)
        return round(statistics.median(theirs[key] / ours[key] for theirs, ours in pairs), 2)

    return {
        "benchmark": "trials",
        "implementation": way,
        "trials": count,
        "rounds": len(turns[way]),
        "seconds": round(median("seconds"), 1),
        "processor_seconds": round(median("processor_seconds"), 1),
        "busy_elsewhere": round(median("busy_elsewhere"), 3),
        "trials_per_hour": round(3600 * count / median("seconds")),
        "speed_over_alone": ratio("alone", "seconds"),
        "speed_over_processes": ratio("processes", "seconds"),
        "speed_over_processes_at_once": ratio("processes_at_once", "seconds"),
        "processor_speed_over_alone": ratio("alone", "processor_seconds"),
    }


def main(arguments: list[str]) -> None:
    """Measure all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/scaling_laws/cpu.py", help="a study")
    parser.add_argument("--trials", type=int, default=10, help="how many of its smallest")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workdir", default="runs/benchmark_trials", help="for the dataset and the runs")
    options = parser.parse_args(arguments)
    workdir = Path(options.workdir).absolute()
    study = scaling_laws.with_dataset(runner.load_config(options.config, ScalingConfig), workdir)
    trials = smallest(study, options.trials)
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            turns[way].append(take_turn(way, study, trials, workdir / way))
    for way in WAYS:
        print(json.dumps(report(way, len(trials), turns)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
