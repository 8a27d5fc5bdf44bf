"""Which process of which job this is, as whoever started it says in the environment. Needs no JAX.

Understood, the first that is there: JAX's own variables (which `--coordinator`, `--processes` and `--process` of an
experiment set), a TPU slice's, Slurm's (`srun`), Open MPI's (`mpirun`) and those of MPICH and Intel MPI.
"""

import dataclasses
import os
import re
import socket
import subprocess
from collections.abc import Mapping

from llm_jax.errors import UserError, require

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HOST = "LLM_JAX_HOST"
TOPOLOGY = "LLM_JAX_TOPOLOGY"  # a file that states the network: `topology.py`
ALONE = "LLM_JAX_ALONE"  # set where one process of a job does the work by itself
TPU_PORT = 8476
# The names of: processes, this process's number, its number on its host, and how many there are on its host.
VARIABLES = {
    "JAX's variables": (COUNT, INDEX, "", ""),
    "the TPU slice": ("", "TPU_WORKER_ID", "", ""),
    "Slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One process of a job of `count`; process 0, which coordinates, listens at `coordinator` ("" = JAX knows)."""

    launcher: str
    index: int
    count: int
    coordinator: str
    local_index: int = 0  # among the processes of its host
    local_count: int = 1

    def local_devices(self) -> list[int] | None:
        """Which devices of its host a process takes: all, or one each where the host has several processes."""
        return None if self.local_count == 1 else [self.local_index]


def find(environment: Mapping[str, str]) -> Job | None:
    """The job that this process is one of; None for a process on its own, and where `ALONE` is set.

    Raises `UserError` for variables that contradict each other, or where nobody says which process coordinates.
    """
    if ALONE in environment:
        return None
    for launcher, names in VARIABLES.items():
        count = _count(launcher, environment)
        if count > 1 or (count == 1 and launcher == "JAX's variables"):
            return _job(launcher, names, count, environment)
    require(
        COORDINATOR not in environment,
        f"{COORDINATOR} is set, but neither {COUNT} and {INDEX} nor a launcher's variables say which process this is",
    )
    return None


def _count(launcher: str, environment: Mapping[str, str]) -> int:
    if launcher == "the TPU slice":
        return len(environment.get("TPU_WORKER_HOSTNAMES", "").split(","))
    if launcher == "Slurm" and "SLURM_STEP_ID" not in environment:
        return 0  # an sbatch script itself
    return _number(environment, VARIABLES[launcher][0], 0)


def _job(launcher: str, names: tuple[str, str, str, str], count: int, environment: Mapping[str, str]) -> Job:
    require(names[1] in environment, f"{names[0] or launcher} tells of {count} processes, but {names[1]} is not set")
    number = _number(environment, names[1], 0)
    require(0 <= number < count, f"{names[1]}={number} is not one of the {count} processes that {launcher} tells of")
    coordinator = environment.get(COORDINATOR, "") or _coordinator(launcher, environment)
    local_index, local_count = (_number(environment, name, default) for name, default in zip(names[2:], (0, 1)))
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        local_index, local_count = 0, 1  # JAX reads that one itself
    return Job(launcher, number, count, coordinator, local_index, local_count)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "").partition("(")[0].partition(",")[0]  # Slurm writes 4(x2),3
    require(not value or value.isdigit(), f"{name}={environment.get(name)!r} is not a number")
    return int(value) if value else default


def _coordinator(launcher: str, environment: Mapping[str, str]) -> str:
    if launcher == "the TPU slice":
        slices = _number(environment, "MEGASCALE_NUM_SLICES", 1)
        return "" if slices > 1 else f"{environment['TPU_WORKER_HOSTNAMES'].split(',')[0]}:{TPU_PORT}"
    if launcher == "Slurm":
        job, step = (_number(environment, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        host = first_host(environment.get("SLURM_STEP_NODELIST", "localhost"))
        return f"{address(host)}:{port(job + 127 * step)}"
    uri = re.match(r"(\d+)\..*?tcp://([\d.]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if launcher == "Open MPI" and uri:
        return f"{uri[2]}:{port(int(uri[1]) >> 12)}"
    raise UserError(f"{launcher} does not say where process 0 is: set {COORDINATOR}=HOST:PORT, a free port of its host")


def port(number: int) -> int:
    """A port, the same for all processes of a job, in the range that is nobody's by rule."""
    return 61440 + number % 4096


def first_host(hosts: str) -> str:
    """The first of Slurm's list of hosts: n1 of n1, of n1,n2 and of n[1-4,7]."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", hosts)
    require(match is not None, f"the list of hosts {hosts!r} cannot be read")
    assert match is not None
    return match[1] + (match[2] or "")


def address(host: str) -> str:
    """A host's name if it can be looked up, else the address that Slurm has for it."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        answer = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return host
    found = re.search(r"NodeAddr=(\S+)", answer)
    return found[1] if found else host


def this_host() -> str:
    """This host's name: a supervisor's or Slurm's for it, where there is one, as hosts may share a machine."""
    return os.environ.get(HOST) or os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
