"""Nothing but the matrix products of a train step, each as often as the step has it: what the shapes allow.

Every product runs in a compiled loop of its own, so that neither Python nor the start of a computation is counted.
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.peers.serve import serve
from benchmarks.peers.shapes import ALL, Shape
from llm_jax.host_memory import keep_freed_memory

FLOPS = 4e9  # about so many in one measured step: a small step's products are repeated
TRIES = 5  # of each way to compute a product, to find the fastest


class Product(NamedTuple):
    """`times` products [batch, rows, inner] x [batch, inner, columns] of a forward pass."""

    times: int
    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """Operations of all of them, forward and backward."""
        return 6 * self.times * self.batch * self.rows * self.inner * self.columns


def products(shape: Shape) -> list[Product]:
    """The products of a step's forward pass; attention computes every score."""
    D, L, H = shape.hidden, shape.layers, shape.hidden // shape.heads
    return [
        Product(4 * L, 1, shape.tokens, D, D),
        Product(2 * L, 1, shape.tokens, D, shape.ffn),
        Product(L, 1, shape.tokens, shape.ffn, D),
        Product(L, shape.batch * shape.heads, shape.length, H, shape.length),
        Product(L, shape.batch * shape.heads, shape.length, shape.length, H),
        Product(1, 1, shape.tokens, D, shape.vocabulary),
    ]


@functools.partial(jax.jit, static_argnums=(0, 3))
def repeat(equation: str, left: jax.Array, right: jax.Array, times: int) -> jax.Array:
    """The same product `times` times; the loop's index enters the smaller factor, or XLA would compute it once."""

    def product(small: jax.Array) -> jax.Array:
        return jnp.einsum(equation, small, right) if left.size <= right.size else jnp.einsum(equation, left, small)

    def one(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        small = carry[0].at[0, 0, 0].set(i.astype(left.dtype))
        return small, product(small)

    small = left if left.size <= right.size else right
    result = jax.eval_shape(product, small)
    return jax.lax.fori_loop(0, times, one, (small, jnp.zeros(result.shape, result.dtype)))[1]


def fastest(left: jax.Array, right: jax.Array, times: int) -> Callable[[], jax.Array]:
    """The quickest way to repeat the product [b,r,k] x [b,k,c]: how fast it is depends on how its factors lie."""
    ways = []
    for factors, result in itertools.product(("brk,bkc", "brk,bck", "bkr,bkc", "bkr,bck"), ("brc", "bcr")):
        first, second = factors.split(",")
        x = left if first == "brk" else left.swapaxes(1, 2)
        w = right if second == "bkc" else right.swapaxes(1, 2)
        ways.append(functools.partial(repeat, f"{factors}->{result}", x, w, times))
    return min(ways, key=_seconds)


def _seconds(way: Callable[[], jax.Array]) -> float:
    """Of the best of some tries, compilation apart."""
    jax.block_until_ready(way())
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        jax.block_until_ready(way())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(name: str) -> None:
    """Serve the products of the shape called `name`: forward, and backward for both factors."""
    keep_freed_memory()
    shape = ALL[name]
    assert sum(product.flops for product in products(shape)) == shape.flops
    repeats = max(1, round(FLOPS / shape.flops))
    work = []
    for product in products(shape):
        B, R, K, C = product.batch, product.rows, product.inner, product.columns
        for rows, inner, columns in ((R, K, C), (R, C, K), (K, R, C)):
            factors = jnp.full((B, rows, inner), 1e-3), jnp.full((B, inner, columns), 1e-3)
            work.append(fastest(*factors, repeats * product.times))

    def step() -> float:
        return sum(float(way()[0, 0, 0]) for way in work)

    serve(step, library=f"jax {jax.__version__}", repeats=repeats)


if __name__ == "__main__":
    main(sys.argv[1])
