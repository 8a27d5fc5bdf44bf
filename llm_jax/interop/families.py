"""Model families of the Hugging Face world, each stated once: its names, its config's keys, what it can express.

The statements are read in both directions, by loading and by saving. Sources: the released configs and state dicts of
LLaMA-2, Baichuan-7B/13B, Baichuan-2, Qwen (version 1) and Qwen2.

D model, N heads, K kv heads, H head dim, F feed-forward, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from llm_jax import models
from llm_jax.config import ModelConfig, RopeScalingConfig

# The axes of each of our parameters, without the layers, and the same axes in torch, whose linear maps are stored
# [out, in] and which has one dimension for heads and their features.
LAYOUTS: dict[str, tuple[str, str]] = {
    "embedding/embedding": ("VD", "V D"),
    "layers/attention_norm/scale": ("D", "D"),
    "layers/attention/query/kernel": ("DNH", "NH D"),
    "layers/attention/query/bias": ("NH", "NH"),
    "layers/attention/key/kernel": ("DKH", "KH D"),
    "layers/attention/key/bias": ("KH", "KH"),
    "layers/attention/value/kernel": ("DKH", "KH D"),
    "layers/attention/value/bias": ("KH", "KH"),
    "layers/attention/output/kernel": ("NHD", "D NH"),
    "layers/ffn_norm/scale": ("D", "D"),
    "layers/ffn/gate/kernel": ("DF", "F D"),
    "layers/ffn/up/kernel": ("DF", "F D"),
    "layers/ffn/down/kernel": ("FD", "D F"),
    "final_norm/scale": ("D", "D"),
    "head/kernel": ("VD", "V D"),
}
ROTATED = tuple(f"layers/attention/{name}/{part}" for name in ("query", "key") for part in ("kernel", "bias"))
AXIS_FIELDS = {
    "V": "vocab_size",
    "D": "hidden_size",
    "N": "num_heads",
    "K": "num_kv_heads",
    "H": "head_dim",
    "F": "ffn_size",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of the Hugging Face world.

    Attributes:
      architectures: its class names in a config's `architectures`; the first one is written.
      tensors: a tensor's name, `{}` for the layer, to the parameters that it holds, one after the other in its rows.
      keys: a field of `ModelConfig` to the config keys that state it: the first one present counts, all are written.
      fixed: fields that every model of the family has in common.
      ffn_scale: the config's feed-forward width over the true one.
      multi_head: whether every head has keys and values of its own.
      written: further keys that its own code or other readers expect.
      refused: keys whose value must be one of those given, where present: others mean another model.
    """

    architectures: tuple[str, ...]
    tensors: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Any]
    ffn_scale: int = 1
    multi_head: bool = False
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)


def _attention(name: str, *parts: str) -> dict[str, tuple[str, ...]]:
    """Projections with their biases; a model without biases has no parameter for those, and no tensor."""
    return {
        f"{name}.{kind}": tuple(f"layers/attention/{part}/{ours}" for part in parts)
        for kind, ours in (("weight", "kernel"), ("bias", "bias"))
    }


_SELF_ATTENTION = "model.layers.{}.self_attn"
_AROUND_ATTENTION = {
    "model.embed_tokens.weight": ("embedding/embedding",),
    "model.layers.{}.input_layernorm.weight": ("layers/attention_norm/scale",),
    "model.layers.{}.self_attn.o_proj.weight": ("layers/attention/output/kernel",),
    "model.layers.{}.post_attention_layernorm.weight": ("layers/ffn_norm/scale",),
    "model.layers.{}.mlp.gate_proj.weight": ("layers/ffn/gate/kernel",),
    "model.layers.{}.mlp.up_proj.weight": ("layers/ffn/up/kernel",),
    "model.layers.{}.mlp.down_proj.weight": ("layers/ffn/down/kernel",),
    "model.norm.weight": ("final_norm/scale",),
    "lm_head.weight": ("head/kernel",),
}
_SEPARATE = {
    **_AROUND_ATTENTION,
    **_attention(f"{_SELF_ATTENTION}.q_proj", "query"),
    **_attention(f"{_SELF_ATTENTION}.k_proj", "key"),
    **_attention(f"{_SELF_ATTENTION}.v_proj", "value"),
}
_FUSED = {**_AROUND_ATTENTION, **_attention(f"{_SELF_ATTENTION}.W_pack", "query", "key", "value")}
_QWEN = {
    "transformer.wte.weight": ("embedding/embedding",),
    "transformer.h.{}.ln_1.weight": ("layers/attention_norm/scale",),
    **_attention("transformer.h.{}.attn.c_attn", "query", "key", "value"),
    "transformer.h.{}.attn.c_proj.weight": ("layers/attention/output/kernel",),
    "transformer.h.{}.ln_2.weight": ("layers/ffn_norm/scale",),
    "transformer.h.{}.mlp.w1.weight": ("layers/ffn/up/kernel",),
    "transformer.h.{}.mlp.w2.weight": ("layers/ffn/gate/kernel",),
    "transformer.h.{}.mlp.c_proj.weight": ("layers/ffn/down/kernel",),
    "transformer.ln_f.weight": ("final_norm/scale",),
    "lm_head.weight": ("head/kernel",),
}

_KEYS = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "ffn_size": ("intermediate_size",),
    "norm_eps": ("rms_norm_eps",),
    "init_std": ("initializer_range",),
}
_LLAMA_KEYS = {
    **_KEYS,
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "max_length": ("max_position_embeddings",),
    "rope_theta": ("rope_theta",),
    "tie_embeddings": ("tie_word_embeddings",),
}
_ORDINARY = {"norm_head": False, "log_n": False, "dynamic_ntk": False}
_OLDER = {"tie_embeddings": False, "window_sizes": (), "rope_scaling": RopeScalingConfig()}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
        tensors=_SEPARATE,
        keys=_LLAMA_KEYS,
        fixed={**_ORDINARY, "position": "rope", "qkv_bias": False, "window_sizes": ()},
        written={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        refused={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    ),
    "qwen2": Family(
        architectures=("Qwen2ForCausalLM",),
        tensors=_SEPARATE,
        keys=_LLAMA_KEYS,
        fixed={**_ORDINARY, "position": "rope", "qkv_bias": True},
        written={"hidden_act": "silu"},
        refused={"hidden_act": ("silu",)},
    ),
    "baichuan": Family(
        architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        tensors=_FUSED,
        keys={
            **_KEYS,
            "max_length": ("model_max_length", "max_position_embeddings"),
            "position": ("position",),  # this and the next are ours: no released config states them
            "norm_head": ("norm_head",),
        },
        fixed={**_OLDER, "rope_theta": 1e4, "qkv_bias": False, "log_n": False, "dynamic_ntk": False},
        multi_head=True,
        written={"hidden_act": "silu", "tie_word_embeddings": False},
        refused={
            "hidden_act": ("silu",),
            "tie_word_embeddings": (False,),
            "rope_theta": (1e4, None),
            "rope_scaling": (None,),
            "rope_parameters": (None,),
        },
    ),
    "qwen": Family(
        architectures=("QWenLMHeadModel",),
        tensors=_QWEN,
        keys={
            "vocab_size": ("padded_vocab_size", "vocab_size"),
            "hidden_size": ("hidden_size", "n_embd"),
            "num_layers": ("num_hidden_layers", "n_layer"),
            "num_heads": ("num_attention_heads", "n_head"),
            "head_dim": ("kv_channels",),
            "ffn_size": ("intermediate_size", "ffn_hidden_size"),
            "max_length": ("seq_length", "n_positions", "max_position_embeddings"),
            "norm_eps": ("layer_norm_epsilon",),
            "init_std": ("initializer_range",),
            "rope_theta": ("rotary_emb_base",),
            "log_n": ("use_logn_attn",),
            "dynamic_ntk": ("use_dynamic_ntk",),
        },
        fixed={**_OLDER, "position": "rope", "norm_head": False, "qkv_bias": True},
        ffn_scale=2,
        multi_head=True,
        written={"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True, "tie_word_embeddings": False},
        refused={"no_bias": (True,), "rotary_pct": (1, 1.0), "tie_word_embeddings": (False,)},
    ),
}


def sizes(config: ModelConfig) -> dict[str, int]:
    """The length of each axis of `LAYOUTS`."""
    return {axis: getattr(config, field) for axis, field in AXIS_FIELDS.items()}


def parameters(config: ModelConfig) -> set[str]:
    """The paths of a model's parameters: one without biases or with tied embeddings lacks some of `LAYOUTS`."""
    leaves = jax.tree_util.tree_leaves_with_path(models.abstract(config))
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


def torch_axes(parameter: str, config: ModelConfig) -> list[list[int]]:
    """The sizes of a parameter's axes in torch's order: a list for each dimension of torch's tensor."""
    lengths = sizes(config)
    return [[lengths[axis] for axis in group] for group in LAYOUTS[parameter][1].split()]


def torch_shape(parts: Sequence[str], config: ModelConfig) -> tuple[int, ...]:
    """The shape of a torch tensor that holds these parameters one after the other."""
    shapes = [[math.prod(group) for group in torch_axes(part, config)] for part in parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def default_for(config: ModelConfig) -> str:
    """The family in which a model is written unless the caller says otherwise: the plainest that might express it."""
    if config.position == "alibi" or config.norm_head:
        return "baichuan"
    if config.log_n or config.dynamic_ntk:
        return "qwen"
    return "qwen2" if config.qkv_bias else "llama"
