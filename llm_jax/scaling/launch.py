"""Training the trials of a sweep: in this process, in processes beside it, or as Slurm arrays through submitit.

Nothing here depends on a job's return value or on Slurm's accounting, which small clusters lack: a trial is finished
when its run folder says so, and a Slurm job has ended when `squeue` no longer lists it. Submitit keeps its own pickles
and logs in `folder / "jobs"`; they hold names of functions and files, and none is read back here.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import submitit
from rich.console import Console

from llm_jax import config as config_lib
from llm_jax.config import TrainConfig
from llm_jax.errors import UserError
from llm_jax.scaling import board as boards
from llm_jax.scaling import sweep
from llm_jax.scaling.config import LauncherConfig
from llm_jax.scaling.job import STOP_SECONDS, Execute, HeldError, Job, attempt, check_free, reference
from llm_jax.scaling.trial import CONFIG, FAILURE, Trial
from llm_jax.training.loop import StopSignal

JOBS = "jobs"  # no trial has this name: all end in their seed
RECORD = "slurm.json"
SLURM_VERDICT = "slurmstepd"  # begins the lines about jobs cancelled, out of time or out of memory
REQUEUES = 1000  # how often a Slurm job may go on after its time limit


@dataclasses.dataclass
class Task:
    """Trials that train in one job."""

    trials: list[Trial]
    tries: int = 1  # of each trial alone, this one included
    job: Any = None  # submitit's, once started
    missed: int = 0  # successive questions to Slurm that did not list it


class Launcher(Protocol):
    """Where tasks run."""

    poll_seconds: float

    def adopt(self, waiting: deque[Task]) -> list[Task]:
        """Take from the waiting tasks those that run already."""

    def start(self, waiting: deque[Task], running: Sequence[Task]) -> list[Task]:
        """Take from the waiting tasks as many as there is room for, and start them."""

    def ended(self, running: Sequence[Task]) -> list[Task]:
        """The running tasks that no longer run."""

    def stop(self, running: Sequence[Task]) -> str:
        """After Ctrl-C: end what should not outlive this process, and say what became of the tasks."""


def run(
    groups: Sequence[Sequence[Trial]],
    execute: Execute,
    launcher: LauncherConfig,
    folder: Path,
    *,
    console: Console | None = None,
    poll_seconds: float | None = None,
) -> dict[str, str]:
    """Train every trial that is not finished yet; those that fail are tried again alone, and then left out.

    Args:
      groups: trials that train in one job, as `sweep.together` makes them.
      execute: trains the runs of the config.json files whose paths it gets, each in its file's folder. The other
        processes import it by its name.
      launcher: where.
      folder: holds a folder for each trial, shared with the other machines.
      console: for the table of trials; None = standard error.
      poll_seconds: between two looks at the jobs; None = 1 for processes, 10 for Slurm.

    Returns:
      A line for every trial that has no result, by the trial's name, saying why and where its log is.

    Raises:
      UserError: no Slurm here, or it refuses the jobs; or (`HeldError`) another process trains one of the trials.
      KeyboardInterrupt: after Ctrl-C; processes have been stopped, Slurm's jobs run on and are found again.
    """
    trials = [trial for group in groups for trial in group]
    board = boards.Board(trials, folder, live=launcher.kind != "inline", console=console)
    waiting, problems = _unfinished(groups, folder, board)
    if not waiting:
        return problems
    if launcher.kind == "processes":  # the longest first, so that all end at about the same time
        waiting = deque(sorted(waiting, key=lambda task: -sum(trial.compute for trial in task.trials)))
    where = _launcher(execute, launcher, folder, board)
    poll_seconds = where.poll_seconds if poll_seconds is None else poll_seconds
    running: list[Task] = []
    with board:
        try:
            running += where.adopt(waiting)
            while waiting or running:
                running += where.start(waiting, running)
                for task in where.ended(running):
                    running.remove(task)
                    waiting += _settle(task, folder, launcher.retries, board, problems)
                board.refresh()
                if running:
                    time.sleep(poll_seconds)
        except (KeyboardInterrupt, HeldError):
            board.say(where.stop(running))
            raise
    return problems


def _launcher(execute: Execute, launcher: LauncherConfig, folder: Path, board: boards.Board) -> Launcher:
    if launcher.kind == "inline":
        return Inline(execute, folder, board)
    if launcher.kind == "processes":
        return Processes(reference(execute), launcher, folder, board)
    return Slurm(reference(execute), launcher, folder, board)


def _unfinished(
    groups: Sequence[Sequence[Trial]], folder: Path, board: boards.Board
) -> tuple[deque[Task], dict[str, str]]:
    """A task for each group that has trials to train, their config files written.

    Of a group, runs that have begun with other evaluations than the rest are a task of their own.
    """
    waiting, problems = deque[Task](), dict[str, str]()
    for group in groups:
        trials: dict[int, list[Trial]] = {}  # by how often they are evaluated
        for trial in group:
            try:
                if _is_finished(trial, folder):
                    _done(trial, folder, board)
                else:
                    trials.setdefault(_write_config(trial, folder).eval_every, []).append(trial)
            except UserError as error:
                problems[trial.name] = str(error)
                board.set(trial, boards.FAILED, str(error))
        waiting += [Task(members) for members in trials.values()]
    return waiting, problems


def _done(trial: Trial, folder: Path, board: boards.Board) -> None:
    """Note that a trial is finished; what failed before, or in another run of its group, is of no interest any more."""
    (folder / trial.name / FAILURE).unlink(missing_ok=True)
    board.set(trial, boards.DONE)


def _is_finished(trial: Trial, folder: Path) -> bool:
    """Whether a trial has its result. `UserError` if training it again would not help: see `sweep.result`."""
    try:
        sweep.heldout_records(trial, folder)
    except sweep.UnfinishedError:
        return False
    return True


def _write_config(trial: Trial, folder: Path) -> TrainConfig:
    """Write the trial's config.json, and return it; a run that has begun keeps its rhythm of evaluations."""
    stored = sweep.stored_config(trial, folder)
    config = dataclasses.replace(trial.config, eval_every=stored.eval_every) if stored else trial.config
    config_lib.save(config, folder / trial.name / CONFIG)
    return config


def _config_paths(task: Task, folder: Path) -> tuple[str, ...]:
    return tuple(str((folder / trial.name / CONFIG).absolute()) for trial in task.trials)


def _check_free(tasks: Iterable[Task], folder: Path) -> None:
    check_free([folder / trial.name for task in tasks for trial in task.trials])


def _settle(task: Task, folder: Path, retries: int, board: boards.Board, problems: dict[str, str]) -> list[Task]:
    """Note what became of an ended task's trials; a task for each that is to be tried again."""
    again = []
    alone = len(task.trials) == 1  # else a neighbour may be to blame, and the group's try does not count
    for trial in task.trials:
        try:
            if _is_finished(trial, folder):
                _done(trial, folder, board)
                continue
        except UserError as error:
            why, hopeless = str(error), True
        else:
            why, hopeless = _why(trial, task, folder), alone and task.tries > retries
        if hopeless:
            problems[trial.name] = f"{trial.name} is left out after {_times(task.tries)}: {why}"
            board.set(trial, boards.FAILED, why)
        else:
            board.set(trial, boards.WAITING, f"to be tried again: {why}")
            again.append(Task([trial], task.tries + alone))
    return again


def _times(tries: int) -> str:
    return "1 try" if tries == 1 else f"{tries} tries"


def _why(trial: Trial, task: Task, folder: Path) -> str:
    """Why a trial is not finished, in one line, with the file that tells more."""
    failure = folder / trial.name / FAILURE
    if failure.exists():
        first_line = (failure.read_text().splitlines() or [""])[0]
        return f"{first_line} (log: {failure if task.job is None else task.job.paths.stderr})"
    if task.job is None:
        return "it stopped before its end"
    log = task.job.paths.stderr
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    lines = [line for line in lines if line.startswith(SLURM_VERDICT)] or lines
    last = f"; its log says {lines[-1].strip()!r}" if lines else ""
    return f"its job ended before it did{last} (log: {log})"


class Inline:
    """One task after the other in this process."""

    poll_seconds = 0.0

    def __init__(self, execute: Execute, folder: Path, board: boards.Board) -> None:
        self._execute, self._folder, self._board = execute, folder, board

    def adopt(self, waiting: deque[Task]) -> list[Task]:
        """None: there is nothing that this process could take over. Raises `HeldError` if another one trains them."""
        _check_free(waiting, self._folder)
        return []

    def start(self, waiting: deque[Task], running: Sequence[Task]) -> list[Task]:
        """Run the next task to its end. Raises `KeyboardInterrupt` after a signal, which a training loop turns into a
        checkpoint and a return without an error, and which may come too late to shorten a trial."""
        task = waiting.popleft()
        for trial in task.trials:
            self._board.set(trial, boards.RUNNING)
        with StopSignal() as stop:
            try:
                attempt(self._execute, _config_paths(task, self._folder))
            except HeldError:
                raise
            except Exception:  # of which `attempt` has kept the reason
                pass
        if stop.requested:
            raise KeyboardInterrupt
        return [task]

    def ended(self, running: Sequence[Task]) -> list[Task]:
        """All of them."""
        return list(running)

    def stop(self, running: Sequence[Task]) -> str:
        """Nothing runs any more."""
        return "stopped; the same command goes on from here"


class Processes:
    """At most `launcher.parallel` processes on this machine, each with cores and GPUs of its own."""

    poll_seconds = 1.0

    def __init__(self, execute: str, launcher: LauncherConfig, folder: Path, board: boards.Board) -> None:
        self._execute, self._launcher, self._folder, self._board = execute, launcher, folder, board
        self._executor = submitit.LocalExecutor(folder / JOBS)
        self._slots: dict[str, int] = {}  # of a job's id

    def adopt(self, waiting: deque[Task]) -> list[Task]:
        """None, as `Inline`: a process that outlived its sweep keeps its runs locked."""
        _check_free(waiting, self._folder)
        return []

    def start(self, waiting: deque[Task], running: Sequence[Task]) -> list[Task]:
        """Fill the free places."""
        started: list[Task] = []
        count = min(len(waiting), self._launcher.parallel - len(running))
        _check_free(itertools.islice(waiting, count), self._folder)
        cores = shares_of_cores(self._launcher.parallel)
        for _ in range(count):
            task = waiting.popleft()
            taken = {self._slots[other.job.job_id] for other in [*running, *started]}
            slot = next(i for i in range(self._launcher.parallel) if i not in taken)
            gpus = self._launcher.gpus_per_node
            self._executor.update_parameters(
                timeout_min=self._launcher.timeout_minutes,
                gpus_per_node=gpus,
                visible_gpus=tuple(range(slot * gpus, (slot + 1) * gpus)),
            )
            with _ignored_by_children(signal.SIGINT):  # a terminal's Ctrl-C reaches them too: `stop` ends them
                task.job = self._executor.submit(Job(self._execute, _config_paths(task, self._folder), cores[slot]))
            self._slots[task.job.job_id] = slot
            started.append(task)
            for trial in task.trials:
                self._board.set(trial, boards.RUNNING)
        return started

    def ended(self, running: Sequence[Task]) -> list[Task]:
        """Those whose process has ended."""
        return [task for task in running if task.job.done()]

    def stop(self, running: Sequence[Task]) -> str:
        """Let every process save and end; those that do not are ended by an alarm of their own."""
        for task in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(task.job.job_id), signal.SIGTERM)  # submitit's controller passes it on
        deadline = time.monotonic() + STOP_SECONDS
        while any(not task.job.done() for task in running) and time.monotonic() < deadline:
            time.sleep(0.1)
        return "stopped; the same command goes on from here"


def shares_of_cores(count: int) -> list[tuple[int, ...]]:
    """The cores that this process may use in `count` equal shares; empty ones where they cannot be dealt out.

    Small models waste most of a second core: two processes of a core each train more of them than two that share both.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = len(cores) // count
    return [tuple(cores[slot * each : (slot + 1) * each]) for slot in range(count)]


@contextlib.contextmanager
def _ignored_by_children(number: int) -> Iterator[None]:
    """Processes started inside begin by ignoring a signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, previous)


class Slurm:
    """An array of jobs, at most `launcher.parallel` of them at once; another array for what is tried again."""

    poll_seconds = 10.0

    def __init__(self, execute: str, launcher: LauncherConfig, folder: Path, board: boards.Board) -> None:
        self._execute, self._folder, self._board = execute, folder, board
        self._executor = slurm_executor(launcher, folder / JOBS)
        self._record = folder / JOBS / RECORD
        self._alive: set[str] = set()

    def adopt(self, waiting: deque[Task]) -> list[Task]:
        """Find the jobs again that an earlier start of the sweep has submitted."""
        if not self._record.exists():
            return []
        alive = queued()
        if alive is None:
            raise UserError("squeue does not answer, so jobs of an earlier start may run still: try again later")
        by_name = {trial.name: trial for task in waiting for trial in task.trials}
        adopted = []
        for job_id, names in self._read().items():
            trials = [by_name.pop(name) for name in names if name in by_name] if job_id in alive else []
            if trials:
                job: Any = submitit.SlurmJob(self._folder / JOBS, job_id)
                adopted.append(Task(trials, job=job))
        remaining = [Task([trial for trial in task.trials if trial.name in by_name]) for task in waiting]
        waiting.clear()
        waiting.extend(task for task in remaining if task.trials)
        self._show(adopted, alive)
        return adopted

    def start(self, waiting: deque[Task], running: Sequence[Task]) -> list[Task]:
        """Submit everything: Slurm keeps the queue."""
        if not waiting:
            return []
        tasks = list(waiting)
        jobs = [Job(self._execute, _config_paths(task, self._folder)) for task in tasks]
        try:
            submitted = self._executor.submit_array(jobs)
        except submitit.core.utils.FailedJobError as error:
            lines = str(error).strip().splitlines() or ["no reason given"]
            raise UserError(f"sbatch refused the jobs: {lines[-1]}") from None
        waiting.clear()
        for task, job in zip(tasks, submitted):
            task.job = job
        self._save([*running, *tasks])
        self._board.say(f"submitted to Slurm as {submitted[0].job_id.partition('_')[0]}: jobs {len(tasks)}")
        return tasks

    def _read(self) -> dict[str, list[str]]:
        try:
            record = json.loads(self._record.read_text())
            return {str(job_id): [str(name) for name in names] for job_id, names in record.items()}
        except (ValueError, TypeError, AttributeError):
            raise UserError(
                f"{self._record} is damaged: see with squeue whether jobs of an earlier start still run, end them with "
                "scancel, and delete that file"
            ) from None

    def _save(self, tasks: Sequence[Task]) -> None:
        """Remember which job trains what, for `adopt`."""
        partial = self._record.with_suffix(".partial")
        record = {task.job.job_id: [trial.name for trial in task.trials] for task in tasks}
        partial.write_text(json.dumps(record, indent=2) + "\n")
        partial.replace(self._record)

    def ended(self, running: Sequence[Task]) -> list[Task]:
        """Those that Slurm twice did not list: the files of an ended job may take a moment to appear here."""
        alive = queued()
        if alive is None:
            self._board.say("squeue does not answer; waiting for it")
            return []
        self._show(running, alive)
        for task in running:
            task.missed = 0 if task.job.job_id in alive else task.missed + 1
        return [task for task in running if task.missed > 1]

    def _show(self, tasks: Sequence[Task], alive: dict[str, str]) -> None:
        for task in tasks:
            job_id = task.job.job_id
            if alive.get(job_id, "PENDING") != "PENDING" and job_id not in self._alive:
                self._alive.add(job_id)
                for trial in task.trials:
                    self._board.set(trial, boards.RUNNING)

    def stop(self, running: Sequence[Task]) -> str:
        """Leave the jobs alone."""
        ids = " ".join(dict.fromkeys(task.job.job_id.partition("_")[0] for task in running))
        return (
            f"{len(running)} Slurm jobs run on: the same command finds them again, `scancel {ids}` ends them"
            if running
            else "stopped; the same command goes on from here"
        )


def queued() -> dict[str, str] | None:
    """The state of this user's jobs that Slurm has not done with, by id; None if it does not answer."""
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i|%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return dict(line.strip().split("|", 1) for line in done.stdout.splitlines() if "|" in line)


def slurm_executor(launcher: LauncherConfig, folder: Path) -> submitit.SlurmExecutor:
    """Submitit's executor with the launcher's settings. Raises `UserError` where there is no Slurm."""
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=REQUEUES)
    except RuntimeError:
        raise UserError(
            "launcher.kind=slurm, but there is no srun here: run this on a login node of the cluster, or set "
            "--config.launcher.kind=processes"
        ) from None
    optional: dict[str, Any] = {
        "partition": launcher.partition,
        "account": launcher.account,
        "constraint": launcher.constraint,
        "gpus_per_node": launcher.gpus_per_node,
        "mem": f"{launcher.memory_gigabytes}GB" if launcher.memory_gigabytes else "",
        "setup": list(launcher.setup),
        "additional_parameters": dict(option.split("=", 1) for option in launcher.options),
    }
    executor.update_parameters(
        job_name="llm_jax",
        time=launcher.timeout_minutes,
        nodes=launcher.nodes,
        ntasks_per_node=launcher.tasks_per_node,
        cpus_per_task=launcher.cpus_per_task,
        array_parallelism=launcher.parallel,
        srun_args=[f"--cpus-per-task={launcher.cpus_per_task}"],  # which srun does not take from sbatch since 22.05
        **{name: value for name, value in optional.items() if value},
    )
    return executor
