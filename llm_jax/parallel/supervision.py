"""What a supervisor and the processes under it say to each other. Needs no JAX.

The supervisor tells each process its `Assignment` in the environment. The process writes signs of life, and how far it
is, to a file of its own: a thread does so even while a step or a compilation takes long, but not in a frozen process.
"""

import atexit
import dataclasses
import functools
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from llm_jax import files

logger = logging.getLogger(__name__)

VARIABLE = "LLM_JAX_ASSIGNMENT"
BEAT_SECONDS = 0.5
WRITE_SECONDS = 0.05  # steps that are shorter share a line


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A process's part in a supervised run."""

    round: int  # counts the starts of the run's processes
    process: int
    processes: int
    most_processes: int  # with which the run's number of microbatches was chosen
    beats: str  # the file of its signs of life
    copies: str  # the folder, on its host, of the copies that it keeps of the last steps' states
    rescued: str  # the folder, which all see, of the copies that hosts had at the start
    copy_every: int  # steps; 0 = no copies


@dataclasses.dataclass
class Beat:
    """What a process says of itself; `count` changes for as long as it is alive."""

    count: int = 0
    step: int = -1  # the last one that it has taken; -1 = it has not restored its state yet
    restored_step: int = -1
    restored_from: str = ""
    pid: int = 0


def assignment() -> Assignment | None:
    """This process's assignment; None where no supervisor has started it."""
    text = os.environ.get(VARIABLE)
    return Assignment(**json.loads(text)) if text else None


class Signs:
    """Writes the signs of life of this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beat = Beat(pid=os.getpid())
        self._lock = threading.Lock()
        self._written = 0.0
        threading.Thread(target=self._live, daemon=True).start()
        atexit.register(self._say)  # the last step's line may not be written yet

    def _live(self) -> None:
        while True:
            self._say()
            time.sleep(BEAT_SECONDS)

    def _say(self) -> None:
        with self._lock:
            self._write()

    def tell(self, **fields: Any) -> None:
        """Change what is said."""
        with self._lock:
            for name, value in fields.items():
                setattr(self._beat, name, value)
            if time.monotonic() - self._written > WRITE_SECONDS:
                self._write()

    def _write(self) -> None:
        """Write what is said; where that fails, the next beat tries again. The caller holds the lock."""
        self._beat.count += 1
        self._written = time.monotonic()
        try:
            files.write_json(self._path, dataclasses.asdict(self._beat))
        except OSError as error:
            logger.warning("no sign of life could be written to %s: %s", self._path, error.strerror)


@functools.cache
def signs() -> Signs | None:
    """This process's signs of life, which begin with the first call; None where no supervisor has started it."""
    own = assignment()
    return Signs(Path(own.beats)) if own else None


def read_beat(path: Path) -> Beat:
    """The last sign of life in a file."""
    try:
        return Beat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return Beat()  # not begun
