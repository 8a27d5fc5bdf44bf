"""The machine's rate of copying memory, as numpy reaches it on one thread for a block far larger than the caches."""

import numpy as np

from benchmarks.peers.serve import serve

BYTES = 256 * 2**20


def main() -> None:
    """Serve copies."""
    source = np.ones(BYTES // 8)
    target = np.empty_like(source)

    def step() -> float:
        np.copyto(target, source)
        return float(target[-1])

    serve(step, library=f"numpy {np.__version__}")


if __name__ == "__main__":
    main()
