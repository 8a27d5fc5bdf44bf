"""Torch's files without torch: what torch wrote comes back bit for bit, and nothing that a file asks for is run."""

import pickle
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.interop import torch_zip
from tests.golden import make_transformers

GOLDEN = Path(make_transformers.__file__).parent / "torch.bin"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
EXPECTED = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bias": np.array([0.5, -2.0], np.float32),
    "base": BASE,
    "shared rows": BASE[1:3],
    "transposed": BASE.T,
    "every other": BASE[:, ::2],
    "scalar": np.array(3.0, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "half": BASE.astype(np.float16),
    "bfloat16": (BASE / 3).astype(ml_dtypes.bfloat16),
    "parameter": BASE + 1,
}


def test_a_file_of_torchs_own(monkeypatch):
    read = torch_zip.read(GOLDEN)
    assert read.keys() == EXPECTED.keys()
    for name, want in EXPECTED.items():
        got = read[name].read()
        assert got.dtype == want.dtype, name
        np.testing.assert_array_equal(got, want, err_msg=name)
    for size in (1, 48, 10**6):  # a row at a time, two, all
        monkeypatch.setattr("llm_jax.interop.storage.CHUNK_BYTES", size)
        for name in ("base", "shared rows", "transposed", "every other", "bfloat16"):
            blocks = [(start, block.copy()) for start, block in read[name].chunks()]
            np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), EXPECTED[name])
            assert [start for start, _ in blocks] == np.cumsum([0, *(len(b) for _, b in blocks)])[:-1].tolist()


@pytest.mark.slow
def test_a_file_that_torch_writes_now(tmp_path):
    torch = pytest.importorskip("torch")
    for protocol in (2, 3, 4):
        state = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
        torch.save(state, tmp_path / "model.bin", pickle_protocol=protocol)
        read = torch_zip.read(tmp_path / "model.bin")
        np.testing.assert_array_equal(read["a"].read(), np.arange(6.0).reshape(2, 3).T)
        assert read["b"].read().tolist() == [1, 1]


@pytest.mark.parametrize(("kind", "dtype"), [("HalfStorage", np.float16), ("BFloat16Storage", ml_dtypes.bfloat16)])
def test_transposed_tensors_of_two_bytes(tmp_path, kind, dtype):
    values = np.arange(6).astype(dtype)
    entry = tensor(offset=1, shape=(2, 2), strides=(1, 3), kind=kind)
    read = torch_zip.read(archive(tmp_path / "m.bin", dumps({"w": entry}), {"0": values.tobytes()}))
    assert read["w"].read().tolist() == [[1, 4], [2, 5]] and read["w"].dtype == dtype


class Storage:
    """A storage as torch's pickles refer to it: by a persistent id."""

    def __init__(self, key, count, kind="FloatStorage"):
        self.pid = ("storage", Global("torch", kind), key, "cpu", count)


class Global:
    """Something that the pickle shall name."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Something that the pickle shall call, and the state that it shall give to the result."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = Global("collections", "OrderedDict")


def dumps(value):
    """A pickle of protocol 2, as torch writes it, made instruction by instruction so that it can ask for anything."""

    def write(value):
        if isinstance(value, Global):
            return b"c" + f"{value.module}\n{value.name}\n".encode()
        if isinstance(value, Storage):
            return write(value.pid) + b"Q"
        if isinstance(value, Call):
            state = b"" if value.state is None else write(value.state) + b"b"
            return write(value.function) + write(value.args) + b"R" + state
        if isinstance(value, tuple):
            return b"(" + b"".join(map(write, value)) + b"t"
        if isinstance(value, dict):
            return b"}(" + b"".join(write(k) + write(v) for k, v in value.items()) + b"u"
        return pickle.dumps(value, 2)[2:-1]

    return b"\x80\x02" + write(value) + b"."


def tensor(key="0", offset=0, shape=(2, 3), strides=(3, 1), count=6, kind="FloatStorage"):
    return Call(REBUILD, Storage(key, count, kind), offset, shape, strides, False, Call(ORDERED_DICT))


def archive(path, data, storages=None, compression=zipfile.ZIP_STORED, extra=()):
    """A file of torch's format around a pickle."""
    storages = {"0": np.arange(6, dtype="<f4").tobytes()} if storages is None else storages
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        for key, content in storages.items():
            file.writestr(f"archive/data/{key}", content)
        for name, content in extra:
            file.writestr(name, content)
    return path


def test_the_hand_made_file_is_readable(tmp_path):
    """Otherwise the refusals below would prove nothing."""
    read = torch_zip.read(archive(tmp_path / "m.bin", dumps({"w": tensor()})))
    assert read["w"].read().tolist() == [[0, 1, 2], [3, 4, 5]]
    ordered = Call(ORDERED_DICT, state={"_metadata": Call(ORDERED_DICT)})
    assert torch_zip.read(archive(tmp_path / "n.bin", dumps(ordered))) == {}


ATTACKS = {
    "a shell": lambda mark: Call(Global("os", "system"), f"touch {mark}"),
    "a shell by its other name": lambda mark: Call(Global("posix", "system"), f"touch {mark}"),
    "eval": lambda mark: Call(Global("builtins", "eval"), f"open({str(mark)!r}, 'w')"),
    "exec by its old name": lambda mark: Call(Global("__builtin__", "exec"), f"open({str(mark)!r}, 'w')"),
    "a subprocess": lambda mark: Call(Global("subprocess", "check_call"), ["touch", str(mark)]),
    "an allowed module": lambda mark: Call(Global("torch._utils", "_import_dotted_name"), "os.system"),
    "a nested global": lambda mark: Call(Global("collections", "OrderedDict.__init__.__globals__"), 1),
    "our own reader": lambda mark: Call(Global("llm_jax.interop.torch_zip", "read"), str(mark)),
    "a way to other names": lambda mark: Call(Call(Global("builtins", "getattr"), ORDERED_DICT, "fromkeys"), ["a"]),
    "a lookup": lambda mark: Call(Global("operator", "attrgetter"), "__class__"),
    "torch's load": lambda mark: Call(Global("torch", "load"), str(mark)),
    "a call of a storage": lambda mark: Call(Global("torch", "FloatStorage"), 10**12),
    "a state for a function": lambda mark: Call(Call(ORDERED_DICT, REBUILD), (), state=(None, {"__call__": 1})),
    "a dict of something else": lambda mark: {"w": Call(ORDERED_DICT)},
    "a list": lambda mark: [1, 2],
    "numbers for names": lambda mark: {3: tensor()},
    "integers": lambda mark: {"w": tensor(kind="LongStorage")},
    "past the storage": lambda mark: {"w": tensor(offset=1)},
    "a negative offset": lambda mark: {"w": tensor(offset=-1)},
    "a negative size": lambda mark: {"w": tensor(shape=(-2, 3))},
    "large strides": lambda mark: {"w": tensor(strides=(10**9, 1))},
    "a huge shape": lambda mark: {"w": tensor(shape=(2**60, 2**60), strides=(0, 0))},
    "a longer storage": lambda mark: {"w": tensor(count=7)},
    "another storage": lambda mark: {"w": tensor(key="../../data.pkl")},
    "text for a shape": lambda mark: {"w": tensor(shape="ab", strides="cd")},
    "no storage": lambda mark: {"w": Call(REBUILD, 1, 0, (1,), (1,), False, None)},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_but_tensors_is_made(tmp_path, attack):
    mark = tmp_path / "executed"
    path = archive(tmp_path / "model.bin", dumps(ATTACKS[attack](mark)))
    modules = set(sys.modules)
    with pytest.raises(UserError, match=r"model\.bin is refused: ") as caught:
        torch_zip.read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not mark.exists() and "subprocess" not in set(sys.modules) - modules


def test_the_refusal_says_what_was_asked_for(tmp_path):
    path = archive(tmp_path / "model.bin", dumps(ATTACKS["a shell"](tmp_path)))
    with pytest.raises(UserError, match=r"asks for os\.system, which no set of tensors needs; it may be an attack"):
        torch_zip.read(path)
    path = archive(tmp_path / "model.bin", dumps(ATTACKS["integers"](tmp_path)))
    with pytest.raises(UserError, match="holds a LongStorage; only FloatStorage, HalfStorage, BFloat16Storage can be"):
        torch_zip.read(path)


def test_python_itself_would_have_run_it(tmp_path):
    """The attacks are real: the standard unpickler executes them."""
    mark = tmp_path / "executed"
    pickle.loads(dumps(ATTACKS["a shell"](mark)))
    assert mark.exists()


RAW = {
    "an instance": b"\x80\x02(ios\nsystem\nX\x01\x00\x00\x00x.",
    "an object": b"\x80\x02(cos\nsystem\no.",
    "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "an extension": b"\x80\x02\x82\x01.",
    "a value that is not there": b"\x80\x02j\xff\xff\xff\x7f.",
    "a nested name": b"\x80\x04)" + b"\x85" * 200_000 + b"\x8c\x01a\x93.",
    "a nested storage": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n)" + b"\x85" * 200_000 + b"NK\x01tQ.",
    "an item too many": b"\x80\x02}(X\x01\x00\x00\x00au.",
    "two values": b"\x80\x02}}.",
    "a long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "cut short": dumps({"w": tensor()})[:-8],
    "nothing": b"",
    "noise": bytes(range(256)),
    "a nested tuple as a key": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
}


@pytest.mark.parametrize("case", RAW)
def test_senseless_pickles(tmp_path, case):
    with pytest.raises(UserError, match=r"model\.bin is refused: ") as caught:
        torch_zip.read(archive(tmp_path / "model.bin", RAW[case]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"", b"X\x01\x00\x00\x00a\x93.", "asks for a name that is no text"),
        (b"X\x01\x00\x00\x00a", b"\x93.", "asks for a name that is no text"),
        (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n", b"NK\x01tQ.", "refers to something that is no storage"),
    ],
)
def test_a_value_that_is_long_only_when_written_out_never_is(tmp_path, before, after, message):
    """Every pair of a pair doubles the text: a few hundred bytes of file would fill any memory."""
    doubled = b"X\x01\x00\x00\x00aq\x00" + b"h\x00\x86q\x00" * 18
    path = archive(tmp_path / "model.bin", b"\x80\x04" + before + doubled + after)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            torch_zip.read(path)
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def damaged(path, kind):
    """A file with something wrong around the pickle."""
    data = dumps({"w": tensor()})
    if kind == "compressed":
        return archive(path, data, compression=zipfile.ZIP_DEFLATED)
    if kind == "a bomb":
        return archive(path, b"\0" * 10**8, compression=zipfile.ZIP_DEFLATED)
    if kind == "two of a name":
        with pytest.warns(UserWarning, match="Duplicate name"):
            return archive(path, data, extra=[("archive/data.pkl", b"other")])
    if kind == "big-endian":
        return archive(path, data, extra=[("archive/byteorder", b"big")])
    if kind == "no pickle":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/other", b"")
        return path
    if kind == "a legacy file":
        path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
        return path
    if kind == "a storage less":
        return archive(path, data, storages={})
    whole = archive(path, data).read_bytes()
    if kind == "cut short":
        path.write_bytes(whole[:-30])
    record = whole.index(b"PK\1\2")
    if kind == "a later version":
        path.write_bytes(whole[: record + 6] + struct.pack("<H", 200) + whole[record + 8 :])
    if kind == "a cut in the middle":
        path.write_bytes(whole[:40] + whole[140:])
    if kind == "a moved entry":
        path.write_bytes(whole.replace(b"PK\3\4", b"PK\3\5"))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("compressed", r"entry 'archive/data.pkl' is compressed"),
        ("a bomb", r"entry 'archive/data.pkl' is compressed"),
        ("two of a name", "two entries 'archive/data.pkl'"),
        ("big-endian", "big-endian"),
        ("no pickle", r"no data\.pkl"),
        ("a legacy file", r"not a whole zip archive, as torch writes it since version 1\.6"),
        ("a storage less", "storage '0' is missing or cut short"),
        ("cut short", "not a whole zip archive"),
        ("a later version", "not a whole zip archive"),
        ("a cut in the middle", "is damaged: its entry .* begins before the file"),
        ("a moved entry", "is not where the archive says"),
    ],
)
def test_damaged_files(tmp_path, kind, message):
    with pytest.raises(UserError, match=message) as caught:
        torch_zip.read(damaged(tmp_path / "model.bin", kind))
    assert "model.bin" in str(caught.value) and "\n" not in str(caught.value)


def test_a_large_description_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_zip, "MAX_PICKLE", 10)
    with pytest.raises(UserError, match=r"data\.pkl of \d+ bytes describes no set of tensors"):
        torch_zip.read(archive(tmp_path / "model.bin", dumps({"w": tensor()})))


def test_a_description_without_end_costs_no_more_than_its_file(tmp_path):
    """Numbering a value high must not make room for all the values below, as Python's own unpickler does."""
    path = archive(tmp_path / "model.bin", b"\x80\x02}r\xff\xff\xff\x7f.")
    assert torch_zip.read(path) == {}
