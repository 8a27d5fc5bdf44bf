"""Checkpoints of the Hugging Face world: their folders loaded into sharded parameters, and written from them."""

import dataclasses
import functools
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax import models
from llm_jax.config import ModelConfig
from llm_jax.errors import UserError, require
from llm_jax.interop import families, huggingface_config, placement, safetensors_file, torch_zip
from llm_jax.interop.families import FAMILIES
from llm_jax.interop.parts import Part
from llm_jax.interop.storage import DTYPES, StoredTensor

ROPE_LAYOUTS = ("half_split", "interleaved")
READERS = {  # in order of preference
    "model.safetensors": safetensors_file.read,
    "pytorch_model.bin": torch_zip.read,
}
IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # a table that follows from the config
HEAD = "lm_head.weight"
SHARD_BYTES = 5_000_000_000

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Expected:
    """A tensor that a checkpoint must have: the parameters that it holds, of which layer (None = not stacked)."""

    parts: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


def expected(config: ModelConfig, family: str) -> dict[str, Expected]:
    """The tensors of a model by their names in a family."""
    present = families.parameters(config)
    tensors = {}
    for name, parts in FAMILIES[family].tensors.items():
        if parts[0] in present:
            shape = families.torch_shape(parts, config)
            for layer in range(config.num_layers) if "{}" in name else [None]:
                tensors[name.format(layer)] = Expected(parts, layer, shape)
    return tensors


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    position: str | None = None,
    norm_head: bool | None = None,
    rope_layout: str = "half_split",
) -> tuple[ModelConfig, Any]:
    """Load the model of a Hugging Face folder, a tensor at a time, into the layout that the mesh asks for.

    Weights are read from `.safetensors` files or torch's `.bin` files, whole or in shards with an index. Nothing of
    the folder is executed.

    Args:
      path: the folder, of the LLaMA, Baichuan, Qwen or Qwen2 architecture.
      mesh: where to put the parameters, sharded by their logical axes; None = the default device.
      dtype: of the parameters, "float32", "bfloat16" or "float16"; None = as they are stored. The model computes in
        it too (in float32 for float16); replace the config's `compute_dtype` to change that.
      position: "rope" or "alibi" for Baichuan, whose configs do not say; None = rope where hidden_size is 4096.
      norm_head: whether Baichuan's output rows are normalised; None = where vocab_size is 125,696.
      rope_layout: how features of queries and keys are paired for rotary positions: "half_split", as the architecture
        has it in the Hugging Face world, or "interleaved", as in weights that still have Meta's order.

    Returns:
      The model's configuration (its `max_length` is the length it was trained at) and its parameters.

    Raises:
      UserError: anything of the folder is missing, damaged, unsafe, or contradicts the rest of it.
    """
    folder = Path(path)
    require(folder.is_dir(), f"no folder {folder}")
    require(dtype is None or dtype in DTYPES, f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    require(rope_layout in ROPE_LAYOUTS, f"rope_layout={rope_layout!r} is not one of {', '.join(ROPE_LAYOUTS)}")
    file = folder / huggingface_config.FILE
    family, config = huggingface_config.to_model(huggingface_config.read(folder), file, position, norm_head)
    stored = _open(folder)
    require(  # before a name is made for each
        config.num_layers <= len(stored),
        f"{file} says {config.num_layers} layers, more than there are tensors in {folder}: {len(stored)}",
    )
    wanted = expected(config, family)
    stored = _checked(stored, wanted, config, folder)
    dtype = dtype or _dtype_of(stored.values())
    config = dataclasses.replace(config, param_dtype=dtype, compute_dtype="float32" if dtype == "float16" else dtype)
    bad: dict[str, None] = {}
    params = placement.place(config, _sources(stored, wanted, config, rope_layout, bad), mesh)
    if bad:
        names = sorted(bad)
        log.warning(
            "%s: %d tensors hold NaN or infinity in %s: %s%s",
            folder, len(names), dtype, ", ".join(names[:8]), ", ..." if len(names) > 8 else "",
        )  # fmt: skip
    return config, params


def _open(folder: Path) -> dict[str, StoredTensor]:
    """The folder's tensors by name, none of them read yet."""
    for name, reader in READERS.items():
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_shards(index, reader)
        if (folder / name).is_file():
            return reader(folder / name)
    names = [form for name in READERS for form in (name, f"{name}.index.json")]
    raise UserError(f"no weights in {folder}: it has none of {', '.join(names)}")


def _open_shards(index: Path, reader: Any) -> dict[str, StoredTensor]:
    weight_map = huggingface_config.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensors to files")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        require(Path(shard).name == shard, f"{index} names {shard!r}, which is not a file beside it")
        require(path.is_file(), f"{path} is missing: {index.name} names it")
        opened = reader(path)
        mapped = {name for name, file in weight_map.items() if file == shard}
        missing = min(mapped - opened.keys(), default=None)
        extra = next((name for name in opened if name not in mapped and not IGNORED.search(name)), None)
        require(missing is None, f"tensor {missing} is missing from {path}, where {index.name} has it")
        require(extra is None, f"tensor {extra} is in {path}, where {index.name} does not have it")
        tensors |= opened
    return tensors


def _checked(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, Expected], config: ModelConfig, folder: Path
) -> dict[str, StoredTensor]:
    """Exactly the tensors that are wanted, in their shapes."""
    says = f"{folder / huggingface_config.FILE} says {config.num_layers} layers"
    missing = [name for name in wanted if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise UserError(f"tensor {missing[0]}{more} missing from {folder} ({says})")
    extra = [name for name in stored if name not in wanted and not IGNORED.search(name)]
    if config.tie_embeddings and HEAD in extra:
        _check_tied(stored)
        extra.remove(HEAD)
    for name in extra:
        raise UserError(f"tensor {name} in {stored[name].path} is not one of this architecture's ({says})")
    for name, tensor in wanted.items():
        got = stored[name]
        require(
            got.shape == tensor.shape,
            f"tensor {name} in {got.path} is {list(got.shape)}, the config makes it {list(tensor.shape)} "
            f"({_dimensions(tensor.parts)})",
        )
    return {name: stored[name] for name in wanted}


def _dimensions(parts: Sequence[str]) -> str:
    """A tensor's dimensions in the config's terms, as "num_heads*head_dim x hidden_size"."""
    groups = families.LAYOUTS[parts[0]][1].split()
    named = ["*".join(families.AXIS_FIELDS[axis] for axis in group) for group in groups]
    return " x ".join([f"{len(parts)}*{named[0]}" if len(parts) > 1 else named[0], *named[1:]])


def _check_tied(stored: Mapping[str, StoredTensor]) -> None:
    """Some files have the head although it is the embedding; then it must be."""
    head = stored[HEAD]
    embedding = next(t for name, t in stored.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
    same = head.shape == embedding.shape and all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(head.chunks(), embedding.chunks())
    )
    require(same, f"tensor {HEAD} in {head.path} is not the embedding, although the config ties them")


def _dtype_of(tensors: Iterable[StoredTensor]) -> str:
    """The dtype of most of the weights."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype.name] += tensor.nbytes
    if len(counts) > 1:
        log.info("weights are stored in %s; all are loaded in %s", ", ".join(counts), counts.most_common(1)[0][0])
    return counts.most_common(1)[0][0]


def _sources(
    stored: Mapping[str, StoredTensor],
    wanted: Mapping[str, Expected],
    config: ModelConfig,
    rope_layout: str,
    bad: dict[str, None],
) -> dict[str, list[placement.Source]]:
    """For every parameter its layers' places in the files."""
    sources: dict[str, list[placement.Source]] = {}
    for name, tensor in wanted.items():
        start = 0
        for part in tensor.parts:
            rows = families.torch_shape([part], config)[0]
            place = stored[name].rows(start, start + rows)
            interleaved = rope_layout == "interleaved" and part in families.ROTATED
            sources.setdefault(part, []).append(Part(place, part, config, interleaved, bad))
            start += rows
    return sources


def save(
    path: str | Path,
    config: ModelConfig,
    params: Any,
    *,
    family: str | None = None,
    dtype: str | None = None,
    extra: Mapping[str, Any] | None = None,
    files: Sequence[Path] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as a Hugging Face folder: `config.json` and `.safetensors`, a tensor at a time.

    The folder appears under its name only when it is whole.

    Args:
      path: the folder; it must not exist, or be empty.
      config: the model.
      params: its parameters, on any mesh of this process.
      family: "llama", "qwen2", "baichuan" or "qwen"; None = the plainest that can express the model.
      dtype: of the written weights; None = the parameters' own.
      extra: further keys of `config.json`, such as "bos_token_id".
      files: further files to copy into the folder, such as the tokenizer's.
      shard_bytes: no file is larger, unless a single tensor is.

    Raises:
      UserError: the folder has something in it, or the family cannot express the model.
    """
    folder = Path(path).resolve()
    family = family or families.default_for(config)
    require(family in FAMILIES, f"family={family!r} is not one of {', '.join(FAMILIES)}")
    dtype = dtype or config.param_dtype
    require(dtype in DTYPES, f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    require(jax.process_count() == 1, "a checkpoint is exported by one process; run the export without the others")
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"{folder} is not empty: choose another folder for the export",
    )
    values = huggingface_config.from_model(dataclasses.replace(config, param_dtype=dtype), family) | dict(extra or {})
    require(models.is_stacked(params), "parameters laid out for decoding are not exported: take what they were made of")
    config, params = models.without_mup(params, config)
    partial = _new_partial(folder)
    try:
        _write_shards(partial, config, params, family, dtype, shard_bytes)
        (partial / huggingface_config.FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for file in files:
            shutil.copyfile(file, partial / file.name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        partial.replace(folder)
    except OSError as error:
        raise UserError(f"the export is whole in {partial}, but cannot be renamed to {folder}: {error}") from None


def _new_partial(folder: Path) -> Path:
    """A new folder beside the one to write, of the same access as any other that is made."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)
    return partial


def _write_shards(folder: Path, config: ModelConfig, params: Any, family: str, dtype: str, shard_bytes: int) -> None:
    tensors, stored_dtype = expected(config, family), DTYPES[dtype]
    sizes = {name: math.prod(tensor.shape) * stored_dtype.itemsize for name, tensor in tensors.items()}
    shards = _split(sizes, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        layout = {name: (tensors[name].shape, stored_dtype) for name in names}
        values = (_torch_tensor(tensors[name], config, params, stored_dtype) for name in names)
        safetensors_file.write(folder / file, layout, values)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes; a larger tensor has a group of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _torch_tensor(tensor: Expected, config: ModelConfig, params: Any, dtype: np.dtype) -> np.ndarray:
    """A tensor as torch has it, from the parameters that it holds."""
    rows = []
    for part in tensor.parts:
        array = functools.reduce(lambda tree, key: tree[key], part.split("/"), params)
        values = jax.device_get(array if tensor.layer is None else _layer(array, tensor.layer))
        ours, torchs = families.LAYOUTS[part]
        ordered = values.transpose([ours.index(axis) for axis in torchs.replace(" ", "")])
        rows.append(ordered.reshape(families.torch_shape([part], config)).astype(dtype, copy=False))
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


@jax.jit
def _layer(stacked: jax.Array, index: int) -> jax.Array:
    """One layer of a parameter; compiled once for all of them, which indexing is not."""
    return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)
