"""Bring a model from one format into another, and check that it computes the same.

    python -m experiments.convert --config=configs/convert/import.py --workdir=runs/llama2_7b --config.source=FOLDER
    python -m experiments.convert --config=configs/convert/export.py --workdir=exported --config.source=runs/demo/model

Reads config.source: a Hugging Face folder, a .gguf file, a run folder, or the name of a released model. Writes to
--workdir: a run folder with an Orbax checkpoint, for experiments.generate, chat and pretrain, or a Hugging Face folder;
the tokenizer and the chat template go along. Then it loads what it has written, and fails if the logits differ from
those of the source, or from a stored reference, by more than config.tolerance.
"""

import dataclasses
import logging
import math
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import runner
from llm_jax import models
from llm_jax.config import MeshConfig, ModelConfig
from llm_jax.errors import UserError, require
from llm_jax.interop import huggingface, pretrained, released
from llm_jax.interop.families import FAMILIES
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import rules
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.training import checkpoint

TARGETS = ("run", "huggingface")
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "*.tiktoken")  # those that can be loaded
# What else a Hugging Face folder may have beside its weights and their config.
COMPANIONS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip

log = logging.getLogger("llm_jax.convert")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """What to read, what to write, and how exactly it must come out."""

    source: str = ""  # a Hugging Face folder, a .gguf file, a run folder, or a name such as smollm2
    to: str = "run"  # or huggingface
    step: int = 0  # of a run folder's checkpoints; 0 = the newest
    family: str = ""  # to write a Hugging Face folder in: llama, qwen2, baichuan, qwen; "" = the plainest that can
    dtype: str = ""  # of the written weights; "" = as they are stored
    position: str = ""  # rope or alibi, for Baichuan's folders, which do not say; "" = by the released sizes
    norm_head: str = ""  # yes or no, likewise
    rope_layout: str = "half_split"  # interleaved: a folder whose weights still have Meta's order
    shard_gigabytes: float = 5.0  # the largest file of a Hugging Face folder
    reference: str = ""  # an .npz with ids [B, T] and their logits [B, T, V]; "" = the source's own
    tolerance: float = 1e-3  # on the largest absolute difference of two logits
    check_tokens: int = 64  # of each of two random sequences, where there is no reference
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


class Difference(NamedTuple):
    """How far logits are from those that they should be."""

    largest: float  # absolute
    kl: float  # nats, the mean over tokens of the divergence from the expected distribution


def run(config: ConvertConfig, workdir: Path) -> Difference:
    """Convert, load the result again and compare its logits."""
    _check(config)
    source, mesh = released.locate(config.source), mesh_lib.build(config.mesh)
    require(not config.step or pretrained.is_run(source), f"config.step={config.step}: {source} is no run folder")
    check_target(config, workdir)
    if config.reference:
        ids_BT, expected_BTV = read_reference(Path(config.reference))
    model, params = pretrained.load_model(source, mesh=mesh, step=config.step or None, **_options(config))
    if config.reference:
        against = config.reference
        check_reference(Path(config.reference), ids_BT, expected_BTV, model)
    else:
        against, ids_BT = f"{source} as loaded", _random_ids(config, model)
        expected_BTV = logits(params, model, ids_BT, mesh)
    with tempfile.TemporaryDirectory() as folder:
        _write(config, workdir, model, params, *companions(source, Path(folder), model))
    del params  # the result is loaded in their place
    model, params = pretrained.load_model(workdir, mesh=mesh)
    difference = compare(logits(params, model, ids_BT, mesh), expected_BTV)
    print(f"{workdir}: {models.count_parameters(model):,} parameters in {model.param_dtype}")
    print(
        f"against {against}, {ids_BT.size} tokens: largest logit difference {difference.largest:.3g}, "
        f"mean KL {difference.kl:.3g} nats"
    )
    require(
        difference.largest <= config.tolerance,
        f"the logits of {workdir} are up to {difference.largest:.3g} away from those of {against}, more than "
        f"config.tolerance={config.tolerance:g}; what was written is still there",
    )
    return difference


def compare(logits_BTV: np.ndarray, expected_BTV: np.ndarray) -> Difference:
    """How far logits are from the expected ones, in float64.

    NaN where only one of them has NaN: weights that make both so are copied as exactly as others.
    """
    actual_BTV, expected_BTV = logits_BTV.astype(np.float64), expected_BTV.astype(np.float64)
    same_BTV = (np.isnan(actual_BTV) & np.isnan(expected_BTV)) | (actual_BTV == expected_BTV)
    actual_BTV, expected_BTV = (np.where(same_BTV & ~np.isfinite(x), 0, x) for x in (actual_BTV, expected_BTV))
    actual_logprobs, expected_logprobs = map(_log_softmax, (actual_BTV, expected_BTV))
    kl_BT = np.sum(np.exp(expected_logprobs) * (expected_logprobs - actual_logprobs), axis=-1)
    return Difference(float(np.max(np.abs(actual_BTV - expected_BTV))), float(np.mean(kl_BT)))


def _log_softmax(logits_BTV: np.ndarray) -> np.ndarray:
    shifted_BTV = logits_BTV - logits_BTV.max(axis=-1, keepdims=True)
    return shifted_BTV - np.log(np.exp(shifted_BTV).sum(axis=-1, keepdims=True))


def logits(params: Any, model: ModelConfig, ids_BT: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Logits [B, T, V], computed in float32."""
    model = dataclasses.replace(model, compute_dtype="float32")
    rows = len(ids_BT)
    shards = rules.axis_size(mesh, "batch")
    padded_BT = np.resize(ids_BT, (-(-rows // shards) * shards, ids_BT.shape[1])).astype(np.int32)
    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(models.logits, static_argnums=1)(params, model, padded_BT))[:rows]


def read_reference(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The ids and logits of an .npz file. `UserError` where they are missing or no numbers."""
    require(path.is_file(), f"no reference {path}")
    try:
        with zipfile.ZipFile(path), np.load(path) as file:
            ids_BT, logits_BTV = np.asarray(file["ids"]), np.asarray(file["logits"])
    except (KeyError, ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not an .npz file with ids [B, T] and logits [B, T, V]: {reason}") from None
    shapes = f"{path} has ids {list(ids_BT.shape)} and logits {list(logits_BTV.shape)}"
    matched = ids_BT.ndim == 2 and logits_BTV.ndim == 3 and logits_BTV.shape[:2] == ids_BT.shape
    require(matched and logits_BTV.size > 0, f"{shapes}; they must be [B, T] and [B, T, V], and not empty")
    require(bool(np.issubdtype(ids_BT.dtype, np.integer)), f"{path} has ids of {ids_BT.dtype}, not whole numbers")
    real = logits_BTV.dtype.kind == "f" and bool(np.isfinite(logits_BTV).all())
    require(real, f"{path} has logits of {logits_BTV.dtype} that are no finite real numbers")
    return ids_BT, logits_BTV


def check_reference(path: Path, ids_BT: np.ndarray, logits_BTV: np.ndarray, model: ModelConfig) -> None:
    """Raise `UserError` where a reference is another model's."""
    require(
        logits_BTV.shape[-1] == model.vocab_size,
        f"{path} has ids {list(ids_BT.shape)} and logits {list(logits_BTV.shape)}; with this model's vocabulary they "
        f"must be [B, T] and [B, T, {model.vocab_size}]",
    )
    inside = ids_BT.min() >= 0 and ids_BT.max() < model.vocab_size
    require(bool(inside), f"{path} has ids outside the vocabulary of {model.vocab_size}")


def check_target(config: ConvertConfig, workdir: Path) -> None:
    """Raise `UserError` if the folder to write to has something in it."""
    require(
        not workdir.exists() or (workdir.is_dir() and not any(workdir.iterdir())),
        f"{workdir} is not empty: choose another --workdir for the {config.to} folder",
    )


def _check(config: ConvertConfig) -> None:
    require(config.source != "", "set --config.source to what is to be converted")
    require(config.to in TARGETS, f"config.to={config.to!r} is not one of {', '.join(TARGETS)}")
    require(config.norm_head in ("", "yes", "no"), f"config.norm_head={config.norm_head!r} is neither yes nor no")
    known = ("", *FAMILIES)
    require(config.family in known, f"config.family={config.family!r} is not one of {', '.join(FAMILIES)}")
    sized = math.isfinite(config.shard_gigabytes) and config.shard_gigabytes > 0
    require(sized, f"config.shard_gigabytes={config.shard_gigabytes} must be positive and finite")
    require(config.step >= 0, f"config.step={config.step} must not be negative")
    require(config.tolerance >= 0, f"config.tolerance={config.tolerance} must not be negative")
    require(config.check_tokens > 0, f"config.check_tokens={config.check_tokens} must be positive")


def _options(config: ConvertConfig) -> dict[str, Any]:
    """What `pretrained.load_model` is to be told: what the user has stated."""
    stated = {
        "dtype": config.dtype or None,
        "position": config.position or None,
        "norm_head": config.norm_head == "yes" if config.norm_head else None,
        "rope_layout": config.rope_layout if config.rope_layout != "half_split" else None,
    }
    return {name: value for name, value in stated.items() if value is not None}


def _random_ids(config: ConvertConfig, model: ModelConfig) -> np.ndarray:
    length = min(config.check_tokens, model.max_length)
    return np.random.default_rng(0).integers(0, model.vocab_size, (2, length))


def companions(source: Path, folder: Path, model: ModelConfig) -> tuple[list[Path], dict[str, int]]:
    """The files that go along, made in `folder` where the source is no folder; and ids for a config.json."""
    if source.is_dir():
        vocabularies = [file for pattern in TOKENIZERS for file in source.glob(pattern) if file.is_file()]
        files = [*vocabularies, *(source / name for name in COMPANIONS if (source / name).is_file())]
        if not vocabularies:
            log.warning("%s has no tokenizer: the result will have none", source)
            return files, {}
    tokenizer = tokenizers.load(source)
    tokenizers.check_vocabulary(tokenizer, model.vocab_size, str(source))
    if source.is_file():
        tokenizer.save(folder)
        template = pretrained.chat_template(source)
        if template:
            (folder / pretrained.TEMPLATE_FILE).write_text(template, encoding="utf-8")
        files = sorted(folder.iterdir())
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return files, {name: number for name, number in ids.items() if number >= 0}


def _write(
    config: ConvertConfig, workdir: Path, model: ModelConfig, params: Any, files: list[Path], ids: dict[str, int]
) -> None:
    if config.to == "huggingface":
        huggingface.save(
            workdir,
            model,
            params,
            family=config.family or None,
            extra=ids,
            files=files,
            shard_bytes=int(config.shard_gigabytes * 1e9),
        )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, workdir / file.name)
    checkpoint.save_model(workdir, model, params)  # last: without it, the folder is no run


if __name__ == "__main__":
    runner.main(run, ConvertConfig, "configs/convert/import.py", save_config=False)
