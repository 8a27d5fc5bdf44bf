"""Freed memory stays with the process: touching a large buffer again costs no page faults."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from llm_jax.training.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def use():
    buffer = libc.malloc(256 * 2**20)
    ctypes.memset(buffer, 1, 256 * 2**20)
    libc.free(buffer)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is glibc's")
def test_the_second_use_of_a_buffer_faults_no_pages():
    faults = {}
    for mode in ("keep", "plain"):
        command = [sys.executable, "-c", SCRIPT, mode]
        faults[mode] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["keep"] < 100 < faults["plain"]
