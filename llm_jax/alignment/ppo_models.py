"""The models of a PPO run: the policy, its critic, and the reference that both of them leave.

With adapters, one frozen model serves all three: the reference is the policy without its adapters, and the critic has
adapters and a head of its own.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax import models
from llm_jax.alignment import critic as critic_lib
from llm_jax.alignment import finetune
from llm_jax.alignment.config import FineTuneConfig
from llm_jax.alignment.finetune import Part
from llm_jax.alignment.policy_config import PpoConfig
from llm_jax.config import LoraConfig, ModelConfig
from llm_jax.interop.pretrained import Pretrained
from llm_jax.parallel import offload


class Reference(NamedTuple):
    """The frozen model that the policy is held near."""

    config: ModelConfig
    params: Any  # to be fetched before they are used; see `parallel.offload`


class Actors(NamedTuple):
    """What is trained, and the reference."""

    model: ModelConfig  # of the policy as a whole, float, adapters merged
    policy: Part
    policy_lora: LoraConfig
    critic: Part | None  # None where groups of responses are their own baseline
    critic_lora: LoraConfig
    reference: Reference


def build(config: PpoConfig, model: Pretrained, critic: Pretrained | None, mesh: Mesh) -> Actors:
    """The models of a run, laid out over the mesh.

    Args:
      config: the run's.
      model: the policy as it begins; its parameters are given away.
      critic: what the critic begins as, if not as the policy: a reward model or a language model of the same tokenizer,
        given away too.
      mesh: where the parameters are.

    Raises:
      UserError: the critic has another tokenizer.
    """
    policy, adapters = finetune.part_of(config.training, model, mesh), config.training.lora
    reference = Reference(policy.config, policy.frozen[0]) if adapters.rank else _frozen_copy(config, model)
    if config.advantage.kind != "gae":
        return Actors(model.config, policy, adapters, None, LoraConfig(), reference)
    if critic is not None:
        critic_lib.check_tokenizer(critic, model)
        begin, adapters = critic, LoraConfig()
    elif adapters.rank:
        begin = model._replace(config=policy.config, params=policy.frozen[0])
    else:
        begin = model._replace(params=jax.tree.map(jnp.copy, model.params))
    training = _training_of_critic(config, adapters)
    own = finetune.part_of(training, critic_lib.from_model(begin, mesh), mesh)
    return Actors(model.config, policy, config.training.lora, own, adapters, reference)


def _training_of_critic(config: PpoConfig, adapters: LoraConfig) -> FineTuneConfig:
    """How the critic is trained; its adapters begin otherwise than the policy's."""
    return dataclasses.replace(
        config.training,
        seed=config.training.seed + 1,
        optimizer=config.critic.optimizer,
        lora=adapters,
        quantize="none",
    )


def stored(architecture: ModelConfig, params: Any, weights: str, offloaded: bool) -> tuple[ModelConfig, Any]:
    """A model to be used and not trained, with its weights kept as one of `policy_config.WEIGHTS`: given away."""
    if weights == "int8":
        architecture, params = models.quantize(params, architecture, "int8", donate=True)
    else:
        if weights != architecture.param_dtype:
            params = jax.tree.map(lambda x: x.astype(weights), params)
        architecture = dataclasses.replace(architecture, param_dtype=weights)
    return architecture, offload.to_host(params) if offloaded else params


def _frozen_copy(config: PpoConfig, model: Pretrained) -> Reference:
    """The policy as it begins, in the form and the memory that the config asks for."""
    copied = jax.tree.map(jnp.copy, model.params)
    return Reference(*stored(model.config, copied, config.reference_weights, config.offload))
