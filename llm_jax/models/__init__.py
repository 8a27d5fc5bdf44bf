"""Decoder-only models as pure functions of (params, config, tokens)."""

from llm_jax.models.cache import Cache, init_cache
from llm_jax.models.decoder import (
    abstract,
    count_parameters,
    gather_once,
    hidden_states,
    init,
    is_stacked,
    logical_axes,
    logits,
    rate_multipliers,
    without_mup,
)
from llm_jax.models.decoding import for_decoding
from llm_jax.models.heads import rewards, unembed, unembedding
from llm_jax.models.quantization import dequantize, quantize, weight_bytes

__all__ = [
    "Cache",
    "abstract",
    "count_parameters",
    "dequantize",
    "for_decoding",
    "gather_once",
    "hidden_states",
    "init",
    "init_cache",
    "is_stacked",
    "logical_axes",
    "logits",
    "quantize",
    "rate_multipliers",
    "rewards",
    "unembed",
    "unembedding",
    "weight_bytes",
    "without_mup",
]
