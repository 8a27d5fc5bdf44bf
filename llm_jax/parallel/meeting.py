"""The processes of a job meet before JAX joins them: who is missing, or does not fit, is named while one still can.

JAX itself ends a process without an exception when another does not come, and runs on when hosts differ in versions.
Process 0 listens where JAX's coordinator will; the others tell it who they are. When all are there, and their clocks
were compared, it tells each of them either who all are, or what is wrong. One line of JSON is one message.
"""

import contextlib
import dataclasses
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from llm_jax.errors import UserError, require
from llm_jax.parallel.job import Job

CLOCK_SECONDS = 5.0  # by which hosts' clocks may differ: file times and logs are compared across them
REPLY_SECONDS = 10.0  # for a process that is there to answer


@dataclasses.dataclass(frozen=True)
class Member:
    """A process as it tells the others of itself; `versions` must be the same everywhere."""

    index: int
    count: int
    host: str
    pid: int
    versions: dict[str, str]

    def __str__(self) -> str:
        return f"process {self.index} on {self.host}"


def meet(job: Job, me: Member, timeout_seconds: float, clock: Callable[[], float] = time.time) -> tuple[Member, ...]:
    """All processes of the job, in order; every process must call it.

    Raises `UserError`, in every process that came, within about `timeout_seconds` of the call: processes that did not
    come, are there twice, or belong to a job of another size; versions that differ; clocks `CLOCK_SECONDS` apart.
    """
    host, _, port = job.coordinator.rpartition(":")
    require(bool(host) and port.isdigit(), f"{job.coordinator!r} is no address of the form HOST:PORT for process 0")
    deadline = time.monotonic() + timeout_seconds
    if job.index == 0:
        return _host(me, int(port), deadline, timeout_seconds, clock)
    return _guest(me, host.strip("[]"), int(port), deadline, timeout_seconds, clock)


class _Line:
    """JSON messages over a connection, within a time limit."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""

    def send(self, message: Any) -> None:
        self._connection.settimeout(REPLY_SECONDS)
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float = REPLY_SECONDS) -> Any:
        """The next message; OSError or ValueError if there is none in time, or it is no JSON."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            self._connection.settimeout(max(0.01, deadline - time.monotonic()))
            received = self._connection.recv(1 << 16)
            if not received:
                raise ConnectionError("closed")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


def _host(
    me: Member, port: int, deadline: float, timeout_seconds: float, clock: Callable[[], float]
) -> tuple[Member, ...]:
    members, lines = {0: me}, dict[int, _Line]()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port, me))
        complaint = ""
        while len(members) < me.count and not complaint:
            connection = _accept(server, deadline)
            if connection is None:
                complaint = _missing(members, me.count, timeout_seconds)
                break
            line = _Line(stack.enter_context(connection))
            try:
                member = Member(**line.receive())
            except (OSError, ValueError, TypeError):
                continue  # nobody of ours
            complaint = _contradiction(member, members)
            members.setdefault(member.index, member)
            lines[member.index] = line
        complaint = complaint or _versions(members) or _clocks(members, lines, clock)
        everyone = tuple(members[i] for i in sorted(members))
        verdict = {"error": complaint, "members": [dataclasses.asdict(member) for member in everyone]}
        for line in lines.values():
            with contextlib.suppress(OSError):
                line.send(verdict)
    require(not complaint, complaint)
    return everyone


@contextlib.contextmanager
def _listen(port: int, me: Member) -> Iterator[socket.socket]:
    both = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=me.count
        )
    except OSError as error:
        raise UserError(
            f"{me} cannot listen at port {port} ({os.strerror(error.errno or 0)}): choose another one"
        ) from None
    with server:
        yield server


def _accept(server: socket.socket, deadline: float) -> socket.socket | None:
    server.settimeout(max(0.01, deadline - time.monotonic()))
    try:
        return server.accept()[0]
    except TimeoutError:
        return None


def _missing(members: dict[int, Member], count: int, seconds: float) -> str:
    absent = [i for i in range(count) if i not in members]
    listed = ", ".join(map(str, absent[:20])) + (", ..." if len(absent) > 20 else "")
    here = ", ".join(f"{i} ({members[i].host})" for i in sorted(members)[:20])
    names = f"process {listed}" if len(absent) == 1 else f"processes {listed}"
    return f"{names} of {count} did not come within {seconds:g} s; those that came: {here}"


def _contradiction(member: Member, members: dict[int, Member]) -> str:
    other = members.get(member.index)
    if other is not None:
        return f"{other} and another one on {member.host} (pid {member.pid}) were both started as process {other.index}"
    if member.count != members[0].count:
        return f"{member} was started as one of {member.count} processes, {members[0]} as one of {members[0].count}"
    return "" if 0 < member.index < member.count else f"{member} is not one of {member.count} processes"


def _versions(members: dict[int, Member]) -> str:
    mine = members[0].versions
    for member in members.values():
        for name in mine:
            if member.versions.get(name) != mine[name]:
                return f"{member} has {name} {member.versions.get(name)}, {members[0]} has {mine[name]}: use the same"
    return ""


def _clocks(members: dict[int, Member], lines: dict[int, _Line], clock: Callable[[], float]) -> str:
    """Ask every process for its time; half of what the answer took is doubt."""
    for i, line in sorted(lines.items()):
        start = clock()
        try:
            line.send("clock")
            theirs = float(line.receive())
        except (OSError, ValueError, TypeError):
            return f"{members[i]} came, and does not answer"
        doubt = (clock() - start) / 2
        difference = theirs - (start + doubt)
        if not math.isfinite(difference) or abs(difference) - doubt > CLOCK_SECONDS:
            way = "ahead of" if difference > 0 else "behind"
            return f"the clock of {members[i]} is {abs(difference):.0f} s {way} that of {members[0]}: synchronise them"
    return ""


def _guest(
    me: Member, host: str, port: int, deadline: float, timeout_seconds: float, clock: Callable[[], float]
) -> tuple[Member, ...]:
    connection = _connect(me, host, port, deadline, timeout_seconds)
    with connection:
        line = _Line(connection)
        try:
            line.send(dataclasses.asdict(me))
            while (message := line.receive(timeout_seconds + REPLY_SECONDS)) == "clock":
                line.send(clock())
            complaint, members = message["error"], message["members"]
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"{me} reached process 0 at {host}:{port}, which went away: see its log") from None
    require(not complaint, complaint)
    return tuple(Member(**member) for member in members)


def _connect(me: Member, host: str, port: int, deadline: float, timeout_seconds: float) -> socket.socket:
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=min(left, REPLY_SECONDS))
            if connection.getsockname() != connection.getpeername():  # TCP may connect a free port with itself
                return connection
            connection.close()
        except OSError as error:
            reason = str(error.strerror or error)
        time.sleep(min(0.1, max(0.0, left)))
    raise UserError(f"{me} did not reach process 0 at {host}:{port} within {timeout_seconds:g} s ({reason})")
