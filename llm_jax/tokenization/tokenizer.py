"""What the rest of the project needs of a tokenizer, and opening whichever kind a file or folder holds."""

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llm_jax.errors import UserError, require
from llm_jax.tokenization import gguf_vocabulary, sentencepiece_model, tiktoken_file, tokenizer_json

logger = logging.getLogger(__name__)

# Rows of a model that its tokenizer has no ids for: with more than both of these it may be another model's.
MAX_PADDING = 1024
MAX_PADDING_SHARE = 0.1


class Tokenizer(Protocol):
    """Text to ids and back. Implementations may be shared between threads and pickled into other processes."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, specials included."""
        ...

    @property
    def bos_id(self) -> int:
        """The id that begins a document; -1 where documents begin without one."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a document; -1 where there is none."""
        ...

    @property
    def pad_id(self) -> int:
        """An id to fill rows with, which may have another meaning too."""
        ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The ids of the control tokens, which no text encodes to, by their names."""
        ...

    @property
    def fingerprint(self) -> str:
        """A SHA-256 in hexadecimal: two tokenizers are the same exactly if these are."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos or eos; text that looks like a control token is encoded as text.

        Raises `UserError` if the string holds a lone surrogate, which no UTF-8 text does.
        """
        ...

    def encode_batch(self, texts: Sequence[str], workers: int = 0) -> list[list[int]]:
        """`encode` of every text, on `workers` threads (0 = one per core)."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids; bytes that form no character become U+FFFD."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence of ids, also where they stop in the middle of a character; specials add none.

        Raises `UserError` for an id outside the vocabulary.
        """
        ...

    def save(self, folder: Path) -> Path:
        """Write the tokenizer into a folder that exists, so that `load(folder)` finds it; returns the main file."""
        ...


def load(path: str | Path) -> Tokenizer:
    """Open a tokenizer file, or the tokenizer of a run's or a checkpoint's folder.

    Raises `UserError` where there is none, or where it is damaged or of a kind that would lose text.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    require(path.is_file(), f"no tokenizer at {path}: train one with python -m experiments.train_tokenizer")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise UserError(f"{path} is no tokenizer that can be read: it does not end in {', '.join(READERS)}")
    return reader(path)


def copy(file: Path, folder: Path) -> None:
    """Copy a tokenizer's main file, as `save` names it, and what belongs to it; each appears only when it is whole."""
    companions = (tokenizer_json.CONFIG_NAME,) if file.name == tokenizer_json.FILE_NAME else ()
    for source in (*(file.with_name(name) for name in companions), file):
        if source.is_file():
            partial = folder / f"{source.name}.partial"
            shutil.copyfile(source, partial)
            partial.replace(folder / source.name)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, name: str) -> None:
    """Raise `UserError` if the tokenizer has ids that the model called `name` does not.

    A model may well have more rows than its tokenizer has ids: vocabularies are padded to round sizes. Where it has
    many more than that explains, a warning says so.
    """
    require(
        tokenizer.vocab_size <= vocab_size,
        f"the tokenizer does not belong to {name}: it has {tokenizer.vocab_size:,} ids, the model only {vocab_size:,}",
    )
    if vocab_size - tokenizer.vocab_size > max(MAX_PADDING, MAX_PADDING_SHARE * tokenizer.vocab_size):
        logger.warning(
            "does the tokenizer belong to %s? It has %d ids, and the model has %d: more than padding explains",
            name, tokenizer.vocab_size, vocab_size,
        )  # fmt: skip


READERS: dict[str, Callable[[Path], Tokenizer]] = {
    ".model": sentencepiece_model.read,
    ".tiktoken": tiktoken_file.read,
    ".json": tokenizer_json.read,
    ".gguf": gguf_vocabulary.read,
}


def _load_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, from the first of the files that it may have.

    Where tokenizer.model and tokenizer.json lie side by side, the first is the vocabulary as it was trained, and the
    second its conversion, which need not split or write every text in the same way. But only tokenizer.json has what
    was added in fine-tuning: so that one counts if it has ids that the other lacks.
    """
    model, converted = folder / sentencepiece_model.FILE_NAME, folder / tokenizer_json.FILE_NAME
    if model.is_file():
        trained = load(model)
        extended = load(converted) if converted.is_file() else trained
        return extended if extended.vocab_size > trained.vocab_size else trained
    for file in (*sorted(folder.glob("*.tiktoken")), converted):
        if file.is_file():
            return load(file)
    raise UserError(
        f"no tokenizer in {folder}: it has no {model.name}, {tiktoken_file.FILE_NAME} or {converted.name}; train one "
        "with python -m experiments.train_tokenizer"
    )
