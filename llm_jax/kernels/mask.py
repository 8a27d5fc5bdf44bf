"""Which keys a query sees and what is added to its scores, described by symbols instead of a [T,S] array.

Implementations ask for the part they need: the reference for everything at once, a blockwise kernel for one tile.

Legend: B batch, T query length, S key length, N query heads.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A pytree of the rules that together decide what is visible; every rule left at None is off.

    Causality, windows and ALiBi distances go by index: query t has index `query_offset + t`, key s has index s.
    Within a packed segment the difference of indices is the difference of positions.

    Attributes:
      causal: key j is visible to query i only if j <= i. Static.
      window: int32 scalar, may be traced; key j is visible to query i iff 0 <= i - j < window (so a window is always
        causal). 0 means unlimited. So does less, where it is traced; a number that is known `attention` refuses.
      query_segment_ids: int32 [B,T]; 0 is padding, which sees nothing.
      key_segment_ids: int32 [B,S]; visible iff equal to the query's and non-zero.
      query_offset: int32 [] or [B], the index of the first query among the keys (a cache's length before the step).
      key_lengths: int32 [B]; keys at an index >= length are invisible (the unwritten part of a cache).
      slopes: float32 [N], ALiBi: slope * (j - i) is added to the score. Not differentiated.
      query_scale: float32 [B,T], multiplies the query (Qwen's log-n scaling). Not differentiated.
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: jax.Array | int | None = None
    query_segment_ids: jax.Array | None = None
    key_segment_ids: jax.Array | None = None
    query_offset: jax.Array | int | None = None
    key_lengths: jax.Array | None = None
    slopes: jax.Array | None = None
    query_scale: jax.Array | None = None

    def visible(self, num_queries: int, num_keys: int) -> jax.Array | None:
        """Bool [B or 1, 1, T, S], true where key s is visible to query t; None where everything is."""
        return self.visible_block(0, num_queries, 0, num_keys)

    def bias(self, num_queries: int, num_keys: int) -> jax.Array | None:
        """Float32 [B or 1, N, T, S] to add to the scores, or None."""
        return self.bias_block(0, num_queries, 0, num_keys)

    def visible_block(
        self, query_start: jax.Array | int, query_size: int, key_start: jax.Array | int, key_size: int
    ) -> jax.Array | None:
        """`visible` for queries [query_start, +query_size) and keys [key_start, +key_size); starts may be traced."""
        distance_BTS = self._distance(query_start, query_size, key_start, key_size)
        rules = []
        if self.causal or self.window is not None:
            rules.append(distance_BTS >= 0)
        if self.window is not None:
            window = jnp.asarray(self.window, jnp.int32)
            rules.append((distance_BTS < window) | (window <= 0))
        if self.query_segment_ids is not None and self.key_segment_ids is not None:
            queries_BT1 = _slice(self.query_segment_ids, query_start, query_size)[:, :, None]
            keys_B1S = _slice(self.key_segment_ids, key_start, key_size)[:, None, :]
            rules.append((queries_BT1 == keys_B1S) & (keys_B1S != 0))
        if self.key_lengths is not None:
            rules.append((key_start + jnp.arange(key_size)) < self.key_lengths[:, None, None])
        if not rules:
            return None
        visible_BTS = rules[0]
        for rule in rules[1:]:
            visible_BTS = visible_BTS & rule
        return jnp.broadcast_to(visible_BTS, (visible_BTS.shape[0], query_size, key_size))[:, None]

    def bias_block(
        self, query_start: jax.Array | int, query_size: int, key_start: jax.Array | int, key_size: int
    ) -> jax.Array | None:
        """`bias` for one tile; the arguments are those of `visible_block`."""
        if self.slopes is None:
            return None
        distance_B1TS = self._distance(query_start, query_size, key_start, key_size)[:, None]
        return -self.slopes.astype(jnp.float32)[:, None, None] * distance_B1TS.astype(jnp.float32)

    def visible_keys(self, num_queries: int, num_keys: int) -> jax.Array | None:
        """Bool [B or 1, S]: false where a key is hidden from every query by padding, length, causality or the window.

        What lies at such a key is never looked at, so an unwritten cache may hold anything, NaN included. None where
        no key is hidden in this way.
        """
        key_index_S = jnp.arange(num_keys)
        rules = []
        if (self.causal or self.window is not None) and (self.query_offset is not None or num_keys > num_queries):
            rules.append(key_index_S < self._offset()[:, None] + num_queries)
        if self.window is not None and self.query_offset is not None:
            window = jnp.asarray(self.window, jnp.int32)
            rules.append((self._offset()[:, None] - key_index_S < window) | (window <= 0))
        if self.key_segment_ids is not None:
            rules.append(self.key_segment_ids != 0)
        if self.key_lengths is not None:
            rules.append(key_index_S < self.key_lengths[:, None])
        if not rules:
            return None
        visible_BS = rules[0]
        for rule in rules[1:]:
            visible_BS = visible_BS & rule
        return visible_BS

    def scale_queries(self, q_BTNH: jax.Array) -> jax.Array:
        """Queries times `query_scale`, rounded to their own dtype."""
        if self.query_scale is None:
            return q_BTNH
        scale_BT11 = jax.lax.stop_gradient(self.query_scale)[:, :, None, None]
        return (q_BTNH.astype(jnp.float32) * scale_BT11).astype(q_BTNH.dtype)

    def clean_keys(self, num_queries: int, k_BSKH: jax.Array, v_BSKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values, zero where `visible_keys` is false: 0 * NaN would otherwise reach the output."""
        visible_BS = self.visible_keys(num_queries, k_BSKH.shape[1])
        if visible_BS is None:
            return k_BSKH, v_BSKH
        visible_BS11 = visible_BS[:, :, None, None]
        return jnp.where(visible_BS11, k_BSKH, 0), jnp.where(visible_BS11, v_BSKH, 0)

    def key_range(
        self, query_start: jax.Array | int, query_size: int, num_keys: int
    ) -> tuple[jax.Array | int, jax.Array | int]:
        """The first key that these queries may see, and one past the last one, over the whole batch."""
        first: jax.Array | int = 0
        last: jax.Array | int = num_keys
        if self.causal or self.window is not None:
            last = jnp.minimum(last, jnp.max(self._offset()) + query_start + query_size)
        if self.key_lengths is not None:
            last = jnp.minimum(last, jnp.max(self.key_lengths))
        if self.window is not None:
            window = jnp.asarray(self.window, jnp.int32)
            after = jnp.maximum(jnp.min(self._offset()) + query_start + 1, 0)  # not negative: a large window overflows
            first = jnp.where(window > 0, jnp.maximum(after - window, 0), 0)
        return first, last

    def padded(self, num_queries: int, padded_queries: int, num_keys: int, padded_keys: int) -> "AttentionMask":
        """The mask of the same problem with its arrays padded at the end: no added key is visible."""
        changes: dict[str, jax.Array] = {}
        if self.query_segment_ids is not None:
            changes["query_segment_ids"] = _pad(self.query_segment_ids, padded_queries - num_queries)
        if self.key_segment_ids is not None:
            changes["key_segment_ids"] = _pad(self.key_segment_ids, padded_keys - num_keys)
        if padded_keys > num_keys:
            lengths = jnp.full((1,), num_keys, jnp.int32) if self.key_lengths is None else self.key_lengths
            changes["key_lengths"] = jnp.minimum(lengths, num_keys)
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def _offset(self) -> jax.Array:
        """Int32 [B or 1]."""
        return jnp.atleast_1d(jnp.asarray(0 if self.query_offset is None else self.query_offset, jnp.int32))

    def _distance(
        self, query_start: jax.Array | int, query_size: int, key_start: jax.Array | int, key_size: int
    ) -> jax.Array:
        """Query index minus key index, int32 [B or 1, T, S]."""
        query_index_BT = self._offset()[:, None] + query_start + jnp.arange(query_size)
        return query_index_BT[:, :, None] - (key_start + jnp.arange(key_size))


def _slice(ids: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(ids, start, size, axis=1)


def _pad(ids: jax.Array, amount: int) -> jax.Array:
    return jnp.pad(ids, ((0, 0), (0, amount)))
