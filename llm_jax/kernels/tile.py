"""What is visible inside one tile of scores, written for the bodies of Pallas kernels on any platform."""

import jax
import jax.numpy as jnp


def visible(
    query_index: jax.Array,
    key_index: jax.Array,
    num_keys: jax.Array | int,
    *,
    causal: bool,
    window: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
) -> jax.Array:
    """`AttentionMask.visible` for arrays that broadcast against each other, such as [T,1] and [1,S].

    Args:
      query_index: int32, of the queries among the keys (`query_offset` is in it).
      key_index: int32.
      num_keys: int32 scalar, of this row: the length of the keys, or what `key_lengths` says if that is less.
      causal: static.
      window: int32 scalar; None or <= 0 = unlimited.
      query_segments: int32, 0 = padding.
      key_segments: int32, given with `query_segments`.
    """
    seen = key_index < num_keys
    if causal or window is not None:
        seen = seen & (key_index <= query_index)
    if window is not None:
        seen = seen & ((query_index - key_index < window) | (window <= 0))
    if query_segments is not None and key_segments is not None:
        seen = seen & (query_segments == key_segments) & (key_segments != 0)
    return jnp.broadcast_to(seen, jnp.broadcast_shapes(query_index.shape, key_index.shape))
