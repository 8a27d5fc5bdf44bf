"""Several processes as one job: joining them, waiting for each other with a time limit, and failing together."""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the key-value store and barriers have no public name

from llm_jax.errors import UserError, require
from llm_jax.parallel import job as jobs
from llm_jax.parallel import meeting, topology
from llm_jax.parallel.meeting import Member

JOIN_SECONDS = 300.0  # for all processes of a job to come
WAIT_SECONDS = 1800.0  # at a barrier: the slowest thing between two is one process's compilation
FAILURE = "llm_jax/failure"
POLL_SECONDS = 1.0  # between two looks at whether another process has failed
FAREWELL_SECONDS = 4.0  # that a failed process stays, so that the others read why

_members: tuple[Member, ...] = ()
_failed = False  # whether this process itself is about to end with an error


def initialize(timeout_seconds: float = JOIN_SECONDS) -> None:
    """Join the other processes of the job, if there are any; call it before JAX looks at its devices.

    See `llm_jax.parallel.job` for who may have started them. The first process prints which process is where, with
    which devices. Raises `UserError` naming processes that did not come within `timeout_seconds`, or that have other
    versions or another time than the rest, or that are on hosts that the topology file does not have.
    """
    job = jobs.find(os.environ)
    if job is None or jax.distributed.is_initialized():
        return
    global _members
    if job.coordinator:
        me = Member(job.index, job.count, jobs.this_host(), os.getpid(), versions())
        members = meeting.meet(job, me, timeout_seconds)
        numbers = _along_the_network(members)
        renumbered = (dataclasses.replace(member, index=index) for member, index in zip(members, numbers))
        _members = tuple(sorted(renumbered, key=lambda member: member.index))
        jax.distributed.initialize(
            job.coordinator,
            job.count,
            numbers[job.index],
            job.local_devices(),
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout_seconds),
        )
    else:
        jax.distributed.initialize(initialization_timeout=int(timeout_seconds))
    _watch_for_failures()
    if is_first():
        print(f"{job.count} processes, started by {job.launcher}:")
        print("\n".join(device_map(jax.devices())), flush=True)


def _along_the_network(members: Sequence[Member]) -> list[int]:
    """The number that each process gets: the launcher's, unless a file states the network (`topology.py`)."""
    file = os.environ.get(jobs.TOPOLOGY)
    if not file:
        return list(range(len(members)))
    return topology.number([member.host for member in members], topology.read(Path(file)), Path(file))


@functools.cache
def versions() -> dict[str, str]:
    """What must be the same in all processes: Python, JAX, and this project's own code."""
    code = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    for path in sorted(package.rglob("*.py")):
        code.update(str(path.relative_to(package)).encode() + path.read_bytes())
    libraries = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {"Python": platform.python_version(), **libraries, "llm_jax": code.hexdigest()[:12]}


def device_map(devices: Sequence[Any]) -> list[str]:
    """A line for each process: its number, host and process id, and the devices that it has."""
    lines = []
    for process in sorted({device.process_index for device in devices}):
        own = [device for device in devices if device.process_index == process]
        ids = ", ".join(str(device.id) for device in own)
        lines.append(f"  {name_of(process)}: {len(own)} x {own[0].device_kind}, ids {ids}")
    return lines


def name_of(process: int) -> str:
    """A process for messages: its number, and its host where that is known."""
    return f"{_members[process]} (pid {_members[process].pid})" if process < len(_members) else f"process {process}"


def is_first() -> bool:
    """Whether this is the process that writes and prints what a job needs only once."""
    return jax.process_index() == 0


def wait_for_all(name: str, timeout_seconds: float = WAIT_SECONDS) -> None:
    """Return when every process has arrived at the point called `name`.

    Every process must pass the same points in the same order. Raises `UserError`, naming the processes that are
    missing, after `timeout_seconds`.
    """
    exchange(name, "", timeout_seconds)


def exchange(name: str, text: str, timeout_seconds: float = WAIT_SECONDS) -> list[str]:
    """What every process says at the point called `name`, by their numbers; else as `wait_for_all`."""
    if jax.process_count() == 1:
        return [text]
    client, visits = _client(), _visits(name)
    place = f"llm_jax/{name}/{visits}"
    client.key_value_set(f"{place}/{jax.process_index()}", text)
    try:
        client.wait_at_barrier(place, int(timeout_seconds * 1000))
    except RuntimeError as error:
        arrived = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(f"{place}/")}
        missing = [name_of(process) for process in range(jax.process_count()) if process not in arrived]
        reason = f"waited {timeout_seconds:g} s for {', '.join(missing)}" if missing else str(error).splitlines()[0]
        raise UserError(f"the processes did not all come to {name!r}: {reason}") from None
    said = {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(f"{place}/")}
    if is_first() and visits:  # who is here has read what was said the time before
        client.key_value_delete(f"llm_jax/{name}/{visits - 1}/")
    return [said[process] for process in range(jax.process_count())]


def is_joined() -> bool:
    """Whether this process is one of several that were joined."""
    return jax.distributed.is_initialized() and jax_distributed.global_state.num_processes > 1


def share_failure(message: str) -> None:
    """Tell the other processes why this one fails, which ends them with one line; does nothing in a job of one."""
    if not is_joined():
        return
    global _failed
    _failed = True
    index = jax_distributed.global_state.process_id
    with contextlib.suppress(RuntimeError):  # the first failure is the cause; those after it follow from it
        _client().key_value_set(FAILURE, f"{index}:{name_of(index)} failed: {message}")
    time.sleep(FAREWELL_SECONDS)


def _watch_for_failures() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(stop,), daemon=True)
    thread.start()

    def end() -> None:  # a thread inside the client would be killed there when Python ends
        stop.set()
        thread.join()

    atexit.register(end)


def _watch(stop: threading.Event) -> None:
    """End this process, which may be waiting for the failed one, when another one tells of its failure."""
    own = jax_distributed.global_state.process_id
    while not stop.wait(POLL_SECONDS):
        try:
            index, _, message = _client().key_value_try_get(FAILURE).partition(":")
        except (RuntimeError, UserError):
            continue  # nobody has failed, or the job ends
        if int(index) == own or _failed:
            return
        sys.stdout.flush()
        print(f"error: {message}", file=sys.stderr, flush=True)
        if own == 0:
            time.sleep(2 * FAREWELL_SECONDS)  # the others read it here: process 0 leaves last
        os._exit(1)


def _client() -> Any:
    client = jax_distributed.global_state.client
    require(client is not None, "the processes of this job were not joined: call distributed.initialize() first")
    return client


_visited: dict[str, int] = {}


def _visits(name: str) -> int:
    """How often this process was at a point before: a barrier serves once."""
    _visited[name] = _visited.get(name, -1) + 1
    return _visited[name]
