"""Qwen's tokenizer: byte-level BPE out of a tiktoken file (Qwen report, section 2.2).

Text is normalised to NFC first, so that decoding gives back the NFC form of what was encoded. The file holds the
ranks of ordinary tokens alone: how text is split before merging, and the control tokens that follow the last rank, are
the tokenizer's rules and stand here.
"""

import base64
import binascii
import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tiktoken

from llm_jax.errors import UserError, require
from llm_jax.tokenization.vocabulary import check_text, join_bytes

FILE_NAME = "qwen.tiktoken"
RANKS = 151_643  # of the released file; with fewer, the control tokens would get wrong ids
END_OF_TEXT = "<|endoftext|>"
SPECIALS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
# The library gives up (it panics) on far longer runs of white space; such a run is cut, at the cost of a token.
LONG_SPACE = re.compile(r"(\s{100000})")
# English contractions; words with one leading mark or space; single digits; runs of marks; line ends; spaces.
SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class TiktokenTokenizer:
    """Qwen's rules over the ranks of a tiktoken file; safe to share between threads and to pickle."""

    def __init__(self, ranks: bytes, name: str = "the tokenizer"):
        """Load from the bytes of a file; `UserError` naming `name` where they are not a usable one."""
        self._file = ranks
        self._name = name
        parsed = parse_ranks(ranks, name)
        self._surfaces = [*parsed, *(b"" for _ in SPECIALS)]
        self.special_ids = {special: len(parsed) + i for i, special in enumerate(SPECIALS)}
        self._encoding = tiktoken.Encoding(
            "qwen",
            pat_str=SPLIT,
            mergeable_ranks={token: rank for rank, token in enumerate(parsed)},
            special_tokens=self.special_ids,
        )

    def __reduce__(self) -> tuple[type["TiktokenTokenizer"], tuple[bytes, str]]:
        return TiktokenTokenizer, (self._file, self._name)

    @property
    def vocab_size(self) -> int:
        """The number of ids, control tokens included."""
        return len(self._surfaces)

    @property
    def bos_id(self) -> int:
        """-1: Qwen's documents begin without a token."""
        return -1

    @property
    def eos_id(self) -> int:
        """The id that ends a document, <|endoftext|>."""
        return self.special_ids[END_OF_TEXT]

    @property
    def pad_id(self) -> int:
        """The id that ends a document: Qwen has no other for padding."""
        return self.eos_id

    @cached_property
    def fingerprint(self) -> str:
        """The file's SHA-256 in hexadecimal: two tokenizers are the same exactly if these are."""
        return hashlib.sha256(self._file).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text's NFC form; text that looks like a control token is encoded as text.

        Raises `UserError` if the string holds a lone surrogate, which no UTF-8 text does.
        """
        return [i for part in _parts(text) for i in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str], workers: int = 0) -> list[list[int]]:
        """`encode` of every text, on `workers` threads (0 = one per core)."""
        parts = [_parts(text) for text in texts]
        threads = workers or os.cpu_count() or 1
        rows = iter(self._encoding.encode_ordinary_batch(list(itertools.chain(*parts)), num_threads=threads))
        return [list(itertools.chain(*itertools.islice(rows, len(row)))) for row in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids; bytes that form no character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence of ids, also where they stop in the middle of a character; specials add none.

        Raises `UserError` for an id outside the vocabulary.
        """
        return join_bytes(self._surfaces, ids, self._name)

    def save(self, folder: Path) -> Path:
        """Write the file into a folder that exists; returns its path."""
        path = folder / FILE_NAME
        path.write_bytes(self._file)
        return path


def read(file: Path) -> TiktokenTokenizer:
    """Open Qwen's file; `UserError` where it is damaged or another model's."""
    require(
        file.name == FILE_NAME,
        f"{file} is not {FILE_NAME}: a tiktoken file does not say how text is split, and only Qwen's rules are known",
    )
    tokenizer = TiktokenTokenizer(file.read_bytes(), str(file))
    ranks = tokenizer.vocab_size - len(SPECIALS)
    require(ranks == RANKS, f"{file} has {ranks:,} ranks instead of {RANKS:,}; the file is cut short or not Qwen's")
    return tokenizer


def _parts(text: str) -> list[str]:
    """The NFC form of a text, whole unless it has white space that is too long for the library."""
    check_text(text)
    return LONG_SPACE.split(unicodedata.normalize("NFC", text))


def parse_ranks(file: bytes, name: str) -> list[bytes]:
    """The tokens of a tiktoken file by rank: each line is a token in base64 and its rank."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(file.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error):
            raise UserError(f"{name}, line {number} is not a token in base64 and its rank; is it damaged?") from None
    tokens = [ranks[rank] for rank in sorted(ranks)]
    require(sorted(ranks) == list(range(len(ranks))), f"{name} does not have every rank from 0 on; is it damaged?")
    require(len(set(tokens)) == len(file.splitlines()), f"{name} has a token or rank twice; is it damaged?")
    require({bytes([byte]) for byte in range(256)} <= set(tokens), f"{name} lacks tokens for some bytes")
    return tokens
