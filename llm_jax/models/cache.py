"""The key-value cache: an argument and a result of the model, never hidden state.

Slots are filled in order of *index*: every row of a batch writes at the same index, and padding on the left is marked
by segment id 0. L layers, B batch, S cache length, T new tokens, K kv heads, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.config import ModelConfig


class LayerCache(NamedTuple):
    """One layer's keys and values, [B, S, K, H] each (or all layers', with a leading L)."""

    key: jax.Array
    value: jax.Array

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, index: jax.Array) -> "LayerCache":
        """This layer's cache with new keys and values at slots `index` to `index + T`."""
        start = (0, index, 0, 0)
        return LayerCache(
            jax.lax.dynamic_update_slice(self.key, k_BTKH.astype(self.key.dtype), start),
            jax.lax.dynamic_update_slice(self.value, v_BTKH.astype(self.value.dtype), start),
        )


class Cache(NamedTuple):
    """Keys and values of all layers [L, B, S, K, H], segment ids [B, S] int32 of the slots, and how many are filled.

    `context_length`, int32 [B], is the length of each row's prompt, by which dynamic NTK fixes the rotary base;
    0 = not known yet.
    """

    layers: LayerCache
    segment_ids: jax.Array
    length: jax.Array
    context_length: jax.Array

    def know_context(self, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> "Cache":
        """The cache with the context length of rows that had none: the last position of these tokens plus one."""
        lengths_B = jnp.max(jnp.where(segment_ids_BT > 0, positions_BT + 1, 0), axis=1)
        return self._replace(context_length=jnp.where(self.context_length > 0, self.context_length, lengths_B))


def init_cache(
    config: ModelConfig,
    batch_size: int,
    length: int,
    dtype: str | None = None,
    context_length: jax.Array | None = None,
) -> Cache:
    """An empty cache of `length` slots; `dtype` defaults to the compute dtype.

    `context_length`, int32 [B], states the lengths of prompts that come in several calls; by default the first call
    is taken for the whole prompt.
    """
    shape = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, dtype or config.compute_dtype)
    segment_ids = jnp.zeros((batch_size, length), jnp.int32)
    context_length = jnp.zeros(batch_size, jnp.int32) if context_length is None else context_length
    return Cache(LayerCache(zeros, zeros), segment_ids, jnp.zeros((), jnp.int32), context_length)
