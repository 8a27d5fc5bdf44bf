"""Freed memory stays with the process: touching buffers again costs no page faults."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from llm_jax.host_memory import keep_freed_memory
count, megabytes, most = map(int, sys.argv[1:4])
if sys.argv[4] == "keep":
    assert keep_freed_memory(most << 20 or None)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def use():
    buffers = [libc.malloc(megabytes << 20) for _ in range(count)]
    for buffer in buffers:
        ctypes.memset(buffer, 1, megabytes << 20)
    for buffer in buffers:
        libc.free(buffer)
for _ in range(3):  # glibc's own thresholds follow what is freed
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is glibc's")
@pytest.mark.parametrize(("count", "megabytes", "most"), [(1, 256, 0), (9, 6, 64)])
def test_using_buffers_again_faults_no_pages(count, megabytes, most):
    faults = {}
    for mode in ("keep", "plain"):
        command = [sys.executable, "-c", SCRIPT, str(count), str(megabytes), str(most), mode]
        faults[mode] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["keep"] < 100 < faults["plain"]
