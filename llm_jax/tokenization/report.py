"""How well a tokenizer compresses each language, and whether it gives every text back."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from llm_jax.data.documents import Document

EVERYTHING = "all"


class Measurable(Protocol):
    """What is needed of a tokenizer to measure it."""

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for."""
        ...


@dataclasses.dataclass(frozen=True)
class Compression:
    """What a tokenizer does to the documents of one language."""

    language: str
    documents: int
    bytes: int
    characters: int
    tokens: int
    exact: int  # documents that decode to the very bytes they were encoded from

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes over tokens; 0 without tokens."""
        return self.bytes / self.tokens if self.tokens else 0.0

    @property
    def tokens_per_character(self) -> float:
        """Tokens over characters; 0 without characters."""
        return self.tokens / self.characters if self.characters else 0.0


def measure(tokenizer: Measurable, documents: Iterable[Document]) -> list[Compression]:
    """One `Compression` for each language, largest first, and one for everything."""
    by_language: dict[str, Compression] = {}
    for document in documents:
        row = measure_text(tokenizer, document.text, document.language)
        before = by_language.get(row.language)
        by_language[row.language] = _add(before, row) if before else row
    rows = sorted(by_language.values(), key=lambda row: -row.bytes)
    total = Compression(EVERYTHING, 0, 0, 0, 0, 0)
    for row in rows:
        total = _add(total, row)
    return [*rows, total]


def measure_text(tokenizer: Measurable, text: str, language: str) -> Compression:
    """The `Compression` of a single document."""
    encoded = text.encode()
    ids = tokenizer.encode(text)
    return Compression(language, 1, len(encoded), len(text), len(ids), int(tokenizer.decode_bytes(ids) == encoded))


def save(rows: list[Compression], path: Path) -> None:
    """Write the rows as JSON, ratios included, atomically."""
    ratios = [{"bytes_per_token": r.bytes_per_token, "tokens_per_character": r.tokens_per_character} for r in rows]
    records = [dataclasses.asdict(row) | ratio for row, ratio in zip(rows, ratios)]
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(records, indent=2) + "\n")
    partial.replace(path)


def _add(a: Compression, b: Compression) -> Compression:
    """The sums of two rows, under the first one's language."""
    return Compression(
        a.language,
        a.documents + b.documents,
        a.bytes + b.bytes,
        a.characters + b.characters,
        a.tokens + b.tokens,
        a.exact + b.exact,
    )
