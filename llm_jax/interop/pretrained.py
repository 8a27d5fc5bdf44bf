"""A trained model from wherever it is: a run folder of this project, a Hugging Face folder, or a GGUF file."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from llm_jax import models
from llm_jax.config import QUANTIZATIONS, ModelConfig
from llm_jax.errors import UserError, require
from llm_jax.interop import gguf, huggingface, huggingface_config, released
from llm_jax.tokenization import tokenizer as tokenizer_lib
from llm_jax.training import checkpoint

# What a model was trained as; stating it otherwise would make the weights mean something else.
FIXED = tuple(field for field in ModelConfig().architecture() if field not in ("window_sizes", "max_length"))
HUGGING_FACE_OPTIONS = ("position", "norm_head", "rope_layout")
TEMPLATE_FILE = "chat_template.jinja"


class Pretrained(NamedTuple):
    """A model that is ready to use."""

    config: ModelConfig
    params: Any
    tokenizer: tokenizer_lib.Tokenizer
    chat_template: str  # the checkpoint's own Jinja template; "" where it has none


def load(path: str | Path, *, mesh: Mesh | None = None, step: int | None = None, **overrides: Any) -> Pretrained:
    """Load configuration, parameters, tokenizer and chat template from one path.

    The arguments and errors are those of `load_model`. Raises `UserError` also where there is no tokenizer, or one
    with ids that the model has not.
    """
    path = released.locate(path)
    _check_arguments(path, overrides)  # before anything that takes long, like the tokenizer
    tokenizer = tokenizer_lib.load(path)
    config, params = load_model(path, mesh=mesh, step=step, **overrides)
    tokenizer_lib.check_vocabulary(tokenizer, config.vocab_size, str(path))
    return Pretrained(config, params, tokenizer, chat_template(path))


def load_to_generate(path: str | Path, *, quantize: str = "none", **arguments: Any) -> Pretrained:
    """`load`, with the parameters rounded ("int8", "int4") if asked for and in the form that decodes fastest.

    The float parameters are freed as this goes. The other arguments and the errors are those of `load`. On a CPU the
    dtypes are float32 where none is stated: XLA's compiler would convert 16-bit weights at every call.
    """
    require(quantize in QUANTIZATIONS, f"quantize={quantize!r} is not one of {', '.join(QUANTIZATIONS)}")
    if jax.default_backend() == "cpu" and not arguments.get("dtype"):
        arguments |= {"dtype": "float32", "compute_dtype": arguments.get("compute_dtype", "float32")}
    loaded = load(path, **arguments)
    config, params = loaded.config, loaded.params
    if quantize != "none":
        config, params = models.quantize(params, config, quantize, donate=True)
    config, params = models.for_decoding(params, config, donate=True)
    return loaded._replace(config=config, params=params)


def load_model(
    path: str | Path, *, mesh: Mesh | None = None, step: int | None = None, **overrides: Any
) -> tuple[ModelConfig, Any]:
    """Load configuration and parameters alone.

    Args:
      path: a run folder (with `checkpoints`), a Hugging Face folder (with `config.json`), a `.gguf` file, or a name
        of `released.MODELS`, such as "smollm2", which is downloaded at its first use.
      mesh: where to put the parameters, sharded by their logical axes; None = the default device.
      step: which checkpoint of a run folder; None = the newest.
      **overrides: `dtype`, the parameters' dtype; fields of `ModelConfig` that do not change what the weights are,
        such as `compute_dtype`, `attention`, `dynamic_ntk` or `max_length`; and for a Hugging Face folder the
        options of `huggingface.load`: `position`, `norm_head` and `rope_layout`.

    Raises:
      UserError: nothing that can be loaded is there, it is damaged, or an override is unknown or contradicts it.
    """
    path = released.locate(path)
    options, fields = _check_arguments(path, overrides)
    dtype = fields.pop("dtype", None)
    if is_run(path):
        config, params, _ = checkpoint.load_model(path, step, mesh, **({} if dtype is None else {"param_dtype": dtype}))
    elif path.is_file():
        config, params = gguf.load(path, mesh=mesh, dtype=dtype)
    else:
        config, params = huggingface.load(path, mesh=mesh, dtype=dtype, **options)
    return dataclasses.replace(config, **fields), params


def _check_arguments(path: Path, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The overrides that are options of `huggingface.load`, and the others; `UserError` for what cannot be."""
    known = ", ".join(released.MODELS)
    require(path.exists(), f"no model at {path}: name a run folder, a Hugging Face folder, a .gguf file or {known}")
    known_folder = is_run(path) or (path / "config.json").is_file()
    require(
        path.is_file() or known_folder,
        f"{path} is neither a run folder (with {checkpoint.FOLDER}) nor a Hugging Face folder (with config.json)",
    )
    options = {name: value for name, value in overrides.items() if name in HUGGING_FACE_OPTIONS}
    require(
        not options or (path.is_dir() and not is_run(path)),
        f"{', '.join(options)}: {path} states it, only for a Hugging Face folder it can be given",
    )
    fields = {name: value for name, value in overrides.items() if name not in options}
    allowed = ["dtype", *(f.name for f in dataclasses.fields(ModelConfig) if f.name not in FIXED)]
    for name in fields:
        near = [] if name in FIXED else difflib.get_close_matches(name, [*allowed, *HUGGING_FACE_OPTIONS], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f": {', '.join(allowed)} can be"
        require(name in allowed, f"{name!r} of a trained model cannot be overridden{hint}")
    return options, fields


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run of ours."""
    return (path / checkpoint.FOLDER).is_dir()


def chat_template(path: Path) -> str:
    """The Jinja template of a .gguf file, or of a folder's `chat_template.jinja` or `tokenizer_config.json`.

    "" where there is none.
    """
    if path.is_file():
        return gguf.chat_template(path)
    file = path / TEMPLATE_FILE
    if file.is_file():
        return _text(file)
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return ""
    template = huggingface_config.read_json(file).get("chat_template") or ""
    if isinstance(template, list):  # several by name, as [{"name": ..., "template": ...}]
        named = [(entry.get("name"), entry.get("template")) for entry in template if isinstance(entry, dict)]
        template = next((text for name, text in named if name == "default"), "")
    require(isinstance(template, str), f"chat_template in {file} is neither a text nor a list of named texts")
    return str(template)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} is not a text in UTF-8: {error}") from None
