"""A folder of the user's own text: which files are read, which source each belongs to, and how one is opened.

A file directly in the folder is a source of its own, named after it; every folder inside is one source with all it
holds.
"""

import codecs
import collections
import gzip
import hashlib
import io
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from llm_jax.data.encodings import wide
from llm_jax.errors import UserError, require

logger = logging.getLogger(__name__)

HTML_KINDS = (".html", ".htm")
JSONL_KINDS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
WARC_KINDS = (".warc", ".warc.gz", ".wet", ".wet.gz")
SQLITE_KINDS = (".db", ".sqlite", ".sqlite3")
KINDS = (".txt", *JSONL_KINDS, ".parquet", *HTML_KINDS, *WARC_KINDS, *SQLITE_KINDS)
FAULT = "llm_jax.fault"  # the name of what is done with undecodable bytes
BUFFER_BYTES = 1 << 12  # what a damaged zstd file may lose of what comes before the damage
NO_ZSTANDARD = "reading .zst needs pyarrow: pip install 'llm-jax[data]'"


def _invalid(error: UnicodeError) -> tuple[str, int]:
    """What surrogateescape turns into a byte that is not UTF-8, in the place of what cannot be decoded."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error(FAULT, _invalid)


def find_sources(path: Path) -> dict[str, list[Path]]:
    """The files to read, by source name, both in sorted order.

    Files of other kinds are counted in the log. Raises `UserError` if there is nothing to read.
    """
    found = _files(path)
    known = [file for file in found if kind(file)]
    unknown = _others(found)
    counts = ", ".join(f"{count} {suffix}" for suffix, count in unknown.items())
    require(bool(known), f"{path} holds no {', '.join(KINDS)} file" + (f", only {counts}" if counts else ""))
    if unknown:
        logger.warning("%s: ignored %d files of other kinds: %s", path, sum(unknown.values()), counts)
    sources: dict[str, list[Path]] = {}
    for file in known:
        sources.setdefault(_source_name(file, path), []).append(file)
    return dict(sorted(sources.items()))


def ignored(path: Path) -> dict[str, int]:
    """How many files of other kinds there are, by their suffix."""
    return _others(_files(path))


def _others(found: Iterable[Path]) -> dict[str, int]:
    unknown = collections.Counter(file.suffix or "without a suffix" for file in found if not kind(file))
    return dict(sorted(unknown.items()))


def state(path: Path) -> list[tuple[str, int, int]]:
    """(path, size, time of change) of every file to read, which stand for what the files hold.

    Raises `UserError` if there is no such path.
    """
    stats = [(str(file), file.stat()) for file in _files(path) if kind(file)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def digest(path: Path) -> str:
    """SHA-256 of what a file holds, in hexadecimal; `UserError` where there is none."""
    require(path.is_file(), f"no file at {path}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> list[Path]:
    require(path.exists(), f"no file or folder at {path} (CorpusConfig.path)")
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*"))
    dangling = next((file for file in found if file.is_symlink() and not file.exists()), None)
    require(dangling is None, f"{dangling} links to a file that is not there: bring it back, or remove the link")
    return [file for file in found if file.is_file()]


def kind(path: Path) -> str | None:
    """Which of `KINDS` a file is, by its name."""
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def _source_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).parts if root.is_dir() else (file.name,)
    name = parts[0] if len(parts) > 1 else file.name[: -len(kind(file) or "")]
    return re.sub(r"\W", "_", name) or "text"


def open_bytes(path: Path) -> IO[bytes]:
    """A file's content, unpacked if its name ends in .gz or .zst."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        try:
            import pyarrow
        except ImportError:
            raise UserError(f"{path}: {NO_ZSTANDARD}") from None
        # Unlike zstandard's own reader it tells a truncated file from a whole one.
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), BUFFER_BYTES)
    return path.open("rb")


def narrow(file: IO[bytes]) -> tuple[IO[bytes], str]:
    """A file in UTF-16 or UTF-32 as UTF-8, and the name of its encoding; any other file as it is, and ""."""
    buffered = file if isinstance(file, io.BufferedReader | gzip.GzipFile) else io.BufferedReader(file)  # type: ignore
    encoding = wide(buffered.peek(4096)[:4096])
    return (io.BufferedReader(_Recoded(buffered, encoding)), encoding) if encoding else (buffered, "")


class _Recoded(io.RawIOBase):
    """Reads a file of another encoding as UTF-8, with a byte that is invalid there for what is invalid here."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding, errors=FAULT, newline="")  # type: ignore[type-var]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._text.read(len(buffer) // 4).encode(errors="surrogateescape")
        buffer[: len(data)] = data
        return len(data)


def lines(file: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Every line of a file; None for one of more than `limit` bytes."""
    while line := file.readline(limit + 1):
        if len(line) <= limit:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(limit)
        yield None


def jsonl_lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain or gzipped file; `UserError` where it is cut off."""
    with open_bytes(path) as file:
        try:
            yield from file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is truncated or not gzip: {error}") from None
