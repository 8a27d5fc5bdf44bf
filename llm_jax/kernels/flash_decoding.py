"""What the Pallas forms of decoding share: the cache they read, what they know of a row, and how splits are combined.

One query per row leaves too few programs to fill a device, so the visible part of a row's cache is divided among
several ("splits"). Each gives a softmax over its own part, and these are then weighted by their log-sum-exps (Dao et
al., "Flash-Decoding for long-context inference", 2023). How many there are is compiled in, so it follows from the
length of the cache: while little of it is filled, most splits find no block to read and end at once.

Legend: B batch, S key length, N query heads, K key/value heads, R query heads per key/value head, H head dim, P splits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import fold_queries, unfold_queries


class Slots(NamedTuple):
    """A layer's keys and values, [B,K,S,H] each, head by head as they lie in the cache.

    In int8, each vector of H numbers has a float32 scale, in [B,K,S,1]; other dtypes have none.
    """

    key: jax.Array
    value: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B,K,S,H] in `dtype`."""
        return _read(self.key, self.key_scale, dtype), _read(self.value, self.value_scale, dtype)


def _read(slots_BKSH: jax.Array, scales_BKS1: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    if scales_BKS1 is None:
        return slots_BKSH.astype(dtype)
    return (slots_BKSH.astype(jnp.float32) * scales_BKS1).astype(dtype)


# The integers that `row_integers` gives for each row.
FIRST, LAST, HOLES, SEGMENT, QUERY_INDEX = range(5)


def row_integers(mask: AttentionMask, batch: int, num_keys: int) -> jax.Array:
    """Int32 [5, B]: what a kernel has to know of each row's mask.

    The visible keys lie in [FIRST, LAST), tightly, both 0 where there are none; HOLES is 1 if some keys between are
    hidden, and 0 if none. As causality, windows and lengths cut off the ends only, a key between is visible iff its
    segment id is the query's, SEGMENT. QUERY_INDEX is for ALiBi.
    """
    visible_B11S = mask.visible(1, num_keys)
    visible = True if visible_B11S is None else visible_B11S[:, 0, 0]
    visible_BS, index_S = jnp.broadcast_to(visible, (batch, num_keys)), jnp.arange(num_keys)
    last_B = jnp.max(jnp.where(visible_BS, index_S + 1, 0), axis=1)
    first_B = jnp.minimum(jnp.min(jnp.where(visible_BS, index_S, num_keys), axis=1), last_B)
    holes_B = jnp.sum(visible_BS, axis=1) < last_B - first_B
    segments = 0 if mask.query_segment_ids is None else mask.query_segment_ids[:, 0]
    query_index = 0 if mask.query_offset is None else mask.query_offset
    values = (first_B, last_B, holes_B, segments, query_index)
    return jnp.stack([jnp.broadcast_to(jnp.asarray(value, jnp.int32), batch) for value in values])


def part(row: Sequence[jax.Array], block: int, split: jax.Array, splits: int) -> tuple[jax.Array, jax.Array]:
    """The first and one past the last of the row's blocks of keys that fall to one of the splits: shared out evenly."""
    first = row[FIRST] // block
    count = (row[LAST] + block - 1) // block - first
    return first + count * split // splits, first + count * (split + 1) // splits


def folded_queries(q_B1NH: jax.Array, mask: AttentionMask, num_kv_heads: int) -> jax.Array:
    """[B,K,R,H]: the queries of each key/value head, with `query_scale` applied."""
    return fold_queries(mask.scale_queries(q_B1NH), num_kv_heads)


def product_dtype(dtype: jnp.dtype, scaled: bool) -> jnp.dtype:
    """In what probabilities and values are multiplied: the queries' dtype, unless a value's scale is in it.

    A scale may be far below 1, where float16 has no precision left.
    """
    return jnp.dtype(jnp.bfloat16) if scaled and dtype == jnp.float16 else jnp.dtype(dtype)


def combine(out_BKPRH: jax.Array, lse_BKPR: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The attention over all splits, [B,1,N,H] in `dtype`, from each split's own and its log-sum-exp, float32.

    Where a split sees nothing, its output is 0 and its log-sum-exp far below all others.
    """
    weights_BKPR1 = jax.nn.softmax(lse_BKPR, axis=2)[..., None]
    return unfold_queries(jnp.sum(out_BKPRH * weights_BKPR1, axis=2).astype(dtype), 1)
