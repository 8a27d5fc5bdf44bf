"""An experiment of several processes on a mesh in which pairs of their devices take turns, as on a TPU's torus.

python -m tests.parallel.interleaved EXPERIMENT FLAGS...
"""

import runpy
import sys

from llm_jax.parallel import mesh

FIRST = 1024  # a process's devices are numbered from a multiple of it on

if __name__ == "__main__":
    mesh._along_hosts = lambda device: (device.id % FIRST // 2, device.process_index, device.id)
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
