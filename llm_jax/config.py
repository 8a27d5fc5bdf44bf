"""Frozen, validated dataclasses, and the bridge between them and `ml_collections.ConfigDict`.

Scripts speak ConfigDict (so that `--config.a.b=value` works); everything inside `llm_jax` takes the dataclasses
below. A value of 0 or an empty string or tuple means "not set" wherever the field's comment says so, because a
ConfigDict field needs a type and None has none.
"""

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_collections

from llm_jax.errors import UserError, require

DTYPES = ("float32", "bfloat16", "float16")
POSITIONS = ("rope", "alibi")
REMAT_POLICIES = ("none", "full", "dots", "save_attention")
GATHERS = ("layer", "step", "group")
KNOWN_SIZES = ("2b", "7b", "13b", "34b", "70b")  # of models for which `parallel.mesh` knows meshes
# Fields of a `ModelConfig` that say how it is computed and not what.
EXECUTION_FIELDS = ("attention", "remat", "gather", "scan_layers", "groups", "gather_tables")
ATTENTION_IMPLEMENTATIONS = ("auto", "reference", "chunked", "pallas_gpu", "pallas_tpu", "splash", "mosaic_gpu")
SCHEDULES = ("cosine", "linear", "constant")
CORPUS_PROFILES = ("tiny", "clean", "default")
TOKENIZER_STYLES = ("baichuan2", "baichuan1", "llama2")
ROPE_SCALINGS = ("none", "linear", "llama3")
QUANTIZATIONS = ("none", "int8", "int4")
CACHE_DTYPES = ("", "int8", *DTYPES)
OUTPUTS = ("logits", "reward")
LORA_TARGETS = ("attention", "query", "key", "value", "output", "ffn", "gate", "up", "down", "head")


def one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `UserError`, naming the nearest allowed value, unless `value` is one of `allowed`."""
    near = difflib.get_close_matches(value, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    require(value in allowed, f"{field}={value!r} is not one of {', '.join(allowed)}{hint}")


def positive(owner: object, *fields: str) -> None:
    """Raise `UserError` unless these fields of a config are above 0."""
    for field in fields:
        value = getattr(owner, field)
        require(value > 0, f"{type(owner).__name__}.{field}={value} must be positive")


def non_negative(owner: object, *fields: str) -> None:
    """Raise `UserError` unless these fields of a config are 0 or above."""
    for field in fields:
        value = getattr(owner, field)
        require(value >= 0, f"{type(owner).__name__}.{field}={value} must not be negative")


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """How a checkpoint's rotary frequencies were changed for good, as newer Llama-architecture configs state it."""

    kind: str = "none"  # linear: positions over `factor`; llama3: low frequencies over `factor`, smoothly
    factor: float = 1.0
    low_frequency_factor: float = 1.0  # llama3 only, like the two below
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        one_of("RopeScalingConfig.kind", self.kind, ROPE_SCALINGS)
        positive(self, "factor", "low_frequency_factor", "high_frequency_factor", "original_length")
        require(
            self.kind != "llama3" or self.low_frequency_factor < self.high_frequency_factor,
            f"RopeScalingConfig.low_frequency_factor={self.low_frequency_factor} must be below "
            f"high_frequency_factor={self.high_frequency_factor}",
        )


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """How some neighbouring layers are executed; master weights, optimiser and checkpoints are the same for all.

    `gather` says when a weight is made whole for compute: "layer", over all data-parallel devices where each layer
    begins, forwards and backwards (ZeRO-3); "step", once for all microbatches of a step (ZeRO-1/2); "group", over
    `replica` once a step and over `data`, inside a group of hosts, where each layer begins (hierarchical).
    """

    layers: int = 1
    gather: str = "layer"
    remat: str = "none"
    offload: bool = False  # what `remat` keeps for the backward pass waits in the host's memory

    def __post_init__(self) -> None:
        positive(self, "layers")
        one_of("LayerGroup.gather", self.gather, GATHERS)
        one_of("LayerGroup.remat", self.remat, REMAT_POLICIES)
        require(
            not self.offload or self.remat != "none",
            'LayerGroup.offload moves what remat keeps to the host: choose "full", "dots" or "save_attention"',
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: every family of the LLaMA-2, Baichuan and Qwen reports is one of these."""

    # Architecture: what a checkpoint's weights mean.
    vocab_size: int = 32000
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    ffn_size: int = 11008
    max_length: int = 4096  # the length the model is trained at
    position: str = "rope"
    rope_theta: float = 1e4
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    norm_head: bool = False
    tie_embeddings: bool = False
    output: str = "logits"  # reward: a scalar instead, as reward models and critics have
    window_sizes: tuple[int, ...] = ()  # one per layer, 0 = unlimited; () = no windows at all
    log_n: bool = False  # Qwen's log-n attention scaling beyond max_length; inference only
    dynamic_ntk: bool = False  # Qwen's larger rotary base beyond max_length; inference only
    quantization: str = "none"  # of the weights; inference only
    decoding_layout: bool = False  # parameters as `models.for_decoding` lays them out; inference only
    quantization_group: int = 0  # at most how many input features of a matrix share a scale; 0 = all
    mup_base_width: int = 0  # muP: the hidden size at which init_std and the learning rate hold; 0 = no muP
    # Training.
    dropout_rate: float = 0.0
    neftune_alpha: float = 0.0  # how strong NEFTune's noise on the embedded tokens is; 0 = none
    init_std: float = 0.02  # ours; no report states it
    # Execution: none of these changes what is computed.
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"  # of every layer, unless `groups` says
    gather: str = "layer"  # the same of when a layer is gathered
    scan_layers: bool = True
    groups: tuple[LayerGroup, ...] = ()  # the layers in their order; () = all alike
    gather_tables: str = "layer"  # when embedding and head are gathered; "layer" = where they are used

    def __post_init__(self) -> None:
        positive(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        positive(self, "ffn_size", "max_length", "rope_theta", "norm_eps", "init_std")
        non_negative(self, "quantization_group", "mup_base_width", "neftune_alpha")
        one_of("ModelConfig.quantization", self.quantization, QUANTIZATIONS)
        one_of("ModelConfig.position", self.position, POSITIONS)
        one_of("ModelConfig.output", self.output, OUTPUTS)
        one_of("ModelConfig.remat", self.remat, REMAT_POLICIES)
        one_of("ModelConfig.attention", self.attention, ATTENTION_IMPLEMENTATIONS)
        one_of("ModelConfig.gather", self.gather, GATHERS)
        one_of("ModelConfig.gather_tables", self.gather_tables, GATHERS)
        one_of("ModelConfig.param_dtype", self.param_dtype, DTYPES)
        one_of("ModelConfig.compute_dtype", self.compute_dtype, DTYPES)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"ModelConfig.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
        )
        require(
            self.position != "rope" or self.head_dim % 2 == 0,
            f"ModelConfig.head_dim={self.head_dim} must be even for rotary positions",
        )
        require(
            len(self.window_sizes) in (0, self.num_layers),
            f"ModelConfig.window_sizes has {len(self.window_sizes)} entries for {self.num_layers} layers",
        )
        require(all(w >= 0 for w in self.window_sizes), "ModelConfig.window_sizes must not be negative")
        grouped = sum(group.layers for group in self.layer_groups())
        require(grouped == self.num_layers, f"ModelConfig.groups hold {grouped} layers, num_layers={self.num_layers}")
        require(0 <= self.dropout_rate < 1, f"ModelConfig.dropout_rate={self.dropout_rate} must be in [0, 1)")
        require(not (self.norm_head and self.tie_embeddings), "ModelConfig: norm_head needs tie_embeddings=False")

    def architecture(self) -> dict[str, Any]:
        """The fields that a checkpoint's weights depend on, for comparing two configs."""
        excluded = ("dropout_rate", "neftune_alpha", "init_std", "compute_dtype", "log_n", "dynamic_ntk")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in (*excluded, *EXECUTION_FIELDS)}

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """`groups`, or the one that () stands for."""
        return self.groups or (LayerGroup(self.num_layers, self.gather, self.remat),)

    def is_stochastic(self) -> bool:
        """Whether training draws random numbers inside the model: for dropout, or for NEFTune's noise."""
        return self.dropout_rate > 0 or self.neftune_alpha > 0


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen matrices (Hu et al., 2021): which matrices, and how large the adapters are."""

    rank: int = 0  # 0 = no adapters
    alpha: float = 16.0  # what the adapters compute is multiplied by alpha / rank
    targets: tuple[str, ...] = ("attention", "ffn")  # names of matrices, or of a layer's part for all of its matrices

    def __post_init__(self) -> None:
        non_negative(self, "rank")
        positive(self, "alpha")
        require(len(self.targets) > 0, f"LoraConfig.targets is empty: name some of {', '.join(LORA_TARGETS)}")
        for target in self.targets:
            one_of("LoraConfig.targets", target, LORA_TARGETS)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Cross-entropy in chunks of `chunk_size` tokens of each sequence, with two optional logit regularisers."""

    chunk_size: int = 256
    only_weighted: bool = False  # no logits of tokens that have no weight; worth it where many have none
    z_loss: float = 0.0  # coefficient of logsumexp(logits)^2
    max_z_loss: float = 0.0  # coefficient of max(logits)^2; Baichuan-2 equation 1 uses 2e-4

    def __post_init__(self) -> None:
        positive(self, "chunk_size")
        non_negative(self, "z_loss", "max_z_loss")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, a global-norm clip and a warm-up schedule."""

    learning_rate: float = 3e-4  # the peak
    schedule: str = "cosine"
    warmup_steps: int = 2000
    decay_steps: int = 0  # 0 = the run's length
    final_fraction: float = 0.1  # the last learning rate over the peak
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # 0 = no clip

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "eps")
        non_negative(self, "warmup_steps", "decay_steps", "weight_decay", "clip_norm")
        one_of("OptimizerConfig.schedule", self.schedule, SCHEDULES)
        for field in ("b1", "b2"):
            value = getattr(self, field)
            require(0 <= value < 1, f"OptimizerConfig.{field}={value} must be in [0, 1)")
        require(
            0 <= self.final_fraction <= 1, f"OptimizerConfig.final_fraction={self.final_fraction} must be in [0, 1]"
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; `data=-1` takes whatever devices `replica` and `tensor` leave."""

    replica: int = 1
    data: int = -1
    tensor: int = 1
    known: str = ""  # "7b": a mesh that serves models of about that size on the devices there are; "" = the three above

    def __post_init__(self) -> None:
        positive(self, "replica", "tensor")
        one_of("MeshConfig.known", self.known, ("", *KNOWN_SIZES))
        require(self.data == -1 or self.data > 0, f"MeshConfig.data={self.data} must be positive, or -1 for the rest")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which tokenised dataset a run reads, and how a global batch is drawn from it."""

    dataset: str = ""  # the folder that prepare_data wrote
    sequence_length: int = 4096
    batch_size: int = 1024  # sequences in a global batch
    seed: int = 0
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # source -> weight; {} = the dataset's
    prefetch: int = 8  # batches prepared ahead in the background

    def __post_init__(self) -> None:
        positive(self, "sequence_length", "batch_size", "prefetch")
        require(all(w >= 0 for w in self.weights.values()), "DataConfig.weights must not be negative")
        require(not self.weights or sum(self.weights.values()) > 0, "DataConfig.weights are all zero")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved and which checkpoints stay."""

    every_steps: int = 1000
    keep_last: int = 3
    keep_every_tokens: int = 0  # also keep, and publish, one for every so many tokens seen; 0 = none
    keep_published: int = 0  # only the last so many of those; 0 = all

    def __post_init__(self) -> None:
        positive(self, "every_steps", "keep_last")
        non_negative(self, "keep_every_tokens", "keep_published")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole pre-training run."""

    steps: int = 500_000
    seed: int = 0
    microbatches: int = 1
    log_every: int = 10
    eval_every: int = 1000  # 0 = only at the end
    eval_batches: int = 16
    profile_start: int = 0  # first profiled step, with profile_steps > 0
    profile_steps: int = 0
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        positive(self, "steps", "microbatches", "log_every", "eval_batches")
        non_negative(self, "seed", "eval_every", "profile_start", "profile_steps")
        require(
            self.model.quantization == "none",
            f"TrainConfig.model.quantization={self.model.quantization!r}: quantised weights cannot be trained; train "
            "float ones and quantise the result",
        )
        require(not self.model.decoding_layout, "TrainConfig.model.decoding_layout is for generation: leave it off")
        require(
            self.data.batch_size % self.microbatches == 0,
            f"DataConfig.batch_size={self.data.batch_size} is not divisible by microbatches={self.microbatches}",
        )
        require(
            self.data.sequence_length <= self.model.max_length,
            f"DataConfig.sequence_length={self.data.sequence_length} is longer than ModelConfig.max_length="
            f"{self.model.max_length}, the length the model is trained at: make them equal",
        )


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """What `prepare_data` reads: a named profile of registry sources, or the user's own files."""

    profile: str = "default"  # ignored when `path` is set
    sources: tuple[str, ...] = ()  # only these of the profile; () = all
    path: str = ""  # a file or folder of your own; docs/data.md has the kinds of files
    text_field: str = "text"  # of JSON Lines, and the column of Parquet files and SQLite tables
    table: str = ""  # of SQLite files; "" = the only one with that column
    cache: str = ""  # where downloads are kept; "" = the user's cache folder
    tokenizer: str = ""  # a tokenizer's file, or a folder with one
    output: str = ""  # the dataset's folder
    holdout_fraction: float = 0.01  # of every source's documents, chosen by hash
    workers: int = 0  # processes; 0 = one per core

    def __post_init__(self) -> None:
        one_of("CorpusConfig.profile", self.profile, CORPUS_PROFILES)
        non_negative(self, "workers")
        require(
            0 < self.holdout_fraction < 1, f"CorpusConfig.holdout_fraction={self.holdout_fraction} must be in (0, 1)"
        )
        require(not (self.path and self.sources), "CorpusConfig.sources chooses among a profile's: leave path empty")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A SentencePiece BPE vocabulary and the paper whose settings it follows."""

    vocab_size: int = 125_696
    style: str = "baichuan2"
    character_coverage: float = 0.0  # share of the text's characters with pieces of their own; 0 = the style's
    corpus: CorpusConfig = CorpusConfig()
    sample_bytes: int = 0  # train on about so many bytes, drawn over all sources; 0 = everything
    seed: int = 0
    workers: int = 0  # threads; 0 = one per core

    def __post_init__(self) -> None:
        positive(self, "vocab_size")
        non_negative(self, "sample_bytes", "seed", "workers")
        one_of("TokenizerConfig.style", self.style, TOKENIZER_STYLES)
        require(
            0 <= self.character_coverage <= 1,
            f"TokenizerConfig.character_coverage={self.character_coverage} must be in [0, 1]",
        )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How continuations are drawn."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    repetition_penalty: float = 1.0  # 1 = off
    num_samples: int = 1  # continuations of each prompt, from one prefill
    max_context: int = 0  # prompt and new tokens together; 0 = the model's max_length
    prefill_chunk: int = 512  # prompts longer than this are read in chunks of it
    cache_dtype: str = ""  # of keys and values; "" = the compute dtype
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "max_new_tokens", "repetition_penalty", "num_samples", "prefill_chunk")
        non_negative(self, "temperature", "top_k", "max_context", "seed")
        one_of("SamplingConfig.cache_dtype", self.cache_dtype, CACHE_DTYPES)
        require(0 < self.top_p <= 1, f"SamplingConfig.top_p={self.top_p} must be in (0, 1]")


Config = TypeVar("Config")


def from_config_dict(cls: type[Config], values: Mapping[str, Any], prefix: str = "config") -> Config:
    """Build the dataclass `cls` from a ConfigDict or a plain mapping.

    Raises `UserError` for an unknown key (naming the nearest known one), a wrong type or an invalid value.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(unknown_key(f"{prefix}.{key}", [f"{prefix}.{name}" for name in fields]))
    return cls(**{key: _convert(hints[key], values[key], f"{prefix}.{key}") for key in values})


def keys(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a config dataclass with its type, groups before their members."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        yield prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{prefix}{field.name}.")


def unknown_key(key: str, known: list[str]) -> str:
    """The one-line message for a key that does not exist, naming the nearest one that does."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown config key {key!r}; did you mean {near[0]!r}?" if near else f"unknown config key {key!r}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, Mapping | ml_collections.ConfigDict), f"{key} must be a group of keys, got {value!r}")
        return from_config_dict(hint, value, key)  # type: ignore[arg-type]
    origin = typing.get_origin(hint) or hint
    if origin is Mapping:
        group = isinstance(value, Mapping | ml_collections.ConfigDict)
        require(group, f"{key} must hold names with numbers, got {value!r}")
        return {str(name): _convert(float, number, f"{key}.{name}") for name, number in value.items()}
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{key} must be a list, got {value!r}")
        items = typing.get_args(hint)
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        require(len(value) == len(items), f"{key} must hold {len(items)} values, got {value!r}")
        return tuple(_convert(item, v, f"{key}[{i}]") for i, (item, v) in enumerate(zip(items, value)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(type(value) is hint, f"{key} must be {hint.__name__}, got {value!r}")
    return value


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """The ConfigDict whose fields are those of a dataclass: the form in which `configs/*.py` return their config."""
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def save(config: Any, path: Path) -> None:
    """Write the resolved config as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    partial.replace(path)


def load(cls: type[Config], path: Path) -> Config:
    """Read a config that `save` wrote."""
    require(path.is_file(), f"no config at {path}: is this the folder of a finished or running experiment?")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return from_config_dict(cls, values)
