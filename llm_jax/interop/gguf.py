"""Models of the Llama architecture out of GGUF files, dequantised on the way into their sharded parameters."""

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jax.sharding import Mesh

from llm_jax import gguf_file
from llm_jax.config import DTYPES, ModelConfig, RopeScalingConfig
from llm_jax.errors import UserError, require
from llm_jax.gguf_file import GGUFFile, StoredTensor
from llm_jax.interop import families, placement
from llm_jax.interop.parts import Part

logger = logging.getLogger(__name__)

ARCHITECTURE = "llama"
EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
# A tensor's name, {} for the layer, to the parameter that it is; features of queries and keys are in pairs.
TENSORS = {
    EMBEDDING: "embedding/embedding",
    "blk.{}.attn_norm.weight": "layers/attention_norm/scale",
    "blk.{}.attn_q.weight": "layers/attention/query/kernel",
    "blk.{}.attn_q.bias": "layers/attention/query/bias",
    "blk.{}.attn_k.weight": "layers/attention/key/kernel",
    "blk.{}.attn_k.bias": "layers/attention/key/bias",
    "blk.{}.attn_v.weight": "layers/attention/value/kernel",
    "blk.{}.attn_v.bias": "layers/attention/value/bias",
    "blk.{}.attn_output.weight": "layers/attention/output/kernel",
    "blk.{}.ffn_norm.weight": "layers/ffn_norm/scale",
    "blk.{}.ffn_gate.weight": "layers/ffn/gate/kernel",
    "blk.{}.ffn_up.weight": "layers/ffn/up/kernel",
    "blk.{}.ffn_down.weight": "layers/ffn/down/kernel",
    "output_norm.weight": "final_norm/scale",
    HEAD: "head/kernel",
}
# What makes another model of it, where it is not zero.
REFUSED = (
    "expert_count", "attention.sliding_window", "attention.clamp_kqv", "attention.scale", "embedding_scale",
    "residual_scale", "logit_scale",
)  # fmt: skip
STORED_DTYPES = {gguf.GGMLQuantizationType.F16: "float16", gguf.GGMLQuantizationType.BF16: "bfloat16"}
# Llama 3's own settings of its rope scaling: a file has only the factors that follow from them.
LLAMA3 = RopeScalingConfig("llama3", 8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)


def load(path: str | Path, *, mesh: Mesh | None = None, dtype: str | None = None) -> tuple[ModelConfig, Any]:
    """Load the model of a GGUF file, a block of rows at a time, into the layout that the mesh asks for.

    Args:
      path: a file of the Llama architecture, in any type that the `gguf` package dequantises.
      mesh: where to put the parameters, sharded by their logical axes; None = the default device.
      dtype: of the parameters, "float32", "bfloat16" or "float16"; None = as most of them are stored, and float32 for
        quantised ones. The model computes in it too (in float32 for float16).

    Returns:
      The model's configuration and its parameters.

    Raises:
      UserError: the file is missing, damaged or of another architecture, or its tensors contradict its metadata.
    """
    require(dtype is None or dtype in DTYPES, f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    file = gguf_file.read(path)
    config = model_config(file)
    dtype = dtype or _dtype_of(file.tensors.values())
    config = dataclasses.replace(config, param_dtype=dtype, compute_dtype="float32" if dtype == "float16" else dtype)
    bad: dict[str, None] = {}
    params = placement.place(config, _sources(file, config, bad), mesh)
    if bad:
        names = list(bad)
        more = ", ..." if len(names) > 8 else ""
        logger.warning("%s: tensors with NaN or infinity in %s: %s%s", path, dtype, ", ".join(names[:8]), more)
    return config, params


def chat_template(path: str | Path) -> str:
    """The Jinja chat template of a GGUF file; "" where it has none."""
    return str(gguf_file.read(path).metadata.get("tokenizer.chat_template", ""))


def model_config(file: GGUFFile) -> ModelConfig:
    """The configuration that a file's metadata states; `UserError` for what is no plain Llama."""
    facts = _Facts(file)
    architecture = file.metadata.get("general.architecture")
    require(
        architecture == ARCHITECTURE, f"{file.path} has the architecture {architecture!r}; only llama can be loaded"
    )
    for key in REFUSED:
        require(not facts.number(key, 0), f"{file.path} is no plain Llama: it has {ARCHITECTURE}.{key}")
    require(EMBEDDING in file.tensors, f"{file.path}: tensor {EMBEDDING} is missing")
    hidden, heads = facts.count("embedding_length"), facts.count("attention.head_count")
    head_dim = facts.count("attention.key_length", hidden // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        value = facts.count(key, head_dim)
        require(
            value == head_dim, f"{file.path}: llama.{key} is {value}, and only the head size {head_dim} is supported"
        )
    theta = float(facts.number("rope.freq_base", 10_000.0))
    return ModelConfig(
        vocab_size=file.tensors[EMBEDDING].shape[0],
        hidden_size=hidden,
        num_layers=facts.count("block_count"),
        num_heads=heads,
        num_kv_heads=facts.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_size=facts.count("feed_forward_length"),
        max_length=facts.count("context_length"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, facts, head_dim, theta),
        norm_eps=float(str(np.float32(facts.number("attention.layer_norm_rms_epsilon")))),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        tie_embeddings=HEAD not in file.tensors,
    )


class _Facts:
    """The `llama.*` entries of a file's metadata."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def number(self, key: str, default: Any = None) -> Any:
        value = self._file.metadata.get(f"{ARCHITECTURE}.{key}", default)
        require(value is not None, f"{self._file.path} does not state {ARCHITECTURE}.{key}")
        usable = isinstance(value, int | float) and math.isfinite(value)
        require(usable, f"{self._file.path}: {ARCHITECTURE}.{key} is {str(value)[:40]}, not a single number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        whole = isinstance(value, int) and value > 0
        require(whole, f"{self._file.path}: {ARCHITECTURE}.{key} is {value}, not a positive whole number")
        return int(value)


def _rope_scaling(file: GGUFFile, facts: _Facts, head_dim: int, theta: float) -> RopeScalingConfig:
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, head_dim, theta)
    if kind == "none":
        return RopeScalingConfig()
    require(kind == "linear", f"{file.path}: rope scaling {kind!r} is not supported, only none, linear and Llama 3's")
    return RopeScalingConfig("linear", factor=float(facts.number("rope.scaling.factor")))


def _llama3_scaling(file: GGUFFile, head_dim: int, theta: float) -> RopeScalingConfig:
    """Llama 3's scaling with the factor that reproduces the file's divisors of the rotary frequencies."""
    divisors = file.tensors[ROPE_FACTORS].read().astype(np.float64).reshape(-1)
    scaling = dataclasses.replace(LLAMA3, factor=float(divisors.max(initial=1.0)))
    turns = scaling.original_length * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / scaling.factor + smooth)
    same = divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-3)
    require(same, f"{file.path}: tensor {ROPE_FACTORS} does not follow Llama 3's rule, the only one supported")
    return scaling


def _dtype_of(tensors: Iterable[StoredTensor]) -> str:
    """The dtype in which most of the weights are stored, float32 for those that are quantised."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[STORED_DTYPES.get(tensor.kind, "float32")] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0]


def _sources(file: GGUFFile, config: ModelConfig, bad: dict[str, None]) -> dict[str, list[placement.Source]]:
    """For every parameter its layers' places in the file; `UserError` unless the tensors are exactly those."""
    sources: dict[str, list[placement.Source]] = {}
    expected = {ROPE_FACTORS}
    for pattern, parameter in _present(config).items():
        for layer in range(config.num_layers) if "{}" in pattern else [0]:
            name = pattern.format(layer)
            tensor = _checked(file, name, families.torch_shape([parameter], config))
            expected.add(name)
            sources.setdefault(parameter, []).append(
                Part(tensor, parameter, config, parameter in families.ROTATED, bad)
            )
    for name in file.tensors.keys() - expected:
        raise UserError(f"{file.path}: tensor {name} is not one of a Llama with {config.num_layers} layers")
    return sources


def _present(config: ModelConfig) -> Mapping[str, str]:
    """The tensors of this model: one without biases or with tied embeddings lacks some."""
    parameters = families.parameters(config)
    return {pattern: parameter for pattern, parameter in TENSORS.items() if parameter in parameters}


def _checked(file: GGUFFile, name: str, shape: tuple[int, ...]) -> StoredTensor:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise UserError(f"{file.path}: tensor {name} is missing")
    require(
        tensor.shape == shape,
        f"{file.path}: tensor {name} is {list(tensor.shape)}, the metadata makes it {list(shape)}",
    )
    return tensor
