"""The updates of PPO: the shared train step with the losses of policy and critic, which leaves out what is not finite.

B rows, T tokens, M rows of a minibatch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.alignment import critic as critic_lib
from llm_jax.alignment.policy_config import PolicyLossConfig
from llm_jax.config import LoraConfig, LossConfig, ModelConfig
from llm_jax.data.batch import Batch
from llm_jax.losses import policy as policy_losses
from llm_jax.losses.weighted import LossOutput
from llm_jax.models import lora
from llm_jax.parallel import rules
from llm_jax.training import language_model, step
from llm_jax.training.loop import FINITE
from llm_jax.training.step import LossFunction, Metrics, Update


class PolicyRows(NamedTuple):
    """What the policy learns from; float32 [B,T] but for the batch."""

    batch: Any  # a Batch; its loss weights are the mask of the responses, or weights in its place
    old_logprobs: jax.Array
    reference: jax.Array  # log-probabilities
    advantages: jax.Array


class ValueRows(NamedTuple):
    """What the critic learns from; float32 [B,T] but for the batch."""

    batch: Any  # a Batch
    old_values: jax.Array
    returns: jax.Array


class PolicySettings(NamedTuple):
    """What a policy's update is compiled for, beside its optimiser."""

    model: ModelConfig
    lora: LoraConfig
    loss: PolicyLossConfig
    temperature: float
    chunk_size: int  # of the logits
    microbatches: int


class CriticSettings(NamedTuple):
    """What a critic's update is compiled for, beside its optimiser."""

    model: ModelConfig
    lora: LoraConfig
    clip: float
    microbatches: int


def policy_loss(settings: PolicySettings) -> LossFunction:
    """`loss_fn(params, rows, key, *frozen)` of `(PolicyRows, Batch of pre-training data or None)`.

    The weights of the second batch are those that it has in the sum, as `with_pretraining` makes them.
    """
    config = settings.loss
    logprobs_of = language_model.logprobs_function(
        settings.model,
        temperature=settings.temperature,
        chunk_size=settings.chunk_size,
        entropies=config.entropy_coefficient > 0,
    )
    pretraining = language_model.loss_function(settings.model, LossConfig(chunk_size=settings.chunk_size))

    def loss_fn(params: Any, rows: tuple[PolicyRows, Batch | None], key: jax.Array, *frozen: Any) -> LossOutput:
        params = attach(params, settings.lora, *frozen)
        own, others = rows
        found = logprobs_of(params, own.batch)
        output = policy_losses.policy_loss(
            found.logprobs_BT,
            own.old_logprobs,
            own.advantages,
            own.batch.loss_weights,
            clip=config.clip,
            max_log_ratio=config.max_log_ratio,
            entropies=found.entropies_BT,
            entropy_coefficient=config.entropy_coefficient,
            reference=own.reference if config.kl_coefficient else None,
            kl_coefficient=config.kl_coefficient,
        )
        if others is None:
            return output
        added = pretraining(params, others, key)
        metrics = {**output.metrics, "pretraining_loss": added.metrics["cross_entropy"]}
        return LossOutput(output.total + added.total, output.weight, metrics)

    return loss_fn


def value_loss(settings: CriticSettings) -> LossFunction:
    """`loss_fn(params, rows, key, *frozen)` of `ValueRows`."""

    def loss_fn(params: Any, rows: ValueRows, key: jax.Array, *frozen: Any) -> LossOutput:
        del key  # no dropout
        values_BT = critic_lib.values(attach(params, settings.lora, *frozen), settings.model, rows.batch)
        return policy_losses.value_loss(
            values_BT, rows.old_values, rows.returns, rows.batch.loss_weights, clip=settings.clip
        )

    return loss_fn


def attach(params: Any, config: LoraConfig, *frozen: Any) -> Any:
    """The parameters to compute with: those that are trained, or adapters beside those that are not."""
    return lora.attach(frozen[0], params, config) if config.rank else params


def with_pretraining(rows: PolicyRows, others: Any, coefficient: float) -> tuple[PolicyRows, Any]:
    """Policy rows and pre-training rows, weighted so that the loss becomes
    mean(policy loss) + coefficient * mean(cross-entropy), each over its own tokens (InstructGPT, equation 2).
    """
    if others is None:
        return rows, None
    weight = jnp.sum(rows.batch.loss_weights) / jnp.maximum(jnp.sum(others.loss_weights), 1.0)
    return rows, others._replace(loss_weights=coefficient * weight * others.loss_weights)


def pick(rows: Any, indices_M: jax.Array) -> Any:
    """Some of the rows of all arrays, laid out over the mesh."""

    def one(x: jax.Array) -> jax.Array:
        return rules.constrain(x[indices_M], "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(one, rows)


def finite_only(update: Update) -> Update:
    """The same update, after which the whole state is as it was before, its step too, where a number is not finite.

    Metrics get "skipped", 1 where that was so.
    """

    def guarded(state: Any, *arguments: Any) -> tuple[Any, Metrics]:
        updated, metrics = update(state, *arguments)
        fine = jnp.all(jnp.isfinite(jnp.stack([metrics[name] for name in FINITE])))
        state = jax.tree.map(lambda new, old: jnp.where(fine, new, old), updated, state)
        return state, {**metrics, "skipped": 1.0 - fine.astype(jnp.float32)}

    return guarded


@functools.lru_cache
def policy_update(
    settings: PolicySettings, optimizer: optax.GradientTransformationExtraArgs, coefficient: float
) -> Callable[..., Any]:
    """`(state, rows, indices, pretraining, seed, schedule, *frozen) -> (state, metrics)`, compiled once.

    One minibatch: `indices` [M] of `PolicyRows`, with a batch of pre-training data, if any, at `coefficient`. The state
    is donated.
    """
    update = finite_only(step.update_function(policy_loss(settings), optimizer, settings.microbatches))

    def minibatch(state: Any, rows: PolicyRows, indices_M: jax.Array, others: Batch | None, *rest: Any) -> Any:
        own = pick(rows, indices_M)
        if settings.loss.per_sequence:
            weights_MT = policy_losses.mean_per_sequence(own.batch.loss_weights)
            own = own._replace(batch=own.batch._replace(loss_weights=weights_MT))
        return update(state, with_pretraining(own, others, coefficient), *rest)

    return jax.jit(minibatch, donate_argnums=0)


@functools.lru_cache
def critic_update(settings: CriticSettings, optimizer: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """`(state, rows, indices, seed, schedule, *frozen) -> (state, metrics)`, as `policy_update`, of `ValueRows`."""
    update = finite_only(step.update_function(value_loss(settings), optimizer, settings.microbatches))

    def minibatch(state: Any, rows: ValueRows, indices_M: jax.Array, *rest: Any) -> Any:
        return update(state, pick(rows, indices_M), *rest)

    return jax.jit(minibatch, donate_argnums=0)
