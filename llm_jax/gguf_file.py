"""Reading GGUF files: their metadata, and where each tensor lies. The layout is that of the format's versions 2 and 3.

The `gguf` package's own reader takes seconds over a vocabulary, and loops over lengths that a damaged file makes up.
This one takes the metadata in one pass and never trusts a length; unpacking quantised blocks is the package's.
"""

import dataclasses
import functools
import math
import os
import struct
from pathlib import Path
from typing import Any

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
Kind = gguf.GGMLQuantizationType
FLOATS = {Kind.F32: "<f4", Kind.F16: "<f2", Kind.F64: "<f8"}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in the file; nothing is read before `array`."""

    name: str
    shape: tuple[int, ...]  # row-major, the way numpy has it: the file states it in reverse
    kind: Kind
    data: np.ndarray  # uint8, mapped

    def array(self) -> np.ndarray:
        """The dequantised values, float32 (float16 and float64 tensors as they are)."""
        if self.kind in FLOATS:
            return self.data.view(FLOATS[self.kind]).reshape(self.shape)
        rows = self.data.reshape(*self.shape[:-1], -1)
        return gguf.dequantize(rows, self.kind).reshape(self.shape)


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
    require(size >= len(MAGIC), f"{path} is not a GGUF file")
    data = np.memmap(path, np.uint8, mode="r")
    cursor = _Cursor(data, path)
    require(bytes(cursor.take(len(MAGIC))) == MAGIC, f"{path} is not a GGUF file")
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
    tensors = {header[0]: _tensor(data, path, start, *header) for header in stated}
    return GGUFFile(path, metadata, tensors)


class _Cursor:
    """Reads values one after the other, and never past the end of the file."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.position = 0
        self._data = data.data
        self.path = path

    def take(self, count: int) -> memoryview:
        end = self.position + count
        require(end <= len(self._data), f"{self.path} is cut short: its header does not end in the file")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return bytes(self.take(self.number("Q"))).decode("utf-8", errors="replace")

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
    data: np.ndarray, path: Path, start: int, name: str, shape: tuple[int, ...], code: int, offset: int
) -> StoredTensor:
    try:
        kind = Kind(code)
    except ValueError:
        raise UserError(f"{path}: tensor {name} has the unknown type {code}") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns = shape[-1] if shape else 1
    require(columns % block == 0, f"{path}: tensor {name} {list(shape)} has rows that are no multiple of {block} long")
    begin, size = start + offset, math.prod(shape) // block * block_bytes
    require(
        begin + size <= len(data),
        f"{path} is cut short: tensor {name} ends at byte {begin + size}, the file has {len(data)}",
    )
    return StoredTensor(name, shape, kind, data[begin : begin + size])
