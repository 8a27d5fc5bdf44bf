"""Weights in torch's own file format (`.bin`, `.pt`), read without torch and without running anything of the file.

The format is a zip archive of uncompressed entries: `data.pkl`, a pickle that describes the tensors, and `data/KEY`,
the bytes of each storage. A pickle is a program for Python's unpickler, which imports whatever it names and calls it.
Here it never gets there: the few instructions that descriptions of tensors consist of are followed by an interpreter of
our own, to which the names of torch's functions are words with a meaning, and every other word is an error.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_jax.errors import UserError, require
from llm_jax.interop.storage import DTYPES, StoredTensor, contiguous

STORAGES = {"FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"}
MAX_PICKLE = 64 << 20  # bytes; a tensor takes about 200
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, and the lengths of the name and the extra field


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


def _ordered_dict() -> dict[str, Any]:
    return {}


# What a pickle may name: what to call, or the dtype of a type of storage.
NAMES: Mapping[str, Callable[..., Any] | np.dtype] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    **{f"torch {storage}": DTYPES[name] for storage, name in STORAGES.items()},
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
        state = _Description(entries, f"{prefix}data/").follow(data)
    except (
        ValueError,
        TypeError,
        LookupError,
        OverflowError,
        RecursionError,
    ) as error:  # what senseless instructions lead to
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
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
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
            require(info.header_offset >= 0, f"{path} is damaged: its entry {info.filename!r} begins before the file")
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


class _Description:
    """Follows the instructions of a pickle with a stack and a memory for values, as pickle's protocols 2 to 4 have it.

    Whatever they say, they make nothing but numbers, texts, tuples, lists, dicts with texts as keys, and tensors'
    descriptions, and no more of them than there are instructions.
    """

    def __init__(self, entries: Mapping[str, tuple[int, int]], folder: str) -> None:
        self._entries = entries
        self._folder = folder
        self._stack: list[Any] = []
        self._marks: list[int] = []  # lengths of the stack where collections begin
        self._memo: dict[int, Any] = {}

    def follow(self, data: bytes) -> Any:
        """The value that the instructions lead to; `ValueError` and the like where they make no sense."""
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name in PUSHED:
                self._stack.append(argument)
            elif name in MADE:
                self._stack.append(MADE[name]())
            elif name in STEPS:
                STEPS[name](self, argument)
            elif name not in IGNORED:
                raise ValueError(f"its pickle uses the instruction {name}; it may be an attack")
        (value,) = self._stack
        return value

    def _pop_marked(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self, size: int | None) -> None:
        values = self._pop_marked() if size is None else [self._stack.pop() for _ in range(size)][::-1]
        self._stack.append(tuple(values))

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError("values are added to something that is no list")
        target.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        keys = values[0::2]
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
            raise TypeError("its entries are not tensors by name")
        target.update(zip(keys, values[1::2], strict=True))

    def _remember(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _name(self, name: str) -> None:
        if name not in NAMES and name.startswith("torch ") and name.endswith("Storage"):
            raise ValueError(f"it holds a {name[6:]}; only {', '.join(STORAGES)} can be read")
        if name not in NAMES:
            raise ValueError(
                f"it asks for {name.replace(' ', '.')}, which no set of tensors needs; it may be an attack"
            )
        self._stack.append(NAMES[name])

    def _stacked_name(self) -> None:
        module, name = self._stack.pop(-2), self._stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):  # nested tuples can be longer than any memory
            raise TypeError("it asks for a name that is no text")
        self._name(f"{module} {name}")

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not any(function is known for known in NAMES.values()) or isinstance(function, np.dtype):
            raise TypeError("it calls something that is no function")
        self._stack.append(function(*arguments))

    def _drop_attributes(self) -> None:
        """An OrderedDict of torch has attributes, which are of no use here."""
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise TypeError("it gives attributes to something that has none")

    def _storage(self) -> None:
        """The storage that ("storage", type, key, device, number of elements) describes."""
        kind, dtype, key, _, count = self._stack.pop()
        texts = isinstance(kind, str) and kind == "storage" and isinstance(key, str)
        if not texts or not isinstance(dtype, np.dtype):
            raise ValueError("it refers to something that is no storage")
        start, size = self._entries.get(f"{self._folder}{key}", (0, -1))
        if type(count) is not int or not 0 <= count * dtype.itemsize <= size:
            raise ValueError(f"its storage {key[:40]!r} is missing or cut short")
        self._stack.append(_Storage(start, count, dtype))


IGNORED = frozenset(["PROTO", "FRAME", "STOP"])
PUSHED = frozenset(["BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"])
MADE: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
STEPS: Mapping[str, Callable[[_Description, Any], None]] = {
    "MARK": _Description._mark,
    "TUPLE": _Description._tuple,
    "TUPLE1": lambda d, _: d._tuple(1),
    "TUPLE2": lambda d, _: d._tuple(2),
    "TUPLE3": lambda d, _: d._tuple(3),
    "APPEND": lambda d, _: d._extend([d._stack.pop()]),
    "APPENDS": lambda d, _: d._extend(d._pop_marked()),
    "SETITEM": lambda d, _: d._set_items([d._stack.pop(-2), d._stack.pop()]),
    "SETITEMS": lambda d, _: d._set_items(d._pop_marked()),
    "BINPUT": _Description._remember,
    "LONG_BINPUT": _Description._remember,
    "MEMOIZE": _Description._remember,
    "BINGET": _Description._recall,
    "LONG_BINGET": _Description._recall,
    "GLOBAL": _Description._name,
    "STACK_GLOBAL": lambda d, _: d._stacked_name(),
    "REDUCE": lambda d, _: d._call(),
    "BUILD": lambda d, _: d._drop_attributes(),
    "BINPERSID": lambda d, _: d._storage(),
}
