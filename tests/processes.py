"""Several real processes as one job, joined by gloo, with eight simulated devices between them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llm_jax.training import metrics

SECONDS = 300  # that a job may take
ROOT = Path(__file__).parents[1]
OF_THE_CLOCK = {"kind", "time", "tokens_per_second", "mfu", "seconds_rollout", "seconds_score", "seconds_update"}


def run_together(arguments: Sequence[str], count: int = 2, status: int = 0) -> list[str]:
    """Run a command of this Python in `count` processes, and return what each wrote to standard error.

    A process that ends with another status than `status` fails the test, with what it wrote; one that does not end in
    `SECONDS`, with what all of them wrote, and where their threads are.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONFAULTHANDLER": "1",  # SIGABRT has every thread's stack written
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={8 // count}"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | job | {"JAX_PROCESS_ID": str(index)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)
        pytest.fail("\n\n".join(process.communicate()[1] for process in processes))
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors):
        assert process.returncode == status, error
    return errors


def assert_same_numbers(found: Path, expected: Path, tolerance: float = 1e-3) -> None:
    """Two runs' folders have the same numbers of training and of held-out data, to rounding that training has grown."""
    for kind in ("train", "heldout"):
        pairs = list(zip(metrics.read(found, kind), metrics.read(expected, kind), strict=True))
        assert pairs
        for one, other in pairs:
            assert one.keys() == other.keys()
            for name in one.keys() - OF_THE_CLOCK:
                np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=1e-3, err_msg=f"{kind} {name}")
