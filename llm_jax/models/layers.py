"""The layers of a decoder block, as small Flax Linen modules: `init` and `apply`, nothing else.

Each module states its parameters' shapes, initialisers and logical axes, once; the rest of the library derives
sharding, counts, masks and checkpoints from that statement.

B batch, T query length, S key length, D model, N heads, K kv heads, H head dim, F feed-forward.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.config import ModelConfig
from llm_jax.kernels.attention import FOR_PROMPTS, attention
from llm_jax.kernels.decode import decode_attention
from llm_jax.kernels.mask import AttentionMask
from llm_jax.models import mup, positions, quantized
from llm_jax.models.cache import LayerCache
from llm_jax.models.linear import linear, lookup, swiglu
from llm_jax.parallel.rules import LogicalAxes, constrain
from llm_jax.parallel.zero import gather


class Projection(nn.Module):
    """A linear map from the trailing `len(inputs)` dimensions of `x` to dimensions `outputs`, optionally with bias."""

    inputs: Sequence[int]
    outputs: Sequence[int]
    axes: LogicalAxes
    std: float
    config: ModelConfig
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        shape = (*self.inputs, *self.outputs)
        inputs = range(len(self.inputs))
        initializer = quantized.initializer(nn.initializers.normal(self.std), tuple(self.axes), inputs, self.config)
        y = linear(x, self.param("kernel", initializer, shape, self.config.param_dtype), tuple(self.axes))
        if self.use_bias:
            axes = self.axes[len(self.inputs) :]
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(nn.initializers.zeros, axes),
                tuple(self.outputs),
                self.config.param_dtype,
            )
            y = y + gather(bias, axes, dtype)
        return y


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast to the compute dtype, times the weight (Zhang & Sennrich, 2019)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        initializer = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale = self.param("scale", initializer, (x_BTD.shape[-1],), self.config.param_dtype)
        x32 = x_BTD.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.config.norm_eps)
        return (x32 * inverse).astype(dtype) * gather(scale, ("embed",), dtype)


def residual_std(config: ModelConfig) -> float:
    """Initial scale of the projections that write to the residual stream: ours, so that its variance starts near 1."""
    return mup.matrix_std(config) / math.sqrt(2 * config.num_layers)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary or ALiBi positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask: AttentionMask,
        rotary: positions.RotaryTables | None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        config = self.config
        q_BTNH, k_BTKH, v_BTKH = self._queries_keys_values(x_BTD)
        if rotary is not None:
            q_BTNH, k_BTKH = positions.rotate(q_BTNH, rotary), positions.rotate(k_BTKH, rotary)
        q_BTNH = constrain(q_BTNH, "batch", None, "heads", None)
        k_BTKH = constrain(k_BTKH, "batch", None, "kv_heads", None)
        v_BTKH = constrain(v_BTKH, "batch", None, "kv_heads", None)
        out_BTNH = q_BTNH  # attention has no parameters: creating a model need not choose a kernel
        if cache is not None:
            cache = cache.write(k_BTKH, v_BTKH, jnp.asarray(mask.query_offset))
            out_BTNH = _cached_attention(q_BTNH, cache, mask, config.attention)
        elif not self.is_initializing():
            out_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, mask, implementation=config.attention)
        return self._output()(out_BTNH), cache

    def _queries_keys_values(self, x_BTD: jax.Array) -> Sequence[jax.Array]:
        N, K = self.config.num_heads, self.config.num_kv_heads
        if self.config.decoding_layout:
            return jnp.split(self._project(N + 2 * K, "heads", "query_key_value")(x_BTD), (N, N + K), axis=2)
        heads = ((N, "heads", "query"), (K, "kv_heads", "key"), (K, "kv_heads", "value"))
        return [self._project(*head)(x_BTD) for head in heads]

    def _project(self, heads: int, axis: str, name: str) -> Projection:
        config = self.config
        axes = ("embed", axis, "head_dim")
        shapes = (config.hidden_size,), (heads, config.head_dim)
        return Projection(*shapes, axes, mup.matrix_std(config), config, use_bias=config.qkv_bias, name=name)

    def _output(self) -> Projection:
        config = self.config
        shapes = (config.num_heads, config.head_dim), (config.hidden_size,)
        return Projection(*shapes, ("heads", "head_dim", "embed"), residual_std(config), config, name="output")


def _cached_attention(q_BTNH: jax.Array, cache: LayerCache, mask: AttentionMask, implementation: str) -> jax.Array:
    """Attention over the cache's slots; a single query reads them where they lie."""
    cache = jax.tree.map(lambda slots: constrain(slots, "batch", "kv_heads", None, None), cache)
    if q_BTNH.shape[1] == 1:
        return decode_attention(q_BTNH, cache, mask, implementation=implementation)
    k_BKSH, v_BKSH = cache.read(q_BTNH.dtype)
    k_BSKH, v_BSKH = k_BKSH.transpose(0, 2, 1, 3), v_BKSH.transpose(0, 2, 1, 3)
    implementation = FOR_PROMPTS.get(implementation, implementation)
    return attention(q_BTNH, k_BSKH, v_BSKH, mask, implementation=implementation)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        narrow = (config.ffn_size,), (config.hidden_size,), ("ffn", "embed"), residual_std(config), config
        if config.decoding_layout:
            gate_BTF, up_BTF = jnp.split(self._widen(2 * config.ffn_size, "gate_up")(x_BTD), 2, axis=-1)
        else:
            gate_BTF, up_BTF = (self._widen(config.ffn_size, name)(x_BTD) for name in ("gate", "up"))
        hidden_BTF = constrain(swiglu(gate_BTF, up_BTF), "batch", None, "ffn")
        return Projection(*narrow, name="down")(hidden_BTF)

    def _widen(self, size: int, name: str) -> Projection:
        config = self.config
        shapes = (config.hidden_size,), (size,)
        return Projection(*shapes, ("embed", "ffn"), mup.matrix_std(config), config, name=name)


class Block(nn.Module):
    """One pre-norm decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask: AttentionMask,
        rotary: positions.RotaryTables | None,
        cache: LayerCache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        with jax.named_scope("attention"):
            normed = constrain(RMSNorm(self.config, name="attention_norm")(x_BTD), "batch", None, None)
            update, cache = Attention(self.config, name="attention")(normed, mask, rotary, cache)
            x_BTD = x_BTD + _residual(update, self.config.dropout_rate, keys[0])
        with jax.named_scope("ffn"):
            normed = constrain(RMSNorm(self.config, name="ffn_norm")(x_BTD), "batch", None, None)
            update = FeedForward(self.config, name="ffn")(normed)
            x_BTD = x_BTD + _residual(update, self.config.dropout_rate, keys[1])
        return x_BTD, cache


def _residual(update_BTD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    return dropout(constrain(update_BTD, "batch", "sequence", None), rate, key)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate); `x` itself without a key."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)


class Embedding(nn.Module):
    """The table of token embeddings."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        config, axes = self.config, ("vocab", "embed")
        initializer = quantized.table_initializer(nn.initializers.normal(config.init_std), axes, config)
        table = self.param("embedding", initializer, (config.vocab_size, config.hidden_size), config.param_dtype)
        x_BTD = lookup(table, tokens_BT, axes, jnp.dtype(config.compute_dtype))
        return constrain(x_BTD, "batch", "sequence", None)
