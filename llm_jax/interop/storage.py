"""Tensors as they lie in a file: described by its header, and read a part at a time.

Files are read into buffers, never memory-mapped: mapped pages count as the process's own memory, and a truncated file
under a mapping is a crash instead of an error.
"""

import dataclasses
import math
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import ml_dtypes
import numpy as np

from llm_jax.errors import require

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
CHUNK_BYTES = 1 << 20  # read at once: it is transposed next, and three times as fast while it is in the cache


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file. `offset` counts bytes, `strides` elements."""

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """A part of the first axis."""
        offset = self.offset + start * self.strides[0] * self.dtype.itemsize
        return dataclasses.replace(self, offset=offset, shape=(stop - start, *self.shape[1:]))

    def chunks(self, unit: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """The tensor in blocks of rows of its first axis, each with the index of its first row.

        A block has a multiple of `unit` rows and about CHUNK_BYTES. The array is the caller's until the next one is
        asked for. Raises `UserError` where the file ends early.
        """
        if self.strides != contiguous(self.shape):
            yield 0, self._strided()
            return
        row_shape = self.shape[1:]
        row_bytes = math.prod(row_shape) * self.dtype.itemsize
        rows = max(unit, CHUNK_BYTES // max(1, row_bytes * unit) * unit)
        buffer = np.empty((min(rows, self.shape[0]), *row_shape), self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, self.shape[0], rows):
                block = buffer[: self.shape[0] - start]
                self._fill(file, block)
                yield start, block

    def read(self) -> np.ndarray:
        """The whole tensor."""
        if self.strides != contiguous(self.shape):
            return self._strided()
        whole = np.empty(self.shape, self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            self._fill(file, whole)
        return whole

    def _strided(self) -> np.ndarray:
        """A transposed or otherwise strided tensor: the span that it lies in, read at once, and a view of it."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        flat = dataclasses.replace(self, shape=(span,), strides=(1,)).read()
        byte_strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, byte_strides, writeable=False)

    def _fill(self, file: FileIO, block: np.ndarray) -> None:
        view = block.reshape(-1).view(np.uint8).data
        filled = 0
        while filled < len(view):
            count = file.readinto(view[filled:])
            require(bool(count), f"tensor {self.name}: {self.path} ends within it; the file is cut short")
            filled += count


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor stored row by row."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
