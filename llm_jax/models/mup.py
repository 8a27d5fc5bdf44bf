"""Maximal update parametrisation (muP): the best learning rate of a small width is that of a large one, too.

Yang et al. (2022), "Tensor Programs V", table 8 (appendix B), the form for Adam that also serves tied embeddings. With
r = hidden_size / mup_base_width:

    parameters                        initial std      Adam's learning rate    output multiplied by
    matrices from width to width      over sqrt(r)     over r                  -
    embedding, norms, biases, head    as configured    as configured           1 / r (the head's logits)

Here "width" is what the logical axes of `WIDTH_AXES` measure: a study scales them together. Of NormHead, whose rows
are divided by their own norm, which grows with sqrt(r), the logits are multiplied by 1 / sqrt(r): this is ours. The
multiplier is applied to the final hidden states, so that every use of a head has it.

Attention logits keep their scale 1 / sqrt(head_dim): a study widens its models by heads of one size, not by larger
heads, for which the paper's 1 / head_dim would be needed. Weight decay, which the learning rate multiplies, is not
divided by r (`optim/adamw.py`).
"""

import math
from typing import Any

import jax

from llm_jax.config import ModelConfig

WIDTH_AXES = ("embed", "heads", "kv_heads", "ffn")


def width_ratio(config: ModelConfig) -> float:
    """The width over the base's, r above; 1 in the standard parametrisation."""
    return config.hidden_size / config.mup_base_width if config.mup_base_width else 1.0


def matrix_std(config: ModelConfig) -> float:
    """Initial standard deviation of the matrices from width to width."""
    return config.init_std / math.sqrt(width_ratio(config))


def output_multiplier(config: ModelConfig) -> float:
    """By what the final hidden states, and so the logits, are multiplied."""
    ratio = width_ratio(config)
    return 1 / math.sqrt(ratio) if config.norm_head else 1 / ratio


def rate_multipliers(config: ModelConfig, logical_axes: Any) -> Any:
    """What each parameter's learning rate is multiplied by, given its logical axes; None = 1 everywhere."""
    if not config.mup_base_width:
        return None

    def multiplier(axes: tuple[str | None, ...]) -> float:
        return 1 / width_ratio(config) if sum(axis in WIDTH_AXES for axis in axes) >= 2 else 1.0

    return jax.tree.map(multiplier, logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
