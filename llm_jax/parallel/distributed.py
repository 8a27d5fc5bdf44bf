"""Several processes as one job: joining them, and letting one of them write."""

import os
from collections.abc import Mapping

import jax
from jax.experimental import multihost_utils

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def is_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this process was started as one of several: by Slurm, on a TPU slice, or with JAX's own variables."""
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return (
        COORDINATOR in environment
        or ("SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1)
        or len(hosts) > 1
    )


def initialize() -> None:
    """Join the other processes of the job, if there are any; call it before JAX looks at its devices.

    Slurm and TPU slices are recognised by JAX. Anywhere else set JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process.
    """
    if not is_cluster(os.environ) or jax.distributed.is_initialized():
        return
    if COORDINATOR in os.environ and COUNT in os.environ:
        count, index = int(os.environ[COUNT]), int(os.environ[INDEX])
        jax.distributed.initialize(os.environ[COORDINATOR], count, index)
    else:
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this is the process that writes and prints what a job needs only once."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when every process has arrived at the point called `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
