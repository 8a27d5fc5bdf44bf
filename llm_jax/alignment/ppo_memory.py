"""What a PPO run will keep in memory, before it starts: four models, and what rolling out and updating add.

B responses rolled out at once, M responses of a microbatch, T tokens of a row, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax import models
from llm_jax.alignment.policy_config import PpoConfig
from llm_jax.alignment.ppo_models import Actors
from llm_jax.config import ModelConfig
from llm_jax.parallel import offload, rules


def estimate(config: PpoConfig, actors: Actors, reward_bytes: Sequence[int], mesh: Mesh) -> str:
    """A line for each part, in bytes on each device; what is trained or cached is taken to divide over all of them."""
    parts = sizes(config, actors, reward_bytes, mesh)
    devices = mesh.size
    shown = {**parts, "together": sum(parts.values()), **waiting(config, actors, reward_bytes)}
    lines = [f"memory on each of {devices} devices, about:" if devices > 1 else "memory, about:"]
    return "\n".join([*lines, *(f"  {name:<60}{_readable(size / devices):>10}" for name, size in shown.items())])


def waiting(config: PpoConfig, actors: Actors, reward_bytes: Sequence[int]) -> dict[str, int]:
    """Bytes of every model that waits in the host's memory."""
    found = {"in the host's memory: reward models": sum(reward_bytes) if config.offload else 0}
    if offload.is_on_host(actors.reference.params):
        found["in the host's memory: reference"] = tree_bytes(actors.reference.params)
    return {name: size for name, size in found.items() if size}


def sizes(config: PpoConfig, actors: Actors, reward_bytes: Sequence[int], mesh: Mesh) -> dict[str, int]:
    """Bytes of every part, on all devices together.

    Exact for what is kept; of activations it counts the residual stream, the attention's and the feed-forward's inputs
    and outputs in each layer, which is most of them.
    """
    policy, reference, training = actors.policy, actors.reference, config.training
    rows, length = config.minibatch_size // training.microbatches, config.rollout.length
    found = {
        "policy: parameters and optimiser": tree_bytes(policy.abstract),
        "policy: frozen model under its adapters": tree_bytes(policy.frozen),
        "policy: gradients": tree_bytes(policy.abstract.params),
    }
    fetched = list(reward_bytes) if config.offload else []
    if offload.is_on_host(reference.params):
        fetched.append(tree_bytes(reference.params))
    elif not policy.frozen:
        found["reference"] = tree_bytes(reference.params)
    if actors.critic is not None:
        found["critic: parameters and optimiser"] = tree_bytes(actors.critic.abstract)
        found["critic: gradients"] = tree_bytes(actors.critic.abstract.params)
        if actors.critic.frozen and not policy.frozen:
            found["critic: frozen model under its adapters"] = tree_bytes(actors.critic.frozen)
    found["reward models"] = 0 if config.offload else sum(reward_bytes)
    found["what is fetched from the host, one at a time: the largest"] = max(fetched, default=0)
    model = actors.model
    copies = rules.axis_size(mesh, "batch")  # every device has them whole, but for the tensor axis
    found["rolling out: weights as decoding has them"] = copies * _decoding_bytes(model)
    found["rolling out: keys and values"] = _cache_bytes(model, config)
    found["updating: activations of a microbatch"] = _activation_bytes(model, rows * length)
    found["updating: logits of a chunk, three times"] = (
        3 * 4 * rows * min(length, training.loss.chunk_size) * model.vocab_size
    )
    return {name: size for name, size in found.items() if size}


def tree_bytes(tree: Any) -> int:
    """Of all arrays, or of what they will be."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _decoding_bytes(model: ModelConfig) -> int:
    """The policy's weights once more: for an iteration's rollouts they are laid out otherwise."""
    return models.count_parameters(model) * jnp.dtype(model.compute_dtype).itemsize


def _cache_bytes(model: ModelConfig, config: PpoConfig) -> int:
    """Keys and values of all rows that are drawn at once."""
    rollout = config.rollout
    rows = rollout.rows or rollout.prompts * rollout.sampling.num_samples
    itemsize = jnp.dtype(rollout.sampling.cache_dtype or model.compute_dtype).itemsize
    return 2 * rows * rollout.length * model.num_layers * model.num_kv_heads * model.head_dim * itemsize


def _activation_bytes(model: ModelConfig, tokens: int) -> int:
    """What a microbatch's forward pass keeps for its backward pass."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layer = 4 * model.hidden_size + heads + 3 * model.ffn_size
    kept = model.hidden_size if model.remat != "none" else layer  # else recomputed, but for the layers' inputs
    return tokens * model.num_layers * kept * jnp.dtype(model.compute_dtype).itemsize


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
