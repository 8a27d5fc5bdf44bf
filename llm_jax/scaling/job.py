"""What runs where a trial is trained: one try of a group of trials, in this process or in a job of submitit's."""

import contextlib
import dataclasses
import fcntl
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from llm_jax.errors import UserError, require
from llm_jax.scaling.trial import FAILURE

Execute = Callable[[list[str]], None]
LOCK = "lock"
STOP_SECONDS = 60  # after which a process that was asked to stop is ended


class HeldError(UserError):
    """Another process trains the run: no failure of it."""


def attempt(execute: Execute, config_paths: Sequence[str], *, first: bool = True) -> None:
    """Train the runs of some config files; if that raises, the reason is left beside each of them and raised on.

    Where several processes train the same runs, only the `first` one keeps others away.
    """
    runs = [Path(path).parent for path in config_paths]
    try:
        with contextlib.ExitStack() as stack:
            for run in runs if first else []:
                stack.enter_context(_held(run))
                (run / FAILURE).unlink(missing_ok=True)
            execute(list(config_paths))
    except HeldError:
        raise
    except Exception as error:
        for run in runs:
            # Of several processes the one with the cause fails before those that miss it.
            with contextlib.suppress(FileExistsError), (run / FAILURE).open("x") as file:
                file.write(f"{reason(error)}\n{traceback.format_exc()}")
        raise


@contextlib.contextmanager
def _held(run: Path) -> Iterator[None]:
    """Keep a second process, such as one that outlived an earlier start of the sweep, from training the same run."""
    with (run / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HeldError(
                f"{run} is being trained by another process, which holds {run / LOCK}: wait for that one, or end it"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def check_free(runs: Sequence[Path]) -> None:
    """Raise `HeldError` if another process trains one of these runs."""
    for run in runs:
        with _held(run):
            pass


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, UserError):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")


def reference(execute: Execute) -> str:
    """`module:function`, by which another process finds a function; `UserError` if it could not."""
    module, name = execute.__module__, execute.__qualname__
    if module == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if spec else ""
    require(
        bool(module) and name.isidentifier(),
        f"{name} cannot be imported by other processes: define it at the top of a module that is started with -m",
    )
    return f"{module}:{name}"


@dataclasses.dataclass(frozen=True)
class Job:
    """A group of trials as submitit pickles it: names only, so that nothing else is read from the pickle."""

    execute: str  # "module:function"
    config_paths: tuple[str, ...]
    cores: tuple[int, ...] = ()  # of this machine, that the process keeps to; () = all

    def __call__(self) -> None:
        """Train the group; SIGTERM ends it, during training after a checkpoint."""
        signal.signal(signal.SIGTERM, _stop)
        if self.cores:
            os.sched_setaffinity(0, self.cores)  # before JAX starts as many threads as there are cores
        module, _, name = self.execute.partition(":")
        first = JobEnvironment().global_rank == 0
        attempt(getattr(importlib.import_module(module), name), self.config_paths, first=first)

    def checkpoint(self) -> DelayedSubmission:
        """What Slurm runs after a preemption or at the time limit: the same again, from the runs' last checkpoints."""
        return DelayedSubmission(self)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.alarm(STOP_SECONDS)  # whose default action ends a process that does not come back to Python
    raise KeyboardInterrupt
