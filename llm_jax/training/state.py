"""The state of a training run: one pytree, created on the mesh in the layout it keeps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import models
from llm_jax.config import ModelConfig
from llm_jax.parallel import rules


class TrainState(NamedTuple):
    """How many steps were taken (int32 scalar), the master parameters and the optimiser's state."""

    step: jax.Array
    params: Any
    opt_state: Any


def _fresh(config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params = models.init(config, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, allocating nothing. Optimiser moments are laid out as parameters."""
    state = jax.eval_shape(lambda: _fresh(config, optimizer, jax.random.key(0)))
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = rules.shardings(models.logical_axes(config), state.params, mesh)
    moments = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, state.opt_state, shardings, transform_non_params=lambda _: replicated
    )
    layout: Any = TrainState(replicated, shardings, moments)  # type: ignore[arg-type]  # a tree of shardings
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)


def init_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, key: jax.Array) -> TrainState:
    """A fresh state, each device computing only its own shard; the values do not depend on the mesh."""
    layout = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(lambda k: _fresh(config, optimizer, k), out_shardings=layout)(key)


def state_of(params: Any, optimizer: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """The state before the first step of a run that begins with given parameters, in the layout of `abstract`."""
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    moments = jax.jit(optimizer.init, out_shardings=layout.opt_state)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), layout.step), params, moments)
