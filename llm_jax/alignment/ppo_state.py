"""All that a PPO run carries from one iteration to the next, as one pytree, and how it is kept.

A checkpoint of it is one of the policy: its parameters are the checkpoint's model, everything else lies beside them
where a run otherwise keeps its optimiser's state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax.alignment.controllers import KlState, Moments
from llm_jax.training.state import TrainState


class PpoState(NamedTuple):
    """The state before an iteration. Scalars are replicated over the mesh."""

    iteration: jax.Array  # int32: how many are done
    policy: TrainState
    critic: TrainState | None  # None where groups of responses are their own baseline
    kl: KlState  # the coefficient of the KL penalty, and what it is controlled by
    moments: Moments  # running moments of the scores
    seed: jax.Array  # uint32: with the counters here, all randomness follows from it
    prompts_drawn: jax.Array  # int32: how many batches of prompts
    pretraining_drawn: jax.Array  # int32: how many batches of pre-training data


def as_train_state(state: PpoState) -> TrainState:
    """The state in the form in which `training.checkpoint.Checkpointer` keeps the states of all runs."""
    others = state._asdict()
    del others["iteration"]
    policy = others.pop("policy")
    others |= {"policy_step": policy.step, "policy_optimizer": policy.opt_state}
    if state.critic is None:
        del others["critic"]
    return TrainState(state.iteration, policy.params, others)


def from_train_state(kept: TrainState) -> PpoState:
    """The inverse of `as_train_state`."""
    others: dict[str, Any] = dict(kept.opt_state)
    policy = TrainState(others.pop("policy_step"), kept.params, others.pop("policy_optimizer"))
    return PpoState(iteration=kept.step, policy=policy, critic=others.pop("critic", None), **others)


def first(policy: TrainState, critic: TrainState | None, kl: KlState, moments: Moments, seed: int, mesh: Mesh) -> Any:
    """The state before the first iteration."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    zero = jnp.zeros((), jnp.int32)
    small = (kl, moments, jnp.uint32(seed % 2**32), zero, zero)
    return PpoState(jax.device_put(zero, everywhere), policy, critic, *jax.device_put(small, everywhere))


def abstract(policy: TrainState, critic: TrainState | None, kl: KlState, moments: Moments, mesh: Mesh) -> PpoState:
    """Shapes, dtypes and shardings of the state; `policy` and `critic` are abstract already."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def scalar(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=everywhere)

    kl, moments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=everywhere), (kl, moments)
    )
    counter: Any = scalar(jnp.int32)
    seed: Any = scalar(jnp.uint32)
    return PpoState(counter, policy, critic, kl, moments, seed, counter, counter)
