"""Which hosts a job may use at the moment, and how a command is started on one."""

import logging
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from llm_jax.errors import UserError, require
from llm_jax.parallel import job as jobs
from llm_jax.parallel.elastic_config import ElasticConfig

logger = logging.getLogger(__name__)
SLURM_NODES = "SLURM_JOB_NODELIST"
SLURM_SECONDS = 10.0  # between two questions to Slurm
GOOD_STATES = ("alloc", "idle", "mix", "comp")
SRUN = "srun --nodelist={host} --nodes=1 --ntasks=1 --overlap --unbuffered"


class Hosts:
    """The allotted hosts, without those that were lost since the list last changed."""

    def __init__(self, config: ElasticConfig) -> None:
        self._config = config
        self._lost: dict[str, float] = {}
        self._asked = -SLURM_SECONDS
        self._listed: list[str] = []
        self._version: object = None
        self._most = 0
        self._complaint = ""
        self._starts = 0
        if config.hosts and not config.launch:
            logger.warning("no config.launch: a process for each line of %s is started on this machine", config.hosts)
        self._take(*self._read())
        require(bool(self._listed), f"no hosts in {config.hosts or SLURM_NODES}")

    def refresh(self) -> None:
        """Look at the list again; a list that was changed, or only written anew, makes lost hosts usable again.

        Where it cannot be read the last one stays, with a warning.
        """
        try:
            self._take(*self._read())
            self._complaint = ""
        except UserError as error:
            if str(error) != self._complaint:
                logger.warning("%s; going on with the hosts known", error)
            self._complaint = str(error)
        if self._config.return_seconds:
            after = time.monotonic() - self._config.return_seconds
            self._lost = {host: since for host, since in self._lost.items() if since > after}

    def _take(self, version: object, listed: list[str]) -> None:
        if version != self._version:
            self._lost.clear()
        self._version, self._listed = version, listed
        self._most = max(self._most, len(listed))

    def _read(self) -> tuple[object, list[str]]:
        if self._config.hosts:
            path = Path(self._config.hosts)
            try:
                listed = list(dict.fromkeys(path.read_text().split()))
                return path.stat().st_mtime_ns, listed
            except OSError as error:
                raise UserError(f"the list of hosts {path} cannot be read: {error.strerror}") from None
        if self._config.processes:
            return 0, [f"{socket.gethostname()}-{i}" for i in range(self._config.processes)]
        if time.monotonic() - self._asked < SLURM_SECONDS:
            return self._version, self._listed
        self._asked = time.monotonic()
        listed = slurm_hosts()
        return tuple(listed), listed

    def lose(self, host: str) -> None:
        """Leave a host out from now on."""
        self._lost[host] = time.monotonic()

    def usable(self) -> list[str]:
        """The hosts that a process can be started on, in the list's order."""
        return [host for host in self._listed if host not in self._lost]

    def team(self) -> list[str]:
        """As many of the usable hosts as the run can be divided over."""
        usable = self.usable()
        sizes = self._config.sizes or (len(usable),)
        return usable[: max((size for size in sizes if size <= len(usable)), default=0)]

    def most(self) -> int:
        """The number of hosts that the run's settings are made for: the most that there have been."""
        return max(self._config.sizes, default=self._most)

    def command(self, host: str, arguments: Sequence[str]) -> list[str]:
        """The command line that runs another on a host."""
        launch = self._config.launch or (SRUN if not self._is_local() else "")
        return [*shlex.split(launch.format(host=host)), *arguments]

    def address(self, host: str) -> str:
        """Where process 0 is reached by the others, with a port that is probably free."""
        if self._is_local() and not self._config.launch:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                return f"127.0.0.1:{free.getsockname()[1]}"
        self._starts += 1  # the port of the start before may still be taken
        return f"{jobs.address(host)}:{jobs.port(31 * os.getpid() + self._starts)}"

    def _is_local(self) -> bool:
        return bool(self._config.hosts or self._config.processes)


def slurm_hosts() -> list[str]:
    """The hosts of this Slurm job that are up. Raises `UserError` outside of a job."""
    nodes = os.environ.get(SLURM_NODES)
    require(bool(nodes), "name the hosts: --config.hosts=FILE, --config.processes=N for this machine, or run in sbatch")
    command = ["sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N %t"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"sinfo does not say how the hosts {nodes} are: {error}") from None
    require(answer.returncode == 0, f"sinfo does not say how the hosts {nodes} are: {answer.stderr.strip()}")
    rows = [line.split() for line in answer.stdout.splitlines() if line.strip()]
    return list(dict.fromkeys(host for host, state in rows if state.rstrip("*~#").startswith(GOOD_STATES)))
