"""Documents, the hash that identifies one, and what follows from it: exact deduplication and the held-out split."""

import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

MAX_DOCUMENT_BYTES = 1 << 16  # longer texts are cut: a loader reads a whole document for any window of it
HASH_RANGE = 1 << 64
BLANK_LINES = re.compile(r"\n\s*\n")
TEXT, HTML, CODE = "text", "html", "code"  # what a text is written in
# Columns of tables of documents.
ID = "id"  # SOURCE/POSITION: unique in a corpus, and the same in every run
COLUMNS = (ID, "source", "language", "format", "origin", "text")
DOCUMENT_ID = "document_id"  # the hash of a document's text as it was read, in hexadecimal: it decides what is held out
BYTES = "bytes"  # of a document's text in UTF-8

Item = TypeVar("Item")


class Document(NamedTuple):
    """One text, the source it comes from, and its language (a BCP 47 tag, `code`, or `und` where unknown)."""

    source: str
    language: str
    text: str


class Census(NamedTuple):
    """What one pass over a source finds: enough to split and to sample it in a second pass."""

    documents: int  # after dropping exact duplicates
    duplicates: int
    text_bytes: int
    threshold: int  # documents whose hash is below are held out


def text_hash(text: str, seed: int | None = None) -> int:
    """A 64-bit hash of a text, the same on every machine; another `seed` gives an independent one."""
    key = b"" if seed is None else seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "big")


def document_id(text: str) -> str:
    """What DOCUMENT_ID says of a text as it was read."""
    return f"{text_hash(text):016x}"


def unique(items: Iterable[Item], text: Callable[[Item], str] = str) -> Iterator[tuple[int, Item]]:
    """Yield (hash, item) of every item whose text was not seen before; keeps 8 bytes of hash a text, not the texts."""
    seen: set[int] = set()
    for item in items:
        digest = text_hash(text(item))
        if digest not in seen:
            seen.add(digest)
            yield digest, item


def take_census(texts: Iterable[str], holdout_fraction: float) -> Census:
    """Count a source's documents and choose the hash below which one is held out.

    That is `holdout_fraction` of the hash range, so a document's side never depends on its neighbours; except that
    a source of two or more documents always has at least one on each side.
    """
    total = 0
    hashes: list[int] = []
    text_bytes = 0

    def counted() -> Iterator[str]:
        nonlocal total
        for text in texts:
            total += 1
            yield text

    for digest, text in unique(counted()):
        hashes.append(digest)
        text_bytes += len(text.encode())
    return Census(len(hashes), total - len(hashes), text_bytes, holdout_threshold(hashes, holdout_fraction))


def holdout_threshold(hashes: Collection[int], fraction: float) -> int:
    """The hash below which a source's documents are held out; see `take_census`."""
    if len(hashes) < 2:
        return 0
    return min(max(int(fraction * HASH_RANGE), min(hashes) + 1), max(hashes))


def split_long(text: str, limit: int = MAX_DOCUMENT_BYTES) -> Iterator[str]:
    """Cut a text into parts of at most about `limit` bytes, at blank lines, else at line ends, else anywhere.

    The parts joined give the text back.
    """
    if len(text.encode()) <= limit:
        yield text
        return
    part: list[str] = []
    size = 0
    for piece in _pieces(text, limit):
        piece_bytes = len(piece.encode())
        if part and size + piece_bytes > limit:
            yield "".join(part)
            part, size = [], 0
        part.append(piece)
        size += piece_bytes
    yield "".join(part)


def _pieces(text: str, limit: int) -> Iterator[str]:
    """Paragraphs, the lines of too long paragraphs, and slices of too long lines."""
    # From 1 on: a paragraph has something before its end.
    edges = sorted({0, *(found.end() for found in BLANK_LINES.finditer(text, 1)), len(text)})
    for paragraph in (text[start:end] for start, end in itertools.pairwise(edges)):
        if len(paragraph.encode()) <= limit:
            yield paragraph
            continue
        for line in paragraph.splitlines(keepends=True):
            step = max(limit // 4, 1)  # a character is at most 4 bytes of UTF-8
            yield from (line[i : i + step] for i in range(0, len(line), step))


def shuffled(texts: Iterable[str]) -> list[str]:
    """The texts in the order of their hashes: the same order everywhere, unrelated to the one they came in."""
    texts = list(texts)
    order = np.argsort(np.array([text_hash(text) for text in texts], dtype=np.uint64), kind="stable")
    return [texts[i] for i in order]
