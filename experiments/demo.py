"""From public texts to a small pre-trained model, its samples and a report, in about twelve minutes on two cores.

    python -m experiments.demo --config=configs/demo/default.py --workdir=runs/demo

Runs train_tokenizer, prepare_data, pretrain, generate and report, each as the command that is printed, which works
on its own too. Run it again after a stop: finished stages are skipped, pre-training continues from its checkpoint.
Writes to --workdir: tokenizer/, data/, model/, samples/, report.html, report.json, figures/ and stages.json.
"""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import runner
from llm_jax.errors import require

STAGES = "stages.json"


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """The arguments of every stage's command, besides the folders, which follow from the demo's --workdir."""

    train_tokenizer: tuple[str, ...] = ()
    prepare_data: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ()
    generate: tuple[str, ...] = ()
    report: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """One experiment of the chain; it is finished when `output` exists."""

    name: str
    arguments: tuple[str, ...]
    output: Path

    @property
    def command(self) -> str:
        """The command line as a person would type it."""
        return shlex.join(("python", "-m", f"experiments.{self.name}", *self.arguments))

    def finished(self) -> bool:
        """Whether the stage's result is whole; every experiment gives its result its name only then."""
        if self.name == "pretrain":  # the output is the folder of checkpoints; the last one counts
            config = self.output.parent / "config.json"
            return config.is_file() and (self.output / str(json.loads(config.read_text())["steps"])).is_dir()
        return self.output.exists()


def stages(config: DemoConfig, workdir: Path) -> list[Stage]:
    """The chain, each stage reading what those before it wrote."""
    tokenizer, data, model, samples = (workdir / name for name in ("tokenizer", "data", "model", "samples"))
    model_file, sample_file = tokenizer / "tokenizer.model", samples / "samples.json"
    arguments = {
        "train_tokenizer": (f"--workdir={tokenizer}",),
        "prepare_data": (f"--workdir={data}", f"--config.tokenizer={model_file}"),
        "pretrain": (f"--workdir={model}", f"--config.data.dataset={data / 'dataset'}"),
        "generate": (f"--workdir={model}", f"--output={sample_file}"),
        "report": (f"--workdir={workdir}", f"--config.run={model}", f"--config.samples={sample_file}"),
    }
    outputs = {
        "train_tokenizer": tokenizer / "tokenizer_report.json",
        "prepare_data": data / "dataset",
        "pretrain": model / "checkpoints",
        "generate": sample_file,
        "report": workdir / "report.html",
    }
    return [Stage(name, (*getattr(config, name), *arguments[name]), outputs[name]) for name in arguments]


def run(config: DemoConfig, workdir: Path) -> None:
    """Run every stage that is not finished; exits with the status of the first one that fails."""
    chain = stages(config, workdir)
    path = workdir / STAGES
    records = json.loads(path.read_text()) if path.is_file() else {}
    console = Console()
    ran_before = False
    for stage in chain:
        if stage.finished() and not ran_before:
            console.print(f"{stage.name}: finished earlier, skipped ({stage.output})", soft_wrap=True, highlight=False)
            continue
        ran_before = True
        _run_stage(stage, records, path, console)
    console.print(_table(chain, records))
    console.print(f"The report: {workdir / 'report.html'}", soft_wrap=True)


def _run_stage(stage: Stage, records: dict[str, Any], path: Path, console: Console) -> None:
    """Run one command, note its time (added to that of earlier tries), and stop the chain if it did not finish."""
    console.print(f"\n$ {stage.command}", style="bold", soft_wrap=True, highlight=False, markup=False)
    started = time.monotonic()
    status = execute([sys.executable, "-m", f"experiments.{stage.name}", *stage.arguments])
    seconds = time.monotonic() - started + records.get(stage.name, {}).get("seconds", 0.0)
    records[stage.name] = {"command": stage.command, "seconds": round(seconds, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=2) + "\n")
    if status:
        console.print(f"stopped at {stage.name} (status {status}); run the same command again to continue")
        sys.exit(status)
    require(stage.finished(), f"{stage.name} stopped before its end; run the same command again to continue")


def execute(command: list[str]) -> int:
    """Run a command to its end and return its exit status, as a shell counts it (128 + signal).

    While it runs, Ctrl-C and SIGTERM are left to the command, which knows how to stop without losing work.
    """
    with subprocess.Popen(command) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGTERM:  # a terminal sends SIGINT to the command as well
                process.terminate()

        previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _table(chain: list[Stage], records: dict[str, Any]) -> Table:
    """The time of every stage, over all tries."""
    result = Table(title="The demo")
    result.add_column("stage")
    result.add_column("seconds", justify="right")
    result.add_column("result")
    times = {stage.name: records.get(stage.name, {}).get("seconds", 0.0) for stage in chain}
    for stage in chain:
        result.add_row(stage.name, f"{times[stage.name]:,.1f}", str(stage.output))
    result.add_section()
    result.add_row("all", f"{sum(times.values()):,.1f}", "")
    return result


if __name__ == "__main__":
    runner.main(run, DemoConfig, "configs/demo/default.py", workdir="runs/demo", save_config=False)
