"""The one train step: any loss function that returns a sum and a weight becomes a jitted, sharded, donated update.

Numbers in which runs of one shape differ (seed, peak learning rate, warm-up, length) are arguments of the compiled
update, so that such runs share it: in one process, through JAX's compilation cache, and mapped over (`together.py`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from llm_jax.errors import require
from llm_jax.losses.weighted import LossOutput, WeightedSum
from llm_jax.optim.adamw import global_norm
from llm_jax.optim.schedules import Schedule
from llm_jax.parallel import rules
from llm_jax.training.state import TrainState

LossFunction = Callable[..., LossOutput]  # of parameters, batch, key, and what the run does not train
Metrics = dict[str, jax.Array]
StepFunction = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Once = Callable[[Any], Any]  # of the parameters: what a step adds to them, without gradient, for all its microbatches
Update = Callable[..., tuple[TrainState, Metrics]]  # of state, batch, seed, schedule, and the same


def split_microbatches(batch: Any, count: int) -> Any:
    """Leaves [B, ...] as [count, B / count, ...], taking every count-th row so that no row leaves its device."""

    def split(x: jax.Array) -> jax.Array:
        rows = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return rules.constrain(rows, None, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(split, batch)


def sum_gradients(
    loss_fn: LossFunction,
    params: Any,
    batch: Any,
    key: jax.Array,
    microbatches: int,
    *frozen: Any,
    once: Once | None = None,
) -> tuple[Any, LossOutput]:
    """Gradients of the loss's *sum* and the loss output, added up over microbatches in the parameters' dtype."""
    added = once(params) if once else None

    def one(params: Any, added: Any, microbatch: Any, index: jax.Array | int) -> tuple[Any, LossOutput]:
        def total(params: Any) -> tuple[jax.Array, LossOutput]:
            params = {**params, **added} if added else params
            output = loss_fn(params, microbatch, jax.random.fold_in(key, index), *frozen)
            return output.total, output

        return jax.grad(total, has_aux=True)(params)

    if microbatches == 1:
        return one(params, added, batch, 0)

    def add(accumulated: Any, item: tuple[Any, jax.Array]) -> tuple[Any, None]:
        # One microbatch after the other: to gather the next one's weights early, XLA for GPUs would take a microbatch
        # out of the loop, and hold its activations, and all gathered weights, beside those of the loop.
        accumulated, *now = jax.lax.optimization_barrier((accumulated, params, added, *item))
        return jax.tree.map(jnp.add, accumulated, one(*now)), None

    rows = split_microbatches(batch, microbatches)
    first = jax.tree.map(lambda x: x[0], rows)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, params, added, first, 0))
    accumulated, _ = jax.lax.scan(add, zeros, (rows, jnp.arange(microbatches)))
    return accumulated


def update_function(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformationExtraArgs,
    microbatches: int = 1,
    once: Once | None = None,
) -> Update:
    """The pure update `(state, batch, seed, schedule, *frozen) -> (state, metrics)`; `seed` is a uint32 scalar.

    `frozen` is what `loss_fn(params, batch, key, *frozen)` reads and nobody trains, such as the model beside adapters.
    `once(params)`, such as `models.gather_once`, is merged into the parameters, a dict, that `loss_fn` gets.
    The gradient is that of total / weight over the whole global batch: one division, after all microbatches and
    devices. A batch of weight 0 gives loss 0 and a zero gradient. Randomness depends on (seed, step, microbatch) alone.
    """

    def update(
        state: TrainState, batch: Any, seed: jax.Array, schedule: Schedule, *frozen: Any
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, output = sum_gradients(loss_fn, state.params, batch, key, microbatches, *frozen, once=once)
        scale = WeightedSum(jnp.ones(()), output.weight).mean()
        gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, schedule=schedule)
            params = optax.apply_updates(state.params, updates)
        metrics = {name: value.mean() for name, value in output.metrics.items()}
        metrics |= {
            "loss": WeightedSum(output.total, output.weight).mean(),
            "weight": output.weight,
            "gradient_norm": global_norm(gradients),
            "parameter_norm": global_norm(params),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return update


def seed_number(seed: int) -> np.uint32:
    """A seed as the updates take it; `jax.random.key` too keeps the low 32 bits."""
    return np.uint32(seed % 2**32)


def bind(update: Update, seed: np.ndarray | np.uint32, schedule: Schedule, *frozen: Any) -> StepFunction:
    """The step `(state, batch) -> (state, metrics)` of a run with this `seed_number`, schedule and frozen arrays."""
    numbers: list[Any] = []

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        if not numbers:  # once, to where the state is: the loop allows no transfers between host and device
            numbers.extend(jax.device_put((seed, schedule), state.step.sharding))
        return update(state, batch, *numbers, *frozen)

    return step


def build(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Schedule,
    *,
    seed: int,
    microbatches: int = 1,
) -> StepFunction:
    """The step `(state, batch) -> (state, metrics)`, jitted, with the state donated; see `update_function`."""
    update = jax.jit(update_function(loss_fn, optimizer, microbatches), donate_argnums=0)
    return bind(update, seed_number(seed), schedule)


def check_batch(batch_size: int, microbatches: int, mesh: Mesh | AbstractMesh) -> None:
    """Raise `UserError` unless every microbatch divides over the devices that share the batch."""
    shares = rules.axis_size(mesh, "batch")
    require(
        batch_size % (microbatches * shares) == 0,
        f"batch_size={batch_size} does not divide into {microbatches} microbatches over {shares} data-parallel "
        f"devices (mesh {dict(mesh.shape)}); choose a multiple of {microbatches * shares}",
    )
