"""Weights in torch's own file format (`.bin`, `.pt`), read without torch and without running anything of the file.

The format is a zip archive of uncompressed entries: `data.pkl`, a pickle that describes the tensors, and `data/KEY`,
the bytes of each storage. A pickle is a program: it names functions of any module and has them called. So this one is
first searched for anything but plain values and the few names below, and then run with nothing else within reach:
those names stand for objects of this file, which can make tensors' descriptions and nothing more.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_jax.errors import UserError, require
from llm_jax.interop.storage import DTYPES, StoredTensor, contiguous

STORAGES = {"FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"}
MAX_PICKLE = 64 << 20  # bytes; a tensor takes about 200
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, and the lengths of the name and the extra field
INSTRUCTIONS = """
    PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
"""
OPCODES = frozenset(INSTRUCTIONS.split())


class _Storage(NamedTuple):
    """A run of numbers in the archive."""

    offset: int
    size: int
    dtype: np.dtype


class _Tensor(NamedTuple):
    """A tensor before it has a name."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StateDict(dict):
    """What torch keeps its tensors in; its attributes (`_metadata`) are of no use here."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Drop them."""


class _Name:
    """Something that a pickle may name. A pickle cannot change it, and can call it only if it is a function here."""

    __slots__ = ("_call", "dtype")

    def __init__(self, call: Any = None, dtype: np.dtype | None = None) -> None:
        self._call = call
        self.dtype = dtype

    def __call__(self, *args: Any) -> Any:
        if self._call is None:
            raise TypeError("a storage type is called")
        return self._call(*args)

    def __setstate__(self, state: object) -> None:
        raise TypeError("a name is given a state")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """The arguments of torch's function of this purpose; the rest is about gradients."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise TypeError("a tensor is not made of a storage, a shape and strides")
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise ValueError("a tensor has a senseless shape")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if math.prod(shape) and last >= storage.size:
        raise ValueError("a tensor reaches past its storage")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


NAMES: Mapping[tuple[str, str], _Name] = {
    ("collections", "OrderedDict"): _Name(_StateDict),
    ("torch._utils", "_rebuild_tensor_v2"): _Name(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Name(_rebuild_parameter),
    **{("torch", storage): _Name(dtype=DTYPES[name]) for storage, name in STORAGES.items()},
}


def read(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, none of them read yet.

    Raises `UserError` for a file that is cut short, compressed, of torch's format before version 1.6, or that holds
    or asks for anything but tensors of float32, float16 and bfloat16.
    """
    entries, prefix = _entries(path)
    description = entries.get(f"{prefix}data.pkl")
    if description is None:
        raise UserError(f"{path} has no data.pkl: it is not a file that torch.save wrote")
    offset, size = description
    require(size <= MAX_PICKLE, f"{path} is refused: its data.pkl of {size} bytes describes no set of tensors")
    order = entries.get(f"{prefix}byteorder")
    with path.open("rb") as file:
        if order is not None:
            file.seek(order[0])
            require(file.read(min(order[1], 16)) == b"little", f"{path} was written on a big-endian machine")
        file.seek(offset)
        data = file.read(size)
    try:
        _search(data)
        state = _Unpickler(data, entries, prefix).load()
    except Exception as error:  # whatever a senseless pickle makes Python raise
        raise UserError(f"{path} is refused: {' '.join(str(error).split())[:200] or type(error).__name__}") from None
    require(isinstance(state, dict), f"{path} is refused: it holds {type(state).__name__}, not tensors by name")
    return {_checked(name, value, path): _stored(name, value, path) for name, value in state.items()}


def _checked(name: Any, value: Any, path: Path) -> str:
    require(
        isinstance(name, str) and isinstance(value, _Tensor),
        f"{path} is refused: its entry {str(name)[:80]!r} is no tensor",
    )
    return str(name)


def _stored(name: str, tensor: _Tensor, path: Path) -> StoredTensor:
    start = tensor.storage.offset + tensor.offset * tensor.storage.dtype.itemsize
    # Strides of axes of one element mean nothing, and torch writes any.
    strides = contiguous(tensor.shape)
    if any(size > 1 and a != b for size, a, b in zip(tensor.shape, tensor.strides, strides)):
        strides = tensor.strides
    return StoredTensor(name, path, start, tensor.shape, strides, tensor.storage.dtype)


def _entries(path: Path) -> tuple[dict[str, tuple[int, int]], str]:
    """Where each entry's bytes are, (offset, size) by name, and the folder that they are all in."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a whole zip archive, as torch writes it since version 1.6 ({error}): it is cut short, or "
            "must be saved again by a newer torch"
        ) from None
    entries = {}
    with path.open("rb") as file:
        for info in infos:
            plain = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
            require(plain and not info.flag_bits & 1, f"{path} is refused: its entry {info.filename!r} is compressed")
            require(info.filename not in entries, f"{path} is refused: it has two entries {info.filename!r}")
            file.seek(info.header_offset)
            header = file.read(LOCAL_HEADER.size)
            require(len(header) == LOCAL_HEADER.size, f"{path} is cut short")
            signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
            start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
            require(
                signature == b"PK\3\4" and start + info.file_size <= size,
                f"{path} is damaged: its entry {info.filename!r} is not where the archive says",
            )
            entries[info.filename] = start, info.file_size
    first = next(iter(entries), "")
    return entries, first[: first.find("/") + 1]


def _search(data: bytes) -> None:
    """Refuse a pickle with instructions that no set of tensors needs, before any of it runs."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in OPCODES:
            raise ValueError(f"its pickle uses the instruction {opcode.name}; it may be an attack")
        if opcode.name.endswith("BINPUT") and int(argument or 0) > count:  # would fill the memory with holes
            raise ValueError("its pickle numbers values that it does not have; it may be an attack")


def _named(module: str, name: str) -> _Name:
    if (module, name) in NAMES:
        return NAMES[module, name]
    if module == "torch" and name.endswith("Storage"):
        raise ValueError(f"it holds a {name}; only {', '.join(STORAGES)} can be read")
    raise ValueError(f"it asks for {module}.{name}, which no set of tensors needs; it may be an attack")


class _Unpickler(pickle.Unpickler):
    """Runs a pickle that can name nothing but `NAMES`."""

    def __init__(self, data: bytes, entries: Mapping[str, tuple[int, int]], prefix: str) -> None:
        super().__init__(io.BytesIO(data))
        self._entries = entries
        self._prefix = prefix

    def find_class(self, module: str, name: str) -> Any:
        """One of `NAMES`."""
        return _named(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that ("storage", type, key, device, number of elements) describes."""
        kind, storage_type, key, _, count = pid
        if kind != "storage" or not isinstance(storage_type, _Name) or storage_type.dtype is None:
            raise ValueError("it refers to something that is no storage")
        where = self._entries.get(f"{self._prefix}data/{key}")
        if where is None or type(count) is not int or not 0 <= count * storage_type.dtype.itemsize <= where[1]:
            raise ValueError(f"its storage {str(key)[:40]!r} is missing or cut short")
        return _Storage(where[0], count, storage_type.dtype)
