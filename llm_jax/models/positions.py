"""Positions: rotary tables and their rotation, ALiBi slopes, log-n query scales. All in float32.

B batch, T length, N heads, H head dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.errors import require

RotaryTables = tuple[jax.Array, jax.Array]
NTK_STEPS = 32  # doublings of the trained length that an int32 can hold


def rotary_tables(config: ModelConfig, positions_BT: jax.Array, lengths_BT: jax.Array | None = None) -> RotaryTables:
    """Cosines and sines [B, T, H/2], float32, of position * frequency (RoFormer, section 3.4.2).

    `lengths_BT`, int32 [B, T or 1], asks for dynamic NTK: the length of the text that each token belongs to.
    """
    if lengths_BT is None:
        frequencies = jnp.asarray(rotary_frequencies(config, config.rope_theta), jnp.float32)
    else:
        frequencies = jnp.asarray(_ntk_frequencies(config))[ntk_doublings(lengths_BT, config.max_length)]
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotary_frequencies(config: ModelConfig, theta: float) -> np.ndarray:
    """theta^(-2i/H), float64 [H/2], changed as `config.rope_scaling` says.

    "linear" divides all by the factor (Chen et al., 2023). "llama3" divides those that turn less than
    low_frequency_factor times over the original length, keeps those that turn more than high_frequency_factor times,
    and goes linearly between (LLaMA-3.1's released code).
    """
    frequencies = theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return frequencies
    kept = np.zeros_like(frequencies)
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        turns = frequencies * scaling.original_length / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def ntk_doublings(lengths: jax.Array, trained_length: int) -> jax.Array:
    """How often the trained length must be doubled to hold each length: max(0, ceil(log2(L / S))), int32.

    In integers, because a float32 logarithm of an exact power of two may come out above it.
    """
    ratios = jnp.maximum((lengths + trained_length - 1) // trained_length, 1)
    return NTK_STEPS - jax.lax.clz(ratios - 1)


def _ntk_frequencies(config: ModelConfig) -> np.ndarray:
    """The frequencies for each number of doublings, float32 [32, H/2]: Qwen's dynamic NTK (section 2.3).

    The base is multiplied by alpha^(H / (H - 2)) with alpha = max(2^ceil(log2(L/S) + 1) - 1, 1).
    """
    head_dim = config.head_dim
    require(head_dim > 2, f"ModelConfig.dynamic_ntk needs a head_dim above 2, got {head_dim}")
    alphas = [2.0 ** (doublings + 1) - 1 for doublings in range(NTK_STEPS)]
    bases = [config.rope_theta * alpha ** (head_dim / (head_dim - 2)) for alpha in alphas]
    return np.stack([rotary_frequencies(config, base) for base in bases]).astype(np.float32)


def text_lengths(positions_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """The last position plus one of each token's segment, int32 [B, T]; without segments of its row, [B, 1].

    Segments are numbered from 0 to at most T.
    """
    if segment_ids_BT is None:
        return jnp.max(positions_BT, axis=1, keepdims=True) + 1

    def row(positions_T: jax.Array, segment_ids_T: jax.Array) -> jax.Array:
        return jax.ops.segment_max(positions_T, segment_ids_T, len(segment_ids_T) + 1)[segment_ids_T] + 1

    return jax.vmap(row)(positions_BT, segment_ids_BT)


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
