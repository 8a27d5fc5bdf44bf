"""Output heads: the matrix that turns hidden states into logits.

B batch, T length, D model, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.config import ModelConfig
from llm_jax.models import quantized
from llm_jax.models.quantized import Quantized
from llm_jax.parallel.rules import constrain, gather

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
        if not config.norm_head:
            return gather(kernel, axes, jnp.dtype(config.compute_dtype))
        return normalize_rows(gather(kernel, axes, jnp.dtype(jnp.float32))).astype(config.compute_dtype)

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
    if config.tie_embeddings:
        table_VD, dtype = params["embedding"]["embedding"], jnp.dtype(config.compute_dtype)
        return (quantized.gather if isinstance(table_VD, Quantized) else gather)(table_VD, ("vocab", "embed"), dtype)
    weight_VD: Any = Head(config).apply({"params": params["head"]})
    return weight_VD


def unembed(params: Any, config: ModelConfig, hidden_BTD: jax.Array) -> jax.Array:
    """Logits [B, T, V], float32, of final hidden states."""
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
