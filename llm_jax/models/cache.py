"""The key-value cache: an argument and a result of the model, never hidden state.

Slots are filled in order of *index*: every row of a batch writes at the same index, and padding on the left is marked
by segment id 0. Keys and values lie head by head, so that decoding reads each head's as one contiguous matrix.

L layers, B batch, S cache length, T new tokens, K kv heads, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.config import ModelConfig
from llm_jax.kernels.flash_decoding import Slots

INT8_LIMIT = 127


class LayerCache(Slots):
    """One layer's keys and values, which decoding reads as they lie (or all layers', with a leading L)."""

    __slots__ = ()

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, index: jax.Array) -> "LayerCache":
        """This layer's cache with new keys and values at slots `index` to `index + T`."""
        key, key_scale = _write(self.key, self.key_scale, k_BTKH, index)
        value, value_scale = _write(self.value, self.value_scale, v_BTKH, index)
        return LayerCache(key, value, key_scale, value_scale)


def _write(
    slots_BKSH: jax.Array, scales_BKS1: jax.Array | None, new_BTKH: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    new_BKTH, start = new_BTKH.transpose(0, 2, 1, 3), (0, 0, index, 0)
    if scales_BKS1 is None:
        return jax.lax.dynamic_update_slice(slots_BKSH, new_BKTH.astype(slots_BKSH.dtype), start), None
    new_BKTH = new_BKTH.astype(jnp.float32)
    new_scales_BKT1 = jnp.max(jnp.abs(new_BKTH), axis=-1, keepdims=True) / INT8_LIMIT
    scaled_BKTH = new_BKTH / jnp.where(new_scales_BKT1 > 0, new_scales_BKT1, 1.0)
    slots_BKSH = jax.lax.dynamic_update_slice(slots_BKSH, jnp.round(scaled_BKTH).astype(jnp.int8), start)
    return slots_BKSH, jax.lax.dynamic_update_slice(scales_BKS1, new_scales_BKT1, start)


class Cache(NamedTuple):
    """Keys and values of all layers, segment ids [B, S] int32 of the slots, and how many are filled, int32 [].

    `layers` follows the parameters: one `LayerCache` with a leading layer axis, or a tuple with one for each layer
    where the parameters are laid out for decoding. `context_length`, int32 [B], is the length of each row's prompt, by
    which dynamic NTK fixes the rotary base; 0 = not known yet.
    """

    layers: LayerCache | tuple[LayerCache, ...]
    segment_ids: jax.Array
    length: jax.Array
    context_length: jax.Array

    def know_context(self, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> "Cache":
        """The cache with the context length of rows that had none: the last position of these tokens plus one."""
        lengths_B = jnp.max(jnp.where(segment_ids_BT > 0, positions_BT + 1, 0), axis=1)
        return self._replace(context_length=jnp.where(self.context_length > 0, self.context_length, lengths_B))

    def repeat(self, count: int) -> "Cache":
        """Every row `count` times, one after the other: one prompt's keys and values for several continuations."""
        axis = 1 if isinstance(self.layers, LayerCache) else 0
        layers = jax.tree.map(lambda slots: jnp.repeat(slots, count, axis), self.layers)
        segment_ids, context_length = (jnp.repeat(array, count, 0) for array in (self.segment_ids, self.context_length))
        return Cache(layers, segment_ids, self.length, context_length)


def init_cache(
    config: ModelConfig,
    batch_size: int,
    length: int,
    dtype: str | None = None,
    context_length: jax.Array | None = None,
    stacked: bool = True,
) -> Cache:
    """An empty cache of `length` slots.

    Args:
      config: the model.
      batch_size: rows.
      length: slots of each row.
      dtype: of keys and values, by default the compute dtype; "int8" adds a scale to each vector.
      context_length: int32 [B], the lengths of prompts that come in several calls; by default the first call is taken
        for the whole prompt.
      stacked: whether the parameters' layers are; false for those that `for_decoding` gave.
    """
    shape = (batch_size, config.num_kv_heads, length, config.head_dim)

    def layer(*leading: int) -> LayerCache:
        slots = jnp.zeros((*leading, *shape), dtype or config.compute_dtype)
        scales = jnp.zeros((*leading, *shape[:-1], 1), jnp.float32) if dtype == "int8" else None
        return LayerCache(slots, slots, scales, scales)

    layers = layer(config.num_layers) if stacked else tuple(layer() for _ in range(config.num_layers))
    segment_ids = jnp.zeros((batch_size, length), jnp.int32)
    context_length = jnp.zeros(batch_size, jnp.int32) if context_length is None else context_length
    return Cache(layers, segment_ids, jnp.zeros((), jnp.int32), context_length)
