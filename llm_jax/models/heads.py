"""Output heads: the matrix that turns hidden states into logits, and the vector that turns them into rewards.

B batch, T length, D model, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.config import ModelConfig
from llm_jax.errors import require
from llm_jax.models import quantized
from llm_jax.models.linear import Adapted, dense
from llm_jax.models.quantized import Quantized
from llm_jax.parallel import zero
from llm_jax.parallel.rules import constrain
from llm_jax.parallel.zero import gather

NORM_HEAD_EPS = 1e-12


class Head(nn.Module):
    """The output matrix [V, D] in the compute dtype: as it is, or with L2-normalised rows (Baichuan-2's NormHead).

    It is stored so, or as [D, V] in a float model that is laid out for decoding.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        config, axes = self.config, ("vocab", "embed")
        if config.decoding_layout and config.quantization == "none":
            return self._transposed().T
        initializer = quantized.table_initializer(nn.initializers.normal(config.init_std), axes, config)
        kernel = self.param("kernel", initializer, (config.vocab_size, config.hidden_size), config.param_dtype)
        if isinstance(kernel, Quantized):  # quantising normalises the rows
            return quantized.gather(kernel, axes, jnp.dtype(config.compute_dtype))
        dtype = jnp.dtype(config.compute_dtype)
        if isinstance(kernel, Adapted):
            weight_VD = dense(kernel, axes, 1, jnp.dtype(jnp.float32) if config.norm_head else dtype)
            return normalize_rows(weight_VD).astype(dtype) if config.norm_head else weight_VD
        # Normalised on the shards, so that what moves is in the compute dtype.
        return gather(normalize_rows(kernel) if config.norm_head else kernel, axes, dtype)

    def _transposed(self) -> jax.Array:
        config, axes = self.config, ("embed", "vocab")
        initializer = nn.with_logical_partitioning(nn.initializers.normal(config.init_std), axes)
        kernel = self.param("kernel", initializer, (config.hidden_size, config.vocab_size), config.param_dtype)
        return gather(kernel, axes, jnp.dtype(config.compute_dtype))


def normalize_rows(weight_VD: jax.Array) -> jax.Array:
    """Rows over max(their L2 norm, 1e-12), float32; gradients flow through the norm."""
    squares_V1 = jnp.sum(jnp.square(weight_VD.astype(jnp.float32)), axis=-1, keepdims=True)
    return weight_VD * jax.lax.rsqrt(jnp.maximum(squares_V1, NORM_HEAD_EPS**2))


def unembedding(params: Any, config: ModelConfig) -> jax.Array:
    """The matrix [V, D] in the compute dtype with which the logits are `hidden @ unembedding.T`."""
    _check_has_logits(config)
    if config.tie_embeddings:
        table_VD, dtype = zero.attached(params, "embedding")["embedding"], jnp.dtype(config.compute_dtype)
        return (quantized.gather if isinstance(table_VD, Quantized) else gather)(table_VD, ("vocab", "embed"), dtype)
    weight_VD: Any = Head(config).apply({"params": zero.attached(params, "head")})
    return weight_VD


def unembed(params: Any, config: ModelConfig, hidden_BTD: jax.Array) -> jax.Array:
    """Logits [B, T, V], float32, of final hidden states. Raises `UserError` for a reward model."""
    _check_has_logits(config)
    with jax.named_scope("head"):
        hidden_BTD = constrain(hidden_BTD, "batch", None, None)
        stored_VD = params["embedding"]["embedding"] if config.tie_embeddings else params["head"]["kernel"]
        if isinstance(stored_VD, Quantized):
            logits_BTV = quantized.logits(hidden_BTD, stored_VD, ("vocab", "embed"))
            return constrain(logits_BTV, "batch", None, "vocab")
        weight_VD = unembedding(params, config)
        if config.tie_embeddings and hidden_BTD.shape[1] == 1:
            # For one token, XLA's CPU product reads a matrix [V, D] 1.5 times as fast if it comes first.
            logits_VBT = jnp.einsum("vd,btd->vbt", weight_VD, hidden_BTD, preferred_element_type=jnp.float32)
            logits_BTV = logits_VBT.transpose(1, 2, 0)
        else:
            logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, weight_VD, preferred_element_type=jnp.float32)
        return constrain(logits_BTV, "batch", None, "vocab")


def _check_has_logits(config: ModelConfig) -> None:
    require(config.output == "logits", "this is a reward model: it has no logits, and nothing can be generated with it")


class RewardHead(nn.Module):
    """A scalar for every hidden state, float32: the head that replaces the logits (LLaMA-2, section 3.2.2).

    It starts at normal(0, 1 / sqrt(D + 1)), as in Stiennon et al. (2020), so that the first rewards are of order 1.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
        D, dtype = self.config.hidden_size, self.config.param_dtype
        normal = nn.with_logical_partitioning(nn.initializers.normal((D + 1) ** -0.5), ("embed",))
        kernel: Any = self.param("kernel", normal, (D,), dtype)
        bias: Any = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ()), (), dtype)
        kernel_D = gather(kernel, ("embed",), jnp.dtype(jnp.float32))
        return jnp.einsum("btd,d->bt", hidden_BTD.astype(jnp.float32), kernel_D) + bias.astype(jnp.float32)


def rewards(params: Any, config: ModelConfig, hidden_BTD: jax.Array) -> jax.Array:
    """The scalar of each hidden state [B, T, D], float32 [B, T]. Raises `UserError` for a model without such a head."""
    require(config.output == "reward", "this model gives logits: train a reward model of it first")
    with jax.named_scope("reward_head"):
        rewards_BT: Any = RewardHead(config).apply({"params": params["reward_head"]}, hidden_BTD)
    return rewards_BT
