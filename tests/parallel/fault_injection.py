"""A supervised pre-training whose processes are killed and frozen and whose hosts are lost, and what became of it.

    python -m tests.parallel.fault_injection CONFIG.json FOLDER FAULTS SEED

trains once undisturbed in one process and once on four simulated hosts with so many faults, prints what each cost, and
compares the two runs: every step's loss, and the rows of data that every step took. Writes FOLDER/overlay.png.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm_jax.training import metrics

ROOT = Path(__file__).parents[2]
KILL, FREEZE, LOSE = "kill", "freeze", "lose"
WAIT_SECONDS = 300.0


def environment() -> dict[str, str]:
    """One simulated device for each process, and collectives between processes."""
    return {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }


def training(config: Path, workdir: Path) -> list[str]:
    """The command that is supervised."""
    return ["python", "-m", "tests.parallel.elastic_worker", f"--config={config}", f"--workdir={workdir}"]


def run_alone(arguments: Sequence[str]) -> None:
    """Run a training in one process, without a supervisor."""
    subprocess.run([sys.executable, *arguments], env=environment(), cwd=ROOT, check=True, timeout=WAIT_SECONDS)


class Supervised:
    """A supervisor on simulated hosts, or on those named, and hands to harm them with."""

    def __init__(self, command: Sequence[str], folder: Path, hosts: int | Sequence[str], *flags: str) -> None:
        self.workdir, self._memory = folder / "run", folder / "memory"
        self._names = [f"n{i + 1}" for i in range(hosts)] if isinstance(hosts, int) else hosts
        self._list = folder / "hosts"
        self.list_hosts()
        arguments = [sys.executable, "-m", "experiments.elastic", f"--workdir={self.workdir}"]
        arguments += [f"--config.hosts={self._list}", f"--config.memory={self._memory}", *flags, "--", *command]
        self._log = (folder / "supervisor.log").open("w")
        self.process = subprocess.Popen(arguments, env=environment(), cwd=ROOT, stdout=self._log, stderr=self._log)

    def list_hosts(self, count: int | None = None) -> None:
        """Write the list of hosts, which makes all that are on it usable again."""
        partial = self._list.with_suffix(".partial")
        partial.write_text("\n".join(self._names[:count]) + "\n")
        partial.replace(self._list)

    def status(self) -> dict:
        try:
            return json.loads((self.workdir / "elastic/status.json").read_text())
        except (OSError, ValueError):
            return {"state": "starting", "step": -1, "faults": [], "rounds": 0, "hosts": [], "run_id": ""}

    def wait_for(self, condition, seconds: float = WAIT_SECONDS) -> dict:
        """The status when the condition holds of it; fails if the supervisor ends or the time is over before."""
        deadline = time.monotonic() + seconds
        while not condition(status := self.status()):
            assert self.process.poll() is None, f"the supervisor ended: {status}"
            assert time.monotonic() < deadline, f"waited {seconds} s: {status}"
            time.sleep(0.05)
        return status

    def wait_for_faults(self, count: int) -> None:
        self.wait_for(lambda status: len(status["faults"]) == count)

    def step(self) -> int:
        """The last step that any process has taken."""
        beats = (self.workdir / "elastic/beats").glob("*.json")
        return max((json.loads(path.read_text())["step"] for path in beats), default=-1)

    def wait_for_steps(self, count: int) -> None:
        """Wait until the processes have taken so many steps since they were started."""
        start = self.wait_for(lambda status: status["state"] == "running")
        resumed = start["faults"][-1]["resumed_step"] if start["faults"] else 0
        deadline = time.monotonic() + WAIT_SECONDS
        first = max(self.step(), resumed)
        while self.step() < first + count:
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def pid(self, index: int) -> int:
        """The process's id, as its signs of life say."""
        path = self.workdir / f"elastic/beats/{index}.json"
        self.wait_for(lambda status: path.exists())
        return json.loads(path.read_text())["pid"]

    def harm(self, kind: str, index: int) -> None:
        """Do something bad to a process, or to its host with the copies that it keeps."""
        status, pid = self.status(), self.pid(index)
        if kind == LOSE:
            shutil.rmtree(self._memory / f"llm_jax-{status['run_id']}" / status["hosts"][index], ignore_errors=True)
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])  # its agent
        os.kill(pid, signal.SIGSTOP if kind == FREEZE else signal.SIGKILL)

    def finish(self, seconds: float = WAIT_SECONDS, status: int = 0) -> str:
        """Wait for the supervisor's end; what it has printed."""
        ended = self.process.wait(seconds)
        printed = Path(self._log.name).read_text()
        assert ended == status, printed
        return printed

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # its agents end when their input does
            self.process.wait()
        self._log.close()


@contextlib.contextmanager
def supervised(command: Sequence[str], folder: Path, hosts: int | Sequence[str], *flags: str):
    """A supervised run, in FOLDER/run, that is ended with the block."""
    run = Supervised(command, folder, hosts, *flags)
    try:
        yield run
    finally:
        run.end()


def rows_drawn(workdir: Path) -> list[dict[int, list[int]]]:
    """What the processes of each round drew together, by step: the rows in the order of the global batch."""
    rounds: dict[int, dict[int, dict[int, list[int]]]] = {}
    for path in (workdir / "rows").iterdir():
        number, process = map(int, path.name.split(".")[:2])
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # cut short by a kill
                record = json.loads(line)
                rounds.setdefault(number, {}).setdefault(record["step"], {})[process] = record["rows"]
    return [
        {step: [row for process in sorted(parts) for row in parts[process]] for step, parts in rounds[number].items()}
        for number in sorted(rounds)
    ]


def rows_taken(workdir: Path) -> dict[int, list[int]]:
    """The rows that each step was taken with in the end: those of the last round that took it."""
    taken: dict[int, list[int]] = {}
    for drawn in rows_drawn(workdir):
        begun = min(drawn)
        taken = {step: rows for step, rows in taken.items() if step < begun} | drawn
    return taken


def begun_again(workdir: Path) -> int:
    """How many steps were begun by more than one round: the work that was lost."""
    steps = [step for drawn in rows_drawn(workdir) for step in drawn]
    return len(steps) - len(set(steps))


def losses(workdir: Path) -> dict[int, float]:
    return {int(record["step"]): record["loss"] for record in metrics.read(workdir, "train")}


def compare(steps: int, disturbed: Path, straight: Path) -> dict[str, float]:
    """The largest difference of any step's loss, after making sure that the same steps took the same rows."""
    got, want = losses(disturbed), losses(straight)
    assert list(got) == list(want) == list(range(1, steps + 1))
    assert {step: rows for step, rows in rows_taken(disturbed).items() if step <= steps} == rows_taken(straight)
    differences = [abs(got[step] - want[step]) for step in got]
    return {"largest_loss_difference": max(differences), "at_step": int(np.argmax(differences)) + 1}


def disturb(run: Supervised, faults: int, seed: int) -> None:
    """Four, three, two processes and back to four, by faults at random times of random processes."""
    generator = random.Random(seed)
    done = 0
    while done < faults:
        run.wait_for_steps(generator.randint(2, 8))
        hosts = run.status()["hosts"]
        if len(hosts) <= 2 and generator.random() < 0.6:
            run.list_hosts()
            run.wait_for(lambda status: len(status["hosts"]) > 2)
            continue
        time.sleep(generator.uniform(0, 0.3))
        kinds = (KILL, FREEZE, LOSE) if len(hosts) > 2 else (KILL,)
        run.harm(generator.choice(kinds), generator.randrange(len(hosts)))
        done += 1
        run.wait_for_faults(done)


def overlay(disturbed: Path, straight: Path, faults: list[dict], path: Path) -> None:
    """Both loss curves, the faults, and the difference between the curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    got, want = losses(disturbed), losses(straight)
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1))
    top.plot(list(want), list(want.values()), color="0.6", linewidth=4, label="undisturbed, one process")
    top.plot(list(got), list(got.values()), color="C0", linewidth=1, label=f"{len(faults)} faults, 2 to 4 processes")
    for axes in (top, bottom):
        for fault in faults:
            axes.axvline(fault["step"], color="C3", linewidth=0.5)
    top.set(ylabel="training loss")
    top.legend()
    bottom.semilogy(list(got), [max(abs(got[s] - want[s]), 1e-9) for s in got], color="C0")
    bottom.set(xlabel="step; red: faults", ylabel="difference of the losses")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(config: Path, folder: Path, faults: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    steps = json.loads(config.read_text())["steps"]
    straight = folder / "straight"
    run_alone(training(config, straight)[1:])
    start = time.monotonic()
    flags = ("--config.sizes=(4,3,2)", "--config.frozen_seconds=10.0")
    with supervised(training(config, folder / "run"), folder, 4, *flags) as run:
        disturb(run, faults, seed)
        run.finish(1800)
    status = run.status()
    for fault in status["faults"]:
        fault.pop("last_words")
        print(json.dumps(fault))
    overlay(run.workdir, straight, status["faults"], folder / "overlay.png")
    downtimes = [fault["downtime_seconds"] for fault in status["faults"]]
    lost = [fault["lost_steps"] for fault in status["faults"]]
    summary = {
        "faults": len(downtimes),
        "starts": status["rounds"],
        "seconds": round(time.monotonic() - start),
        "median_downtime_seconds": float(np.median(downtimes)),
        "longest_downtime_seconds": max(downtimes),
        "whole_steps_lost": sum(lost),
        "steps_begun_again": begun_again(run.workdir),
    }
    print(json.dumps(summary | compare(steps, run.workdir, straight)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
