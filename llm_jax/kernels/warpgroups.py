"""How a kernel of several warpgroups on a Hopper GPU is put together: who copies, who multiplies, who waits for whom.

Of the three warpgroups of a program, the last is the producer: it copies blocks from global to shared memory (TMA), as
far ahead as there are buffers. The others are consumers, which each keep a part of the program's own block and
multiply on the tensor cores (wgmma). A barrier says when a buffer is full, another when all consumers are done with it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CONSUMERS = 2
# Per thread of a consumer and of the producer. A program that is launched has 168 for each thread, 504 in all.
REGISTERS = (240, 24)


class Kept(NamedTuple):
    """A consumer's half of the program's own block, [CONSUMERS, rows, ...] each, and a barrier per consumer."""

    buffers: tuple[Any, ...]
    full: Any

    def load(self, consumer: jax.Array, sources: Sequence[Any]) -> tuple[Any, ...]:
        """The consumer's buffers, filled."""
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[consumer], self.full.at[consumer])
        plgpu.barrier_wait(self.full.at[consumer])
        return tuple(buffer.at[consumer] for buffer in self.buffers)


class Ring(NamedTuple):
    """Blocks on their way from the producer to the consumers, [stages, rows, ...] each, and barriers per stage."""

    buffers: tuple[Any, ...]
    full: Any
    free: Any

    @property
    def stages(self) -> int:
        return int(self.buffers[0].shape[0])

    def stage(self, step: jax.Array) -> jax.Array:
        """The place that the block of this step passes through."""
        return jax.lax.rem(step, jnp.int32(self.stages))

    def send(self, step: jax.Array, sources: Sequence[Any]) -> None:
        """In the producer: copy a block as soon as there is room."""
        stage = self.stage(step)

        @pl.when(step >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[stage])

        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[stage], self.full.at[stage])

    def drain(self, steps: jax.Array) -> None:
        """In the producer: wait until the consumers are done with the last blocks of a walk of `steps`."""
        for stage in range(self.stages):
            pl.when(steps > stage)(functools.partial(plgpu.barrier_wait, self.free.at[stage]))

    def receive(self, step: jax.Array) -> tuple[Any, ...]:
        """In a consumer: the buffers of a block, filled."""
        stage = self.stage(step)
        plgpu.barrier_wait(self.full.at[stage])
        return tuple(buffer.at[stage] for buffer in self.buffers)

    def release(self, step: jax.Array) -> None:
        """In a consumer: this one will not look at the block again."""
        plgpu.barrier_arrive(self.free.at[self.stage(step)])


def kept(rows: int, matrices: Sequence[Any], vectors: Sequence[Any]) -> Kept:
    """Scratch for one block of `rows` rows: `matrices` are (row size, dtype), `vectors` dtypes, in this order."""
    buffers = _buffers(CONSUMERS, rows // CONSUMERS, matrices, vectors)
    return Kept(buffers, plgpu.Barrier(num_arrivals=len(buffers), num_barriers=CONSUMERS))


def ring(stages: int, rows: int, matrices: Sequence[Any], vectors: Sequence[Any]) -> Ring:
    """Scratch for `stages` blocks of `rows` rows; otherwise like `kept`."""
    buffers = _buffers(stages, rows, matrices, vectors)
    full = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=stages)
    return Ring(buffers, full, plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages))


def _buffers(copies: int, rows: int, matrices: Sequence[Any], vectors: Sequence[Any]) -> tuple[Any, ...]:
    wide = tuple(plgpu.SMEM((copies, rows, size), dtype) for size, dtype in matrices)
    return wide + tuple(plgpu.SMEM((copies, rows), dtype) for dtype in vectors)


def as_producer(body: Callable[[], None]) -> None:
    """Run `body` in the producer alone."""

    @pl.when(jax.lax.axis_index("warpgroup") == CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        body()


def as_consumer(body: Callable[[jax.Array], None]) -> None:
    """Run `body(consumer)` in each consumer."""
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        body(warpgroup)


def send(steps: jax.Array, rings: Sequence[Ring], sources: Callable[[jax.Array], Sequence[Sequence[Any]]]) -> None:
    """The producer's work: for each step, `sources(step)` names what goes into each ring."""

    def one(step: jax.Array, _: None) -> None:
        for ring, blocks in zip(rings, sources(step), strict=True):
            ring.send(step, blocks)

    jax.lax.fori_loop(0, steps, one, None)
    for ring in rings:
        ring.drain(steps)


class Product(NamedTuple):
    """sums + left @ right, or right^T; `left` may be in registers, `right` is in shared memory."""

    left: Any
    right: Any
    sums: jax.Array | None = None
    transpose: bool = False


def multiply(*products: Product, interpret: bool) -> tuple[jax.Array, ...]:
    """Float32 results of the products, which run one after the other without waiting in between.

    JAX's model of the hardware has no wgmma of registers or of a transposed operand: under `interpret` it is a plain
    product.
    """
    starts = tuple(_start(product) for product in products)
    if interpret:
        return tuple(start + _plain_product(product) for start, product in zip(starts, products, strict=True))

    def run(sums: tuple[Any, ...]) -> None:
        for total, product in zip(sums, products, strict=True):
            right = plgpu.transpose_ref(product.right, (1, 0)) if product.transpose else product.right
            plgpu.wgmma(total, product.left, right)

    result: tuple[jax.Array, ...] = pl.run_state(run)(tuple(plgpu.ACC.init(start) for start in starts))
    return result


def _start(product: Product) -> jax.Array:
    if product.sums is not None:
        return product.sums
    columns = product.right.shape[0 if product.transpose else 1]
    return jnp.zeros((product.left.shape[0], columns), jnp.float32)


def _plain_product(product: Product) -> jax.Array:
    contracted = (((1,), (1 if product.transpose else 0,)), ((), ()))
    return jax.lax.dot_general(product.left[...], product.right[...], contracted, preferred_element_type=jnp.float32)


def store(*copies: tuple[Any, Any]) -> None:
    """Copy from shared to global memory, (source, target) each, and wait until it is done."""
    plgpu.commit_smem()
    for source, target in copies:
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)


def interpreter() -> Any:
    """JAX's model of the hardware, which has no public name yet; memory that nothing has written holds NaN."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
