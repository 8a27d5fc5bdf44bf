"""Eight simulated devices for every test, one compilation cache for all of them, and a Ctrl-C that interrupts."""

import os
import signal
import sys

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Tests compile hundreds of small programs and run each a few times: half of LLVM's time is better spent elsewhere.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
# Modules forget what they compiled (see below), and most programs are small and the same in many modules.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
os.environ["NUMBA_BOUNDSCHECK"] = "1"  # compiled loops that read beyond an array raise

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as in a script's background job: tests and their children press it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module():
    """What a module has compiled is forgotten after it: a worker that keeps everything grows to several gigabytes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
