"""One host of a supervised run, as its supervisor sees it: the agent there, the process beside it, and its signs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from llm_jax.parallel import job as jobs
from llm_jax.parallel import supervision
from llm_jax.parallel.agent import Task
from llm_jax.parallel.hosts import Hosts
from llm_jax.parallel.supervision import Assignment, Beat

LOST, FROZEN, LATE, KILLED = "host lost", "process frozen", "process never began", "process killed"
FAILED, HUNG = "process failed", "no step for too long"
FORWARDED = "JAX_", "XLA_", "LIBTPU_", "NCCL_"  # how variables begin that a host gets of the supervisor's environment
SIGNALS = 128  # what a shell adds to the number of the signal that ended a process
TAIL_BYTES = 16_384


class Member:
    """An agent and its process."""

    def __init__(self, host: str, hosts: Hosts, task: Task, index: int) -> None:
        self.host, self.index, self.log = host, index, Path(task.log)
        self._started = self._changed = time.monotonic()
        self._beats = Path(Assignment(**json.loads(task.environment[supervision.VARIABLE])).beats)
        self._beats.unlink(missing_ok=True)
        self.beat = Beat()
        self.status: int | None = None  # the process's, once it has ended
        self._asked = False  # to stop
        agent = hosts.command(host, [sys.executable, "-m", "llm_jax.parallel.agent", task.encode()])
        self._agent = subprocess.Popen(
            agent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("a"), text=True,
            start_new_session=True,  # a terminal's Ctrl-C is for the supervisor
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._agent.stdout is not None
        for line in self._agent.stdout:
            if line.strip().lstrip("-").isdigit():
                self.status = int(line)

    def look(self) -> None:
        """Read the last sign of life."""
        beat = supervision.read_beat(self._beats)
        if beat.count != self.beat.count:
            self._changed = time.monotonic()
        self.beat = beat

    def has_ended_well(self) -> bool:
        """Whether its process is done, or has been stopped: one that has only begun knows no other end than a kill."""
        stopped = (-signal.SIGTERM, SIGNALS + signal.SIGTERM) if self._asked else ()
        return self.status in (0, *stopped)

    def fault(self, start_seconds: float, frozen_seconds: float) -> str:
        """What is wrong with it; "" = nothing."""
        if self.has_ended_well():
            return ""
        if self.status is not None:
            return KILLED if self.status < 0 or self.status > SIGNALS else FAILED
        if self._agent.poll() is not None:
            return LOST
        silent = time.monotonic() - self._changed
        if not self.beat.count:
            return LATE if silent > start_seconds else ""
        return FROZEN if silent > frozen_seconds else ""

    def stop(self) -> None:
        """Ask the process to save and end."""
        self._asked = True
        self.tell("stop")

    def tell(self, order: str) -> None:
        """Send the agent an order; one that has gone does not hear it."""
        try:
            assert self._agent.stdin is not None
            self._agent.stdin.write(order + "\n")
            self._agent.stdin.flush()
        except (OSError, ValueError):
            pass

    def let_go(self) -> None:
        """Have the agent kill its process, and end."""
        try:
            assert self._agent.stdin is not None
            self._agent.stdin.close()
        except OSError:
            pass

    def wait(self, deadline: float) -> None:
        """Wait for the agent's end; kill it after the deadline."""
        try:
            self._agent.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._agent.kill()
            self._agent.wait()

    def last_words(self) -> str:
        """The error that its log ends with, in one line."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
                lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            return ""
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1].strip()


def environment(host: str, address: str, own: Assignment) -> dict[str, str]:
    """What a process finds in its environment, beside what its host gives to it: ssh brings nothing along."""
    return {
        **{name: value for name, value in os.environ.items() if name.startswith(FORWARDED)},
        jobs.COORDINATOR: address,
        jobs.COUNT: str(own.processes),
        jobs.INDEX: str(own.process),
        jobs.HOST: host,
        supervision.VARIABLE: json.dumps(dataclasses.asdict(own)),
    }
