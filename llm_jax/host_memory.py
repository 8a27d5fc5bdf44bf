"""How a process keeps the memory that its host computations use again and again."""

import ctypes
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
NEVER = -1  # read as the largest size there is


def keep_freed_memory(most: int | None = None) -> bool:
    """Let freed memory stay with the process, on Linux with glibc; returns whether it could be arranged.

    XLA allocates a step's temporary buffer anew each time. By default glibc maps buffers of such a size from the
    kernel and returns them at once, so that every step on a CPU begins with tens of thousands of page faults:
    docs/log.md has what this was worth. Memory use stays at its peak instead of falling between steps.

    Args:
      most: bytes at the end of the heap that stay, and twice what an allocation may take to be one of those, for work
        of many sizes; None = everything stays.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    everything = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_ARENA_MAX, 1))
    settings = everything if most is None else ((M_MMAP_THRESHOLD, most // 2), (M_TRIM_THRESHOLD, most))
    return all(mallopt(name, value) == 1 for name, value in settings)
