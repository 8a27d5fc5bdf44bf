"""Reading GGUF files: their metadata, and where each tensor lies. The layout is that of the format's versions 2 and 3.

The `gguf` package's own reader takes seconds over a vocabulary, and loops over lengths that a damaged file makes up.
This one takes the metadata in one pass and never trusts a length; unpacking quantised blocks is the package's.
"""

import dataclasses
import functools
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from llm_jax.errors import UserError, require

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# The format's codes of scalar types, as `struct` and numpy write them (little-endian).
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
CHUNK_BYTES = 1 << 23  # dequantised at once: small beside any matrix of a model
Kind = gguf.GGMLQuantizationType
FLOATS = {Kind.F32: "<f4", Kind.F16: "<f2", Kind.F64: "<f8"}
READABLE = {*FLOATS, *gguf.quants._type_traits}  # the package has no public list of what it dequantises


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file."""

    name: str
    path: Path
    offset: int  # of its first byte
    shape: tuple[int, ...]  # row-major, the way numpy has it: the file states it in reverse
    kind: Kind

    def chunks(self, unit: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """The dequantised tensor in blocks of rows of its first axis, each with the index of its first row.

        A block has a multiple of `unit` rows and about CHUNK_BYTES; float32, or as stored in the types of `FLOATS`.
        """
        row_size = math.prod(self.shape[1:])
        rows = max(unit, CHUNK_BYTES // max(1, 4 * row_size * unit) * unit)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.shape[0], rows):
                shape = (min(rows, self.shape[0] - start), *self.shape[1:])
                yield start, self._unpack(file.read(stored_bytes(shape, self.kind)), shape)

    def read(self) -> np.ndarray:
        """The whole tensor, dequantised."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return self._unpack(file.read(stored_bytes(self.shape, self.kind)), self.shape)

    def _unpack(self, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
        if self.kind in FLOATS:
            return np.frombuffer(data, FLOATS[self.kind]).reshape(shape)
        rows = np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1)
        return gguf.dequantize(rows, self.kind).reshape(shape)


def stored_bytes(shape: tuple[int, ...], kind: Kind) -> int:
    """How many bytes a tensor of this shape takes in a file."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """The contents of a GGUF file: `metadata` by key, `tensors` by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read(path: str | Path) -> GGUFFile:
    """Open a file; `UserError` where it is missing, cut short or no GGUF. The last one read is remembered."""
    path = Path(path)
    require(path.is_file(), f"no GGUF file at {path}")
    status = os.stat(path)
    return _read(path.absolute(), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _read(path: Path, modified: int, size: int) -> GGUFFile:
    del modified  # only tells versions of a file apart
    with path.open("rb") as file:
        cursor = _Cursor(file, size)
        require(size >= len(MAGIC) and cursor.take(len(MAGIC)) == MAGIC, f"{path} is not a GGUF file")
        version = cursor.number("I")
        require(version in VERSIONS, f"{path} has version {version} of the GGUF format; 2 and 3 can be read")
        tensor_count, pair_count = cursor.number("Q"), cursor.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = cursor.text()
            metadata[key] = cursor.value(cursor.number("I"))
        stated = [_tensor_header(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    require(isinstance(alignment, int) and alignment > 0, f"{path}: general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {header[0]: _tensor(path, size, start, *header) for header in stated}
    require(len(tensors) == tensor_count, f"{path} is damaged: two of its tensors have the same name")
    parts = metadata.get("split.count", 1)
    require(parts in (0, 1), f"{path} is one of {parts} files of a model: merge them first (llama-gguf-split --merge)")
    return GGUFFile(path, metadata, tensors)


class _Cursor:
    """Reads values one after the other, and never past the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.position = 0
        self.path = Path(file.name)
        self._file = file
        self._size = size

    def take(self, count: int) -> bytes:
        require(self.position + count <= self._size, f"{self.path} is cut short: its header does not end in the file")
        self.position += count
        return self._file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        return self.number(self._scalar(kind))

    def _array(self, kind: int, length: int) -> list[Any]:
        if kind == STRING:
            return [self.text() for _ in range(length)]
        dtype = np.dtype("<" + self._scalar(kind))
        return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()

    def _scalar(self, kind: int) -> str:
        require(kind in SCALARS, f"{self.path} is damaged: its header has a value of unknown type {kind}")
        return SCALARS[kind]


def _tensor_header(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset) as the file states them."""
    name, dimensions = cursor.text(), cursor.number("I")
    require(dimensions <= MAX_DIMENSIONS, f"{cursor.path} is damaged: tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))
    return name, shape[::-1], cursor.number("I"), cursor.number("Q")


def _tensor(
    path: Path, file_size: int, start: int, name: str, shape: tuple[int, ...], code: int, offset: int
) -> StoredTensor:
    try:
        kind = Kind(code)
    except ValueError:
        raise UserError(f"{path}: tensor {name} has the unknown type {code}") from None
    require(kind in READABLE, f"{path}: tensor {name} is of type {kind.name}, which cannot be dequantised")
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    require(
        bool(shape) and shape[-1] % block == 0,
        f"{path}: tensor {name} {list(shape)} has rows that are no multiple of {block} long",
    )
    end = start + offset + stored_bytes(shape, kind)
    require(end <= file_size, f"{path} is cut short: tensor {name} ends at byte {end}, the file at {file_size}")
    return StoredTensor(name, path, start + offset, shape, kind)
