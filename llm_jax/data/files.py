"""The user's own text: a file or a folder, read recursively, of .txt, .jsonl, .jsonl.gz and .parquet.

A .txt file is one document, or several if it is longer than `MAX_DOCUMENT_BYTES`; elsewhere a record is one. A file
directly in the folder is a source of its own, named after it; every folder inside is one source with all it holds.
"""

import collections
import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from llm_jax.data.documents import split_long
from llm_jax.errors import UserError, require

logger = logging.getLogger(__name__)

KINDS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
BLOCK_BYTES = 1 << 26  # of a .txt file held in memory at once
BYTE_ORDER_MARK = "\ufeff"


def find_sources(path: Path) -> dict[str, list[Path]]:
    """The files to read, by source name, both in sorted order.

    Files of other kinds are counted in the log. Raises `UserError` if there is nothing to read.
    """
    require(path.exists(), f"no file or folder at {path} (CorpusConfig.path)")
    found = _files(path)
    known = [file for file in found if kind(file)]
    unknown = collections.Counter(file.suffix or "without a suffix" for file in found if not kind(file))
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unknown.items()))
    require(bool(known), f"{path} holds no {', '.join(KINDS)} file" + (f", only {counts}" if counts else ""))
    if unknown:
        logger.warning("%s: ignored %d files of other kinds: %s", path, unknown.total(), counts)
    sources: dict[str, list[Path]] = {}
    for file in known:
        sources.setdefault(_source_name(file, path), []).append(file)
    return dict(sorted(sources.items()))


def state(path: Path) -> list[tuple[str, int, int]]:
    """(path, size, time of change) of every file to read, which stand for what the files hold."""
    stats = [(str(file), file.stat()) for file in _files(path) if kind(file)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def kind(path: Path) -> str | None:
    """Which of `KINDS` a file is, by its name."""
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def _source_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).parts if root.is_dir() else (file.name,)
    name = parts[0] if len(parts) > 1 else file.name[: -len(kind(file) or "")]
    return re.sub(r"\W", "_", name) or "text"


def read_texts(path: Path, text_field: str) -> Iterator[str]:
    """The texts of one file; `UserError` naming the place where it is damaged."""
    if kind(path) == ".txt":
        yield from _read_txt(path)
    elif kind(path) == ".parquet":
        yield from _read_parquet(path, text_field)
    else:
        yield from _read_jsonl(path, text_field)


def _read_txt(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            block = b"".join(lines)
            text = _decode(block, path, offset)
            yield from split_long(text.removeprefix(BYTE_ORDER_MARK) if offset == 0 else text)
            offset += len(block)


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise UserError(
            f"{path}: invalid UTF-8 at byte offset {offset + error.start} (0x{byte:02x}): convert the file to UTF-8"
        ) from None


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(jsonl_lines(path), start=1):
        if line.strip():
            yield _text_of(_decode(line, path, offset).removeprefix(BYTE_ORDER_MARK), f"{path}:{number}", text_field)
        offset += len(line)


def jsonl_lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain or gzipped file; `UserError` where it is cut off."""
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        try:
            lines: Iterable[bytes] = file
            yield from lines
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is truncated or not gzip: {error}") from None


def _text_of(line: str, where: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    require(isinstance(record, dict), f"{where}: a JSON object is wanted, not {type(record).__name__}")
    if text_field not in record:
        raise UserError(f"{where}: no field {text_field!r} among {', '.join(record)}; set CorpusConfig.text_field")
    return _checked(record[text_field], where, text_field)


def _checked(text: object, where: str, text_field: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a lone surrogate at character {error.start} has no UTF-8 form") from None
    return text


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'llm-jax[data]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(
                    f"{path}: no column {text_field!r} among {', '.join(names)}; set CorpusConfig.text_field"
                )
            row = 0
            for batch in file.iter_batches(columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield _checked(text, f"{path}: row {row}", text_field)
                    row += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from None
