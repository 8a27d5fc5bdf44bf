"""The state of a training run: one pytree, created on the mesh in the layout it keeps.

What is built from configs alone is built once in a process, so that runs of one shape share what JAX compiled.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import models
from llm_jax.config import LoraConfig, ModelConfig, OptimizerConfig
from llm_jax.models import lora
from llm_jax.optim import adamw
from llm_jax.parallel import rules


class TrainState(NamedTuple):
    """How many steps were taken (int32 scalar), the master parameters and the optimiser's state."""

    step: jax.Array
    params: Any
    opt_state: Any


class Adapters(NamedTuple):
    """What a run trains instead of all of a model's parameters: adapters beside them, and a reward model's head."""

    model: ModelConfig
    lora: LoraConfig


Trained = ModelConfig | Adapters


def optimizer(trained: Trained, config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a model, the same object for all configs that differ in the schedule alone."""
    return _optimizer(trained, adamw.without_schedule(config))


@functools.lru_cache
def _optimizer(trained: Trained, config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    multipliers = models.rate_multipliers(trained) if isinstance(trained, ModelConfig) else None
    return adamw.build(config, adamw.decay_mask, multipliers)


def _init(trained: Trained, key: jax.Array) -> Any:
    if isinstance(trained, ModelConfig):
        return models.init(trained, key)
    return _with_head(trained, lora.init(*trained, key), lambda: models.init(trained.model, key))


def _logical_axes(trained: Trained) -> Any:
    if isinstance(trained, ModelConfig):
        return models.logical_axes(trained)
    return _with_head(trained, lora.logical_axes(*trained), lambda: models.logical_axes(trained.model))


def _with_head(trained: Adapters, adapters: Any, whole: Callable[[], Any]) -> Any:
    """A reward model's head is trained beside the adapters: it is new, and small."""
    return {**adapters, "reward_head": whole()["reward_head"]} if trained.model.output == "reward" else adapters


def _fresh(trained: Trained, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params = _init(trained, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@functools.lru_cache
def abstract_state(trained: Trained, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, allocating nothing. Optimiser moments are laid out as parameters."""
    state = jax.eval_shape(lambda: _fresh(trained, optimizer, jax.random.key(0)))
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = rules.shardings(_logical_axes(trained), state.params, mesh)
    moments = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, state.opt_state, shardings, transform_non_params=lambda _: replicated
    )
    layout: Any = TrainState(replicated, shardings, moments)  # type: ignore[arg-type]  # a tree of shardings
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)


def init_state(trained: Trained, optimizer: optax.GradientTransformation, mesh: Mesh, key: jax.Array) -> TrainState:
    """A fresh state, each device computing only its own shard; the values do not depend on the mesh."""
    with jax.set_mesh(mesh):
        return _compiled_init(trained, optimizer, mesh)(key)


@functools.lru_cache
def _compiled_init(
    trained: Trained, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[jax.Array], TrainState]:
    layout = jax.tree.map(lambda x: x.sharding, abstract_state(trained, optimizer, mesh))
    return jax.jit(lambda key: _fresh(trained, optimizer, key), out_shardings=layout)


def state_of(params: Any, optimizer: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """The state before the first step of a run that begins with given parameters, in the layout of `abstract`."""
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    moments = jax.jit(optimizer.init, out_shardings=layout.opt_state)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), layout.step), params, moments)
