"""The reports' model configurations by name: `presets.get("baichuan2_7b")`.

Sources: LLaMA-2 (section 2.2 and released configs), Baichuan-7B/13B and Baichuan-2 (table 3 and released configs), Qwen
(table 1 and released configs); the feed-forward width and the layer count of LLaMA-2-34B, which was never released,
are from secondary accounts. The `baichuan2_sweep_*` sizes are those of Baichuan-2's scaling-law study, named by their
non-embedding parameters in millions.
"""

import dataclasses
import difflib

from llm_jax.config import ModelConfig
from llm_jax.errors import UserError


def _llama2(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_size=ffn,
        max_length=4096,
        norm_eps=1e-5,
    )


def _multi_head(hidden: int, layers: int, heads: int, ffn: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_size=ffn,
        max_length=4096,
        norm_eps=1e-6,
    )


def _qwen(hidden: int, layers: int, heads: int, ffn: int, vocab_size: int, max_length: int) -> ModelConfig:
    base = _multi_head(hidden, layers, heads, ffn, vocab_size)
    return dataclasses.replace(base, qkv_bias=True, max_length=max_length)


def _sweep(hidden: int, ffn: int, layers: int, heads: int) -> ModelConfig:
    return dataclasses.replace(_multi_head(hidden, layers, heads, ffn, 125_696), norm_head=True)


_BAICHUAN_7B = _multi_head(4096, 32, 32, 11008, 64_000)
_BAICHUAN_13B = dataclasses.replace(_multi_head(5120, 40, 40, 13696, 64_000), position="alibi")

PRESETS: dict[str, ModelConfig] = {
    "llama2_7b": _llama2(4096, 32, 32, 32, 11008),
    "llama2_13b": _llama2(5120, 40, 40, 40, 13824),
    "llama2_34b": _llama2(8192, 48, 64, 8, 22016),
    "llama2_70b": _llama2(8192, 80, 64, 8, 28672),
    "baichuan_7b": _BAICHUAN_7B,
    "baichuan_13b": _BAICHUAN_13B,
    "baichuan2_7b": dataclasses.replace(_BAICHUAN_7B, vocab_size=125_696, norm_head=True),
    "baichuan2_13b": dataclasses.replace(_BAICHUAN_13B, vocab_size=125_696, norm_head=True),
    "qwen_1_8b": _qwen(2048, 24, 16, 5504, 151_936, 8192),
    "qwen_7b": _qwen(4096, 32, 32, 11008, 151_936, 8192),
    "qwen_14b": _qwen(5120, 40, 40, 13696, 152_064, 2048),
    "baichuan2_sweep_11m": _sweep(384, 1152, 6, 6),
    "baichuan2_sweep_51m": _sweep(704, 2112, 8, 8),
    "baichuan2_sweep_108m": _sweep(832, 2496, 12, 8),
    "baichuan2_sweep_307m": _sweep(1216, 3648, 16, 8),
    "baichuan2_sweep_835m": _sweep(1792, 5376, 20, 14),
    "baichuan2_sweep_1565m": _sweep(2240, 6720, 24, 14),
    "baichuan2_sweep_3019m": _sweep(2880, 8640, 28, 20),
}


def get(name: str) -> ModelConfig:
    """The configuration called `name`. Raises `UserError` naming the nearest one there is."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
    raise UserError(f"no model preset {name!r}; did you mean {near!r}? (all: {', '.join(PRESETS)})")
