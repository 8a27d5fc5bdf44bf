"""Positions: rotary tables and their rotation, ALiBi slopes, log-n query scales. All in float32.

B batch, T length, N heads, H head dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

RotaryTables = tuple[jax.Array, jax.Array]


def rotary_tables(positions_BT: jax.Array, head_dim: int, theta: float) -> RotaryTables:
    """Cosines and sines [B, T, H/2], float32, of position * theta^(-2i/H) (RoFormer, section 3.4.2)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, tables: RotaryTables) -> jax.Array:
    """Rotate the pairs (i, i + H/2) of every head by its position's angles: the half-split layout; dtype of `x`."""
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """ALiBi's slope per head, float32 [N]: 2^(-8j/n), and for n no power of two the interleaved rule of its authors."""

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * j / n) for j in range(1, n + 1)]

    base = 2 ** math.floor(math.log2(num_heads))
    slopes = powers(base) + powers(2 * base)[0::2][: num_heads - base]
    return np.asarray(slopes, np.float32)


def log_n_scale(positions_BT: jax.Array, trained_length: int) -> jax.Array:
    """Qwen's query scale max(1, ln(p + 1) / ln S) at 0-based position p, float32 [B, T]."""
    return jnp.maximum(1.0, jnp.log(positions_BT.astype(jnp.float32) + 1.0) / math.log(trained_length))
