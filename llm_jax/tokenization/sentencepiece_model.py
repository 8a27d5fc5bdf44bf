"""A SentencePiece model as the rest of the project sees it: text to ids and back, byte for byte.

Encoding by atoms. A BPE merge only ever makes a piece of the vocabulary, so it can join two neighbouring characters
only if some piece contains them side by side. Text is cut wherever no piece does: the atoms between the cuts are
encoded apart, with the same result as the whole, and a text has few distinct atoms, which are remembered. This is
several times faster than handing SentencePiece whole documents, and it is also what makes encoding exact: SentencePiece
writes a space as U+2581, so a literal U+2581 would come back as a space; as no piece holds one (in a piece it means
a space), it is always an atom of its own, and is written with byte pieces.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as protocol

from llm_jax.errors import UserError, require
from llm_jax.tokenization.vocabulary import check_text, join_bytes

FILE_NAME = "tokenizer.model"
SPACE_MARK = "\u2581"
UNKNOWN_SURFACE = " \u2047 "  # what SentencePiece itself prints for an unknown piece
# Pieces that SentencePiece would make of any text that spells them, although chat formats mark roles with them.
MARKER = re.compile(r"<reserved_\d+>|<\|\w+\|>")
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
Message = Any  # of SentencePiece's protocol: its classes are made at run time, so they have no static types
TABLE_BITS = 22  # pairs of characters are looked up by hash in a table of this many bits of address
MAX_ATOMS = 1 << 18  # remembered at once, about 50 MB


class SentencePieceTokenizer:
    """A loaded SentencePiece BPE model; safe to share between threads and to pickle into other processes."""

    def __init__(self, model: bytes, name: str = "the tokenizer"):
        """Load from the bytes of a model file; `UserError` naming `name` where they are not a usable one."""
        self._model = model
        self._name = name
        proto = _parse(model, name)
        self._pieces = proto.pieces
        for piece in proto.pieces:
            if piece.type == piece.USER_DEFINED and MARKER.fullmatch(piece.piece):
                piece.type = piece.CONTROL
        self._prefix = " " if proto.normalizer_spec.add_dummy_prefix else ""
        proto.normalizer_spec.add_dummy_prefix = False  # `encode` puts the prefix before a text's first atom
        self._processor = _processor(proto, name)
        self._atoms = self._no_atoms()

    def __reduce__(self) -> tuple[type["SentencePieceTokenizer"], tuple[bytes, str]]:
        return SentencePieceTokenizer, (self._model, self._name)

    @property
    def vocab_size(self) -> int:
        """The number of ids, specials and byte pieces included."""
        return len(self._pieces)

    @property
    def unk_id(self) -> int:
        """The id of the unknown piece, which encoding never produces."""
        return self._processor.unk_id()

    @property
    def bos_id(self) -> int:
        """The id that begins a document."""
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        return self._processor.eos_id()

    @property
    def pad_id(self) -> int:
        """The padding id; where the model has none, the unknown id, which is Baichuan-2's choice too."""
        pad = self._processor.pad_id()
        return pad if pad >= 0 else self.unk_id

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The ids of the control pieces, by their text."""
        return {piece.piece: i for i, piece in enumerate(self._pieces) if piece.type == piece.CONTROL}

    @cached_property
    def fingerprint(self) -> str:
        """The model file's SHA-256 in hexadecimal: two tokenizers are the same exactly if these are."""
        return hashlib.sha256(self._model).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write the model file into a folder that exists; returns its path."""
        path = folder / FILE_NAME
        path.write_bytes(self._model)
        return path

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos or eos; text that looks like a special piece is encoded as text.

        Raises `UserError` if the string holds a lone surrogate, which no UTF-8 text does.
        """
        return self.encode_batch([text], workers=1)[0]

    def encode_batch(self, texts: Sequence[str], workers: int = 0) -> list[list[int]]:
        """`encode` of every text; what was not met before is encoded on `workers` threads (0 = one per core)."""
        if len(self._atoms) > MAX_ATOMS:
            self._atoms = self._no_atoms()
        known = self._atoms  # another thread may replace the table, but not remove anything from this one
        rows = [self._cut(self._prefix + text) if text else [] for text in texts]
        new = list(set(itertools.chain.from_iterable(rows)).difference(known))
        known.update(zip(new, self._processor.encode(new, num_threads=workers or -1)))
        return [list(itertools.chain.from_iterable(map(known.__getitem__, row))) for row in rows]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids; bytes that form no character become U+FFFD.

        Raises `UserError` for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence of ids, also where they stop in the middle of a character; specials add none."""
        return join_bytes(self._surfaces, ids, self._name).removeprefix(self._prefix.encode())

    @cached_property
    def _surfaces(self) -> list[bytes]:
        """The bytes that each id stands for."""
        return [_surface(piece) for piece in self._pieces]

    @cached_property
    def _joined(self) -> np.ndarray:
        """bool [2^TABLE_BITS]: whether any piece joins two characters of this hash; a collision only joins more."""
        table = np.zeros(1 << TABLE_BITS, bool)
        for piece in self._pieces:
            if piece.type in (piece.NORMAL, piece.USER_DEFINED, piece.UNUSED) and len(piece.piece) > 1:
                table[_pair_hashes(piece.piece.replace(SPACE_MARK, " "))] = True
        return table

    def _cut(self, text: str) -> list[str]:
        """The atoms of a text that is not empty."""
        check_text(text)
        cuts = np.flatnonzero(~self._joined[_pair_hashes(text)]) + 1
        bounds = [0, *cuts.tolist(), len(text)]
        return [text[start:end] for start, end in itertools.pairwise(bounds)]

    def _no_atoms(self) -> dict[str, list[int]]:
        """A table that knows only how to write a literal U+2581: as bytes."""
        return {SPACE_MARK: [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]}


def read(file: Path) -> SentencePieceTokenizer:
    """Open a model file; `UserError` where it is damaged or of a kind that would lose text."""
    return SentencePieceTokenizer(file.read_bytes(), str(file))


def _pair_hashes(text: str) -> np.ndarray:
    """uint32 [len(text) - 1]: a hash of every two neighbouring characters."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return (codes[:-1] * np.uint32(0x9E3779B1) + codes[1:] * np.uint32(0x85EBCA6B)) >> np.uint32(32 - TABLE_BITS)


def _surface(piece: Message) -> bytes:
    if piece.type == piece.BYTE:
        return bytes([int(piece.piece[1:-1], 16)])  # written <0xNN>
    if piece.type == piece.UNKNOWN:
        return UNKNOWN_SURFACE.encode()
    return b"" if piece.type == piece.CONTROL else piece.piece.replace(SPACE_MARK, " ").encode()


def _parse(model: bytes, name: str) -> Message:
    """The model's message, if it is whole and of the kind that encoding by atoms is exact for."""
    proto: Message = protocol.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model)
        whole = all(isinstance(piece.piece, str) for piece in proto.pieces)  # what is no UTF-8 is given as bytes
    except (DecodeError, UnicodeDecodeError):
        whole = False
    require(whole, f"{name} is not a SentencePiece model (corrupt or cut short)")
    require(len(proto.pieces) > 0, f"{name} is not a SentencePiece model (it has no pieces)")
    for wrong in _unsupported(proto):
        raise UserError(f"{name} cannot be used: {wrong}")
    return proto


def _processor(proto: Message, name: str) -> sentencepiece.SentencePieceProcessor:
    """The library's own object, which checks the pieces more closely."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # the library raises RuntimeError, and whatever decoding strings does
        raise UserError(f"{name} cannot be used: {' '.join(str(error).split())}") from None


def _unsupported(proto: Message) -> Iterator[str]:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.vocab_size > len(proto.pieces) and trainer.hard_vocab_limit:
        yield f"it has {len(proto.pieces)} pieces of {trainer.vocab_size}; the file is cut short"
    if trainer.model_type != trainer.BPE:
        yield "it is not a BPE model"
    damaged = next((p.piece for p in proto.pieces if p.type == p.BYTE and not BYTE.fullmatch(p.piece)), None)
    if damaged is not None:
        yield f"its byte piece {damaged!r} is not written <0xNN>"
    if not trainer.byte_fallback:
        yield "it has no byte fallback, so it would lose characters"
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        yield "it writes spaces in another way than U+2581 before a word"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        yield "it normalises text, so decoding would not give it back"
