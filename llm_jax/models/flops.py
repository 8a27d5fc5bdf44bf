"""Floating-point operations of training, from the configuration alone."""

from llm_jax.config import ModelConfig


def training_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of one token's forward and backward pass in a sequence of `length` tokens.

    Six per weight of every matrix multiplication (attention projections, feed-forward, output head), and six per
    multiply-add of causal attention's scores and values, which sees (length + 1) / 2 keys on average (fewer within a
    window). Embedding look-ups, norms and recomputation are not counted.
    """
    heads, head_dim = config.num_heads, config.head_dim
    projections = config.hidden_size * head_dim * (2 * heads + 2 * config.num_kv_heads)
    layer = projections + 3 * config.hidden_size * config.ffn_size
    weights = config.num_layers * layer + config.hidden_size * config.vocab_size
    windows = config.window_sizes or (0,) * config.num_layers
    keys = sum(mean_visible_keys(length, window) for window in windows)
    return 6.0 * weights + 12.0 * heads * head_dim * keys


def mean_visible_keys(length: int, window: int) -> float:
    """How many keys a query sees on average in a causal sequence, itself included; window 0 is unlimited."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
