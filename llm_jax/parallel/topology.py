"""Which hosts are near each other: processes are numbered along the network, and so the mesh lies along it.

A mesh's data axes follow the numbers of the processes (`mesh.grid`), and each process reads the rows of the batch that
belong to its number. So it is the numbers that follow the network: hosts of a switch are neighbours, and so are the
switches of a pod. A file states the network, one line `host switch pod` for each host; without one, hosts are taken in
the order in which the launcher lists them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llm_jax.errors import UserError, require


class Place(NamedTuple):
    """Where a host is in the network."""

    pod: str
    switch: str


def read(path: Path) -> dict[str, Place]:
    """The place of every host in a file of lines `host switch pod`; what follows a # is a comment.

    Raises `UserError`, naming the line, for a file that cannot be read or says something else.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"the topology file {path} cannot be read: {error.strerror}") from None
    places: dict[str, Place] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        require(len(words) == 3, f"{path}, line {number}: {line.strip()!r} is not `host switch pod`")
        host, switch, pod = words
        require(host not in places, f"{path}, line {number}: host {host!r} has a line already")
        places[host] = Place(pod, switch)
    return places


def number(hosts: Sequence[str], places: Mapping[str, Place], path: Path) -> list[int]:
    """The new number of each process, given its host; neighbours in the network become neighbours in number.

    Pods, the switches of a pod and the hosts of a switch keep the order in which the launcher's list first has one.
    So process 0, which coordinates, stays process 0.

    Raises `UserError` naming hosts that the file does not have.
    """
    missing = sorted({host for host in hosts if host not in places})
    require(not missing, f"the topology file {path} has no line `host switch pod` for {', '.join(missing)}: add it")
    pods: list[tuple[str, ...]] = [(places[host].pod,) for host in hosts]
    switches: list[tuple[str, ...]] = [(*pod, places[host].switch) for pod, host in zip(pods, hosts)]
    whole: list[tuple[str, ...]] = [(*switch, host) for switch, host in zip(switches, hosts)]

    def key(process: int) -> tuple[int, ...]:
        return *(level.index(level[process]) for level in (pods, switches, whole)), process

    order = sorted(range(len(hosts)), key=key)
    return [order.index(process) for process in range(len(hosts))]
