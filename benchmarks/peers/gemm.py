"""The machine's rate of float32 matrix products of side 2048, as JAX reaches it."""

import jax
import jax.numpy as jnp

from benchmarks.peers.serve import serve

SIDE = 2048
FLOPS = 2 * SIDE**3


def main() -> None:
    """Serve products."""
    matrix = jnp.full((SIDE, SIDE), 1 / SIDE)
    product = jax.jit(lambda a: a @ a)

    def step() -> float:
        return float(product(matrix)[0, 0])

    serve(step, library=f"jax {jax.__version__}")


if __name__ == "__main__":
    main()
