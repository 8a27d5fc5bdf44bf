"""Training a SentencePiece BPE vocabulary with the settings of a report."""

import dataclasses
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from rich.console import Console
from rich.status import Status

from llm_jax.config import TokenizerConfig
from llm_jax.data.documents import Document
from llm_jax.errors import UserError

# SentencePiece skips what is longer than its limit, and its BPE trainer slows down on long unbroken text.
SENTENCE_BYTES = 4096
# SentencePiece drops every sentence that holds one of its own marks (U+2581, U+2585) or a NUL: cut there instead.
RESERVED = re.compile("[\u2581\u2585\0]+")
LINE = re.compile(r"[^\n]*\n+|[^\n]+")


@dataclasses.dataclass(frozen=True)
class Style:
    """The settings in which the reports' tokenizers differ; see `trainer_options` for those they share."""

    add_dummy_prefix: bool
    character_coverage: float
    max_piece_length: int
    whitespace_pieces: bool


# Baichuan-2's are from its report. The reports give only the dummy prefix of Baichuan-1, and byte fallback and split
# digits of LLaMA-2; the rest of those two rows is ours: Baichuan-2's coverage, and 16, SentencePiece's default length.
STYLES = {
    "baichuan2": Style(False, character_coverage=0.9999, max_piece_length=32, whitespace_pieces=True),
    "baichuan1": Style(True, character_coverage=0.9999, max_piece_length=16, whitespace_pieces=True),
    "llama2": Style(True, character_coverage=0.9999, max_piece_length=16, whitespace_pieces=True),
}


def train(
    documents: Iterable[Document], config: TokenizerConfig, output: Path, changes: Mapping[str, Any] | None = None
) -> Path:
    """Train a vocabulary on documents and write its model file, which appears only when it is complete.

    `changes` are options of SentencePiece's that replace those of `trainer_options`.

    Raises:
        UserError: there is no text, or too little or too great a variety of it for `config.vocab_size`.
    """
    with Console(stderr=True).status("reading text for the tokenizer") as status:
        model = train_on_texts(_reported((document.text for document in documents), config, status), config, changes)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_bytes(model)
    partial.replace(output)
    return output


def train_on_texts(texts: Iterable[str], config: TokenizerConfig, changes: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a SentencePiece model trained on some texts; see `train` for `changes` and the errors.

    Whatever reading the texts raises is raised here too.
    """
    failures: list[BaseException] = []
    sentences = _sentences(texts, failures)
    first = next(sentences, None)
    if first is None:
        raise UserError("the corpus has no text to train a tokenizer on")
    model = io.BytesIO()
    options = {**trainer_options(config), **(changes or {})}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], sentences), model_writer=model, **options
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise UserError(_rephrase(str(error), config.vocab_size)) from None
    return model.getvalue()


def _sentences(texts: Iterable[str], failures: list[BaseException]) -> Iterator[str]:
    """The sentences of texts; keeps what goes wrong in reading them, as SentencePiece passes on only its message."""
    try:
        for text in texts:
            yield from split_text(text)
    except (Exception, KeyboardInterrupt) as error:
        failures.append(error)
        raise


def trainer_options(config: TokenizerConfig) -> dict[str, Any]:
    """SentencePiece's options: BPE without normalisation, digits apart, byte fallback; ids of LLaMA and Baichuan."""
    style = STYLES[config.style]
    return {
        "model_type": "bpe",
        "vocab_size": config.vocab_size,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": style.add_dummy_prefix,
        "allow_whitespace_only_pieces": style.whitespace_pieces,
        "character_coverage": config.character_coverage or style.character_coverage,
        "max_sentencepiece_length": style.max_piece_length,
        "split_digits": True,
        "byte_fallback": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "max_sentence_length": 2 * SENTENCE_BYTES,
        "num_threads": config.workers or os.cpu_count() or 1,
        "minloglevel": 3,
    }


def split_text(text: str) -> Iterator[str]:
    """Cut a text into sentences of at most `SENTENCE_BYTES`, at line ends where possible.

    Line ends stay, so that pieces of several line ends can be learnt.
    """
    for part in RESERVED.split(text):
        sentence, size = "", 0
        for piece in _short_lines(part):
            length = len(piece.encode())
            if size and size + length > SENTENCE_BYTES:
                yield sentence
                sentence, size = "", 0
            sentence, size = sentence + piece, size + length
        if sentence:
            yield sentence


def _short_lines(text: str) -> Iterator[str]:
    """Lines with their line ends, cut where they could be longer than `SENTENCE_BYTES`."""
    longest = SENTENCE_BYTES // 4  # characters: UTF-8 takes at most four bytes for each
    for match in LINE.finditer(text):
        line = match[0]
        for start in range(0, len(line), longest):
            yield line[start : start + longest]


def _reported(texts: Iterable[str], config: TokenizerConfig, status: Status) -> Iterator[str]:
    """Pass texts on, and say how much was read and when the reading is over."""
    size = reported = 0
    for text in texts:
        size += len(text.encode())
        if size > reported + 1_000_000:
            reported = size
            status.update(f"reading text for the tokenizer: {size / 1e6:.0f} MB")
        yield text
    status.update(f"training {config.vocab_size:,} pieces on {size / 1e6:.1f} MB")


def _rephrase(message: str, vocab_size: int) -> str:
    """SentencePiece's complaint about a vocabulary size, as advice."""
    largest = re.search(r"value <= (\d+)", message)
    if largest:
        return (
            f"vocabulary of {vocab_size} is larger than this text supports: "
            f"set vocab_size to {largest[1]} or less, or give it more text"
        )
    smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if smallest:
        return (
            f"vocabulary of {vocab_size} is too small for the characters of this text, the 256 bytes and 3 specials: "
            f"set vocab_size to {smallest[1]} or more"
        )
    return f"SentencePiece could not train: {' '.join(message.split())}"
