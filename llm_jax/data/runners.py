"""Who computes Daft's dataframes: the threads of this process, or a Ray cluster with the same plans."""

import functools
import logging
import os
import socket
from typing import Any

import daft

from llm_jax.data.prepare import PrepareConfig
from llm_jax.errors import UserError, require

SECONDS = 10  # to reach a cluster
os.environ.setdefault("DAFT_PROGRESS_BAR", "0")  # the factory has its own
# Daft logs what went wrong before it raises it.
logging.getLogger("daft_local_execution").setLevel(logging.CRITICAL)


def start(config: PrepareConfig) -> None:
    """Have Daft use the config's runner. A process has one for its life: `UserError` for another one."""
    if config.runner == "ray":
        _start_ray(config.ray_address, config.workers)
    else:
        _start_native(config.workers)


@functools.cache
def _start_native(workers: int) -> None:
    try:
        daft.set_runner_native(workers or None)
    except ValueError:  # Daft has started one already, by itself or for somebody else
        require(daft.get_or_infer_runner_type() == "native", "this process uses Ray already: start another one")


@functools.cache
def _start_ray(address: str, workers: int) -> None:
    try:
        import ray
    except ImportError:
        raise UserError("PrepareConfig.runner=ray needs Ray: pip install 'llm-jax[data,ray]'") from None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _check_reachable(address)
            ray.init(address, **quiet)
        else:
            ray.init("local", num_cpus=workers or None, include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, OSError, RuntimeError) as error:
        where = address or "this machine"
        raise UserError(
            f"no Ray cluster on {where}: {str(error).splitlines()[0]} (PrepareConfig.ray_address)"
        ) from error
    try:
        daft.set_runner_ray(noop_if_initialized=True)
    except ValueError:
        require(
            daft.get_or_infer_runner_type() == "ray", "this process computes without Ray already: start another one"
        )


def _check_reachable(address: str) -> None:
    """Raise `OSError` if nobody listens at HOST:PORT, for which Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), SECONDS).close()
