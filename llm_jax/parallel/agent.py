"""What a supervisor runs on each host, beside the process it starts there. Needs no JAX.

    python -m llm_jax.parallel.agent TASK      TASK is a `Task` as JSON in base 64

First it brings the copies of the state that this host has kept to the folder that all hosts see; without a command it
then removes its own, and ends. Else it starts the command. It reads orders from standard input, one a line: `stop` asks
the process to save and end, `finish` takes the copies away. When the input ends, as it does when the supervisor dies,
it kills the process and ends. It writes the process's exit status to standard output, and stays until it is told to go:
an agent that has gone is a lost host.
"""

import base64
import contextlib
import ctypes
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from llm_jax import files

PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


@dataclasses.dataclass(frozen=True)
class Task:
    """What an agent does on its host."""

    command: tuple[str, ...]  # () = only bring the copies
    environment: Mapping[str, str]  # beside what the host has
    folder: str  # to work in
    log: str  # what the command prints
    copies: str  # the folder of this host's copies
    rescued: str  # where they are brought

    def encode(self) -> str:
        """As an argument of a command line that any shell leaves alone."""
        return base64.urlsafe_b64encode(json.dumps(dataclasses.asdict(self)).encode()).decode()


def bring(copies: Path, rescued: Path) -> None:
    """Copy a host's copies to where all hosts see them; an unfinished one is left out."""
    for path in copies.glob("*/*.npz"):
        target = rescued / path.relative_to(copies)
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(target) as partial:
            shutil.copyfile(path, partial)


def take_away(copies: Path) -> None:
    """Remove a host's copies, and the run's folder of them with the last."""
    shutil.rmtree(copies, ignore_errors=True)
    with contextlib.suppress(OSError):  # another host's are still in it
        copies.parent.rmdir()


def main(task: Task) -> None:
    """Do a task until the supervisor says, or shows, that it is over."""
    os.chdir(task.folder)
    bring(Path(task.copies), Path(task.rescued))
    if not task.command:
        take_away(Path(task.copies))
        return
    with Path(task.log).open("a") as log:
        process = subprocess.Popen(
            task.command,
            env={**os.environ, **task.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,
        )
    threading.Thread(target=lambda: print(process.wait(), flush=True), daemon=True).start()
    for order in sys.stdin:
        if order.strip() == "stop":
            process.terminate()
        elif order.strip() == "finish":
            take_away(Path(task.copies))
    process.kill()  # a frozen one too
    process.wait()


def _die_with_parent() -> None:
    """A process whose agent was killed has lost its host; where Linux can see to it, it does not go on alone."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    main(Task(**json.loads(base64.urlsafe_b64decode(sys.argv[1]))))
