"""Which tiles of the score matrix a blockwise kernel must visit, and which of them need no mask.

Causality, windows, lengths and segment ids are turned here, in plain JAX and once per call, into a few integers per
block. A kernel's loop then runs from `first` to `last` and need not know why.

Legend: B batch, T query length, S key length, X query blocks, Y key blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.kernels.mask import AttentionMask

NO_SEGMENT = 2**30  # above every segment id: the least of a block that has none


class Ranges(NamedTuple):
    """For each block of one side, int32 [B, blocks], the blocks of the other side that it has to do with.

    Every visible pair lies in blocks [first, last). In [full_first, full_last), a part of that or empty, every pair is
    visible and no block is cut short by the end of a sequence, so that no mask is needed. `first == last` where
    nothing is visible.
    """

    first: jax.Array
    last: jax.Array
    full_first: jax.Array
    full_last: jax.Array


def key_ranges(mask: AttentionMask, batch: int, num_queries: int, num_keys: int, tile: tuple[int, int]) -> Ranges:
    """The key blocks that each block of queries looks at, [B, X]; `tile` is (queries, keys) of a tile."""
    return _ranges(*_tiles(mask, batch, num_queries, num_keys, tile))


def query_ranges(mask: AttentionMask, batch: int, num_queries: int, num_keys: int, tile: tuple[int, int]) -> Ranges:
    """The query blocks that look at each block of keys, [B, Y]."""
    some_BXY, all_BXY = _tiles(mask, batch, num_queries, num_keys, tile)
    return _ranges(some_BXY.transpose(0, 2, 1), all_BXY.transpose(0, 2, 1))


def _ranges(some_BXY: jax.Array, all_BXY: jax.Array) -> Ranges:
    blocks = some_BXY.shape[2]
    index_Y = jnp.arange(blocks, dtype=jnp.int32)
    last_BX = jnp.max(jnp.where(some_BXY, index_Y + 1, 0), axis=2)
    first_BX = jnp.minimum(jnp.min(jnp.where(some_BXY, index_Y, blocks), axis=2), last_BX)
    full_first_BX = jnp.minimum(jnp.min(jnp.where(all_BXY, index_Y, blocks), axis=2), last_BX)
    after_BXY = ~all_BXY & (index_Y >= full_first_BX[:, :, None])  # the run ends before the first of these
    full_last_BX = jnp.minimum(jnp.min(jnp.where(after_BXY, index_Y, blocks), axis=2), last_BX)
    return Ranges(first_BX, last_BX, full_first_BX, full_last_BX)


def _tiles(
    mask: AttentionMask, batch: int, num_queries: int, num_keys: int, tile: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Bool [B,X,Y] twice: whether a tile may hold a visible pair, and whether all pairs of it are visible for sure."""
    num_x, num_y = -(-num_queries // tile[0]), -(-num_keys // tile[1])
    offset = 0 if mask.query_offset is None else mask.query_offset
    offset_B1 = jnp.atleast_1d(jnp.asarray(offset, jnp.int32))[:, None]
    query_BX1 = (offset_B1 + jnp.arange(num_x, dtype=jnp.int32) * tile[0])[:, :, None]  # the first of each block
    key_11Y = (jnp.arange(num_y, dtype=jnp.int32) * tile[1])[None, None]
    last_query_BX1 = query_BX1 + tile[0] - 1
    last_key_11Y = key_11Y + tile[1] - 1
    some_BXY = jnp.ones((batch, num_x, num_y), bool)
    whole_X = jnp.arange(1, num_x + 1) * tile[0] <= num_queries
    all_BXY = some_BXY & whole_X[:, None] & (last_key_11Y < num_keys)
    if mask.causal or mask.window is not None:
        some_BXY &= key_11Y <= last_query_BX1
        all_BXY &= last_key_11Y <= query_BX1
    if mask.window is not None:
        window = jnp.asarray(mask.window, jnp.int32)
        some_BXY &= (query_BX1 - last_key_11Y < window) | (window <= 0)
        all_BXY &= (last_query_BX1 - key_11Y < window) | (window <= 0)
    if mask.key_lengths is not None:
        lengths_B11 = mask.key_lengths[:, None, None]
        some_BXY &= key_11Y < lengths_B11
        all_BXY &= last_key_11Y < lengths_B11
    if mask.query_segment_ids is not None and mask.key_segment_ids is not None:
        least_BX, most_BX, padded_BX = _segments(mask.query_segment_ids, num_x, tile[0])
        least_BY, most_BY, padded_BY = _segments(mask.key_segment_ids, num_y, tile[1])
        some_BXY &= (least_BX[:, :, None] <= most_BY[:, None]) & (least_BY[:, None] <= most_BX[:, :, None])
        one_BX, one_BY = (least_BX == most_BX) & ~padded_BX, (least_BY == most_BY) & ~padded_BY
        all_BXY &= (one_BX[:, :, None] & one_BY[:, None]) & (least_BX[:, :, None] == least_BY[:, None])
    return some_BXY, all_BXY


def _segments(ids_BT: jax.Array, blocks: int, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lowest and the highest segment id of each block, and whether it has padding, [B, blocks] each."""
    extra = blocks * size - ids_BT.shape[1]
    # Beyond the end the last id goes on: what is not there does not make a block mixed.
    ids_BXT = jnp.pad(ids_BT, ((0, 0), (0, extra)), mode="edge").reshape(ids_BT.shape[0], blocks, size)
    least_BX = jnp.min(jnp.where(ids_BXT == 0, NO_SEGMENT, ids_BXT), axis=2)
    return least_BX, jnp.max(ids_BXT, axis=2), jnp.any(ids_BXT == 0, axis=2)
