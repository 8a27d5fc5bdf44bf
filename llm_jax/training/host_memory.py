"""How a process keeps the memory that its host computations use again and again."""

import ctypes
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process, on Linux with glibc; returns whether it could be arranged.

    XLA allocates a step's temporary buffer anew each time. By default glibc maps buffers of such a size from the
    kernel and returns them at once, so that every step on a CPU begins with tens of thousands of page faults:
    docs/log.md has what this was worth. Memory use stays at its peak instead of falling between steps.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never = -1  # read as the largest size there is
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, never), (M_ARENA_MAX, 1))
    return all(mallopt(name, value) == 1 for name, value in settings)
