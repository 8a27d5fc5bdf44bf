"""Safetensors files, read and written a tensor at a time.

The format is eight bytes with the length of a JSON header, the header, and the tensors' bytes. The `safetensors`
package reads through a memory map and writes from whole tensors in memory; converting a model larger than half of
the memory needs neither. The tests hold these few lines to the package.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.errors import UserError, require
from llm_jax.interop.storage import DTYPES, StoredTensor, contiguous

MAX_HEADER = 100_000_000  # the package's own limit
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CODES = {name: code for code, name in NAMES.items()}


def read(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, none of them read yet. `UserError` where the file is not whole or not one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).rjust(8, b"\xff"))[0]
        require(length <= min(MAX_HEADER, size - 8), f"{path} is not a safetensors file, or cut short in its header")
        header = file.read(length)
    try:
        entries = json.loads(header)
        require(isinstance(entries, dict), "the header is no object")
        entries.pop("__metadata__", None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None
    return {name: _entry(path, name, entry, 8 + length, size) for name, entry in entries.items()}


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> StoredTensor:
    """One tensor of the header, checked against the file's size."""
    try:
        code, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: the header's entry of tensor {name} makes no sense") from None
    whole = all(type(number) is int and abs(number) < 2**63 for number in (begin, end, *shape))
    require(whole, f"{path}: the header's entry of tensor {name} makes no sense")
    known = ", ".join(NAMES)
    require(code in NAMES, f"{path}: tensor {name} has dtype {code}; only {known} can be read")
    dtype = DTYPES[NAMES[code]]
    require(
        min((begin, *shape), default=0) >= 0 and end - begin == math.prod(shape) * dtype.itemsize,
        f"{path}: tensor {name} has {end - begin} bytes, which its shape {list(shape)} contradicts",
    )
    require(data + end <= size, f"{path} is cut short: tensor {name} ends at byte {data + end} of {size}")
    return StoredTensor(name, path, data + begin, shape, contiguous(shape), dtype)


def write(path: Path, layout: Mapping[str, tuple[tuple[int, ...], np.dtype]], tensors: Iterable[np.ndarray]) -> None:
    """Write tensors that come one by one, in the order of `layout`, which has their names, shapes and dtypes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in layout.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for (shape, dtype), tensor in zip(layout.values(), tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (shape, dtype)
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())  # whole on the disk before anything is renamed
