"""A Hugging Face `config.json` as a `ModelConfig`, and back."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.config import ModelConfig, RopeScalingConfig
from llm_jax.errors import UserError, require
from llm_jax.interop.families import FAMILIES, Family

FILE = "config.json"
OPTIONAL = ("init_std", "rope_theta", "tie_embeddings", "num_kv_heads", "head_dim", "log_n", "dynamic_ntk")
ROPE_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3"}
LLAMA3_KEYS = {
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
MAX_SIZE, MAX_LENGTH = 2**24, 2**31 - 1  # of an axis of the weights, and of a text: far above any model's
# Baichuan's code, not its config, says which model it is.
BAICHUAN_ROPE_HIDDEN = 4096
BAICHUAN_NORM_HEAD_VOCABULARY = 125_696

log = logging.getLogger(__name__)


def read(folder: Path) -> dict[str, Any]:
    """The folder's config as it is. `UserError` where it is missing or no JSON object."""
    path = folder / FILE
    require(path.is_file(), f"no {FILE} in {folder}: is this the folder of a Hugging Face model?")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. `UserError` where it holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    require(isinstance(values, dict), f"{path} does not hold a JSON object")
    return dict(values)


def family_of(values: Mapping[str, Any], where: Path) -> str:
    """The name of the family that a config belongs to. `UserError` naming those there are."""
    named = values.get("architectures") or []
    named = named if isinstance(named, list) else [named]
    for name, family in FAMILIES.items():
        if any(architecture in family.architectures for architecture in named):
            return name
    if not named and str(values.get("model_type")) in FAMILIES:
        return str(values["model_type"])
    known = ", ".join(family.architectures[0] for family in FAMILIES.values())
    got = f"architecture {named[0]!r}" if named else f"model_type {values.get('model_type')!r}"
    raise UserError(f"{where}: {got} is not one of {known}")


def to_model(
    values: Mapping[str, Any], where: Path, position: str | None = None, norm_head: bool | None = None
) -> tuple[str, ModelConfig]:
    """The family and the model that a config describes.

    Args:
      values: the config.
      where: its file, for messages.
      position: "rope" or "alibi" where the caller knows, as for Baichuan, whose configs do not say.
      norm_head: the same of the output head.

    Raises:
      UserError: an unknown architecture, a missing or senseless value, or one that this project's decoder cannot
        follow.
    """
    name = family_of(values, where)
    family = FAMILIES[name]
    _check_refused(family, values, where)
    fields = {field: _value(field, keys, values, where) for field, keys in family.keys.items()}
    fields = {field: value for field, value in fields.items() if value is not None}
    fields["ffn_size"] = _true_width(fields["ffn_size"], family, where)
    fields.setdefault("num_kv_heads", fields["num_heads"])
    fields.setdefault("head_dim", fields["hidden_size"] // max(1, fields["num_heads"]))
    fields |= family.fixed
    if "rope_scaling" not in family.fixed:
        fields |= _rope(values, where)
    if "window_sizes" not in family.fixed:
        fields["window_sizes"] = _windows(values, fields["num_layers"], where)
    if "position" in family.keys:
        fields |= _baichuan_facts(fields, position, norm_head, where)
    for field, stated in (("position", position), ("norm_head", norm_head)):
        require(
            stated is None or fields[field] == stated,
            f"{where}: {field}={stated!r} was asked for, but every {name} model has {fields[field]!r}",
        )
    try:
        return name, ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_refused(family: Family, values: Mapping[str, Any], where: Path) -> None:
    for key, allowed in family.refused.items():
        require(
            key not in values or values[key] in allowed,
            f"{where}: {key}={values.get(key)!r} is not supported, only {allowed[0]!r}",
        )
    require(not values.get("quantization_config"), f"{where}: quantized weights cannot be read; get the original ones")


def _value(field: str, keys: tuple[str, ...], values: Mapping[str, Any], where: Path) -> Any:
    """What the config says of a field, of the field's type; None where it says nothing and need not."""
    key = next((key for key in keys if values.get(key) is not None), None)
    if key is None:
        optional = field in OPTIONAL or field in ("position", "norm_head")
        require(optional, f"{where} has no {' or '.join(keys)}")
        return None
    value = values[key]
    kind = type(getattr(ModelConfig, field))
    if kind is float and type(value) is int:
        value = float(value)
    require(type(value) is kind, f"{where}: {key} must be {kind.__name__}, got {value!r}")
    limit = MAX_LENGTH if field == "max_length" else MAX_SIZE
    require(kind is not int or 0 < value <= limit, f"{where}: {key} must be positive and at most {limit}")
    return value


def _true_width(stated: int, family: Family, where: Path) -> int:
    require(
        stated % family.ffn_scale == 0,
        f"{where}: the feed-forward width {stated} is not a multiple of {family.ffn_scale}",
    )
    return stated // family.ffn_scale


def _rope(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The rotary base and scaling, from `rope_parameters` (newer) or `rope_scaling`."""
    key = next((key for key in ("rope_parameters", "rope_scaling") if values.get(key)), "rope_scaling")
    stated = values.get(key) or {}
    require(isinstance(stated, Mapping), f"{where}: {key} must be an object, got {stated!r}")
    kind = str(stated.get("rope_type", stated.get("type", "default")))
    require(kind in ROPE_KINDS, f"{where}: {key} of kind {kind!r} is not supported, only {', '.join(ROPE_KINDS)}")
    partial = stated.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    require(partial == 1.0, f"{where}: partial_rotary_factor={partial!r} is not supported, only 1.0")
    keys = {"factor": "factor"} if kind != "default" else {}
    keys |= LLAMA3_KEYS if kind == "llama3" else {}
    try:
        numbers: dict[str, Any] = {field: float(stated[theirs]) for field, theirs in keys.items()}
        if kind == "llama3":
            numbers["original_length"] = int(numbers["original_length"])
        scaling = RopeScalingConfig(ROPE_KINDS[kind], **numbers)
        base = {"rope_theta": float(stated["rope_theta"])} if "rope_theta" in stated else {}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {key} of kind {kind!r} lacks a usable {error}") from None
    return {"rope_scaling": scaling, **base}


def _windows(values: Mapping[str, Any], layers: int, where: Path) -> tuple[int, ...]:
    """Qwen2's windows, one per layer with 0 for none; () where no layer has one."""
    window = values.get("sliding_window")
    if not values.get("use_sliding_window") or window is None:
        return ()
    first = values.get("max_window_layers", 0)
    for key, value in (("sliding_window", window), ("max_window_layers", first)):
        require(type(value) is int, f"{where}: {key} must be int, got {value!r}")
    kinds = values.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(layers)]
    require(
        isinstance(kinds, list) and len(kinds) == layers, f"{where}: layer_types must be a list with {layers} entries"
    )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _baichuan_facts(
    fields: Mapping[str, Any], position: str | None, norm_head: bool | None, where: Path
) -> dict[str, Any]:
    """Positions and head: as the caller says, else as the config says if we wrote it, else by the released sizes."""
    by_size = {
        "position": "rope" if fields["hidden_size"] == BAICHUAN_ROPE_HIDDEN else "alibi",
        "norm_head": fields["vocab_size"] == BAICHUAN_NORM_HEAD_VOCABULARY,
    }
    facts = {}
    for field, stated in (("position", position), ("norm_head", norm_head)):
        facts[field] = fields.get(field, by_size[field]) if stated is None else stated
        if stated is None and field not in fields:
            log.warning(
                "%s does not state its %s: taken to be %r from %s; say %s=... if that is wrong",
                where,
                field,
                facts[field],
                f"hidden_size={fields['hidden_size']}" if field == "position" else f"vocab_size={fields['vocab_size']}",
                field,
            )
    return facts


def from_model(config: ModelConfig, family_name: str) -> dict[str, Any]:
    """The `config.json` of a model in a family's terms. `UserError` where the family cannot express it."""
    family = FAMILIES[family_name]
    reasons = inexpressible(config, family_name)
    require(not reasons, f"a {family_name} checkpoint cannot express this model: {', '.join(reasons)}")
    values: dict[str, Any] = {"architectures": [family.architectures[0]], "model_type": family_name}
    for field, keys in family.keys.items():
        scale = family.ffn_scale if field == "ffn_size" else 1
        values |= {key: getattr(config, field) * scale if scale > 1 else getattr(config, field) for key in keys}
    values |= family.written
    if config.rope_scaling.kind != "none":
        values["rope_scaling"] = _written_scaling(config.rope_scaling)
    if config.window_sizes:
        kinds = ["sliding_attention" if window else "full_attention" for window in config.window_sizes]
        values |= {"use_sliding_window": True, "sliding_window": max(config.window_sizes), "layer_types": kinds}
        values["max_window_layers"] = sum(window == 0 for window in config.window_sizes)
    return {**values, "torch_dtype": config.param_dtype, "use_cache": True}


def _written_scaling(scaling: RopeScalingConfig) -> dict[str, Any]:
    keys = LLAMA3_KEYS if scaling.kind == "llama3" else {}
    stated = {theirs: getattr(scaling, field) for field, theirs in keys.items()}
    return {"rope_type": scaling.kind, "factor": scaling.factor, **stated}


def inexpressible(config: ModelConfig, family_name: str) -> list[str]:
    """Why a family cannot express a model, in words; empty where it can."""
    family = FAMILIES[family_name]
    reasons = [
        f"{field} {getattr(config, field)!r} instead of {value!r}"
        for field, value in {"quantization": "none", **family.fixed}.items()
        if getattr(config, field) != value
    ]
    if family.multi_head and config.num_kv_heads != config.num_heads:
        reasons.append(f"num_kv_heads {config.num_kv_heads} instead of num_heads {config.num_heads}")
    if "head_dim" not in family.keys and config.head_dim * config.num_heads != config.hidden_size:
        reasons.append(f"num_heads x head_dim {config.num_heads * config.head_dim} instead of {config.hidden_size}")
    windows = {window for window in config.window_sizes if window}
    if "window_sizes" not in family.fixed and len(windows) > 1:
        reasons.append(f"windows of {len(windows)} sizes instead of one")
    return reasons
