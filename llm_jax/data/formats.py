"""From the user's own files to documents: one function for each kind of file.

What is damaged or holds no text is left out and counted; what can be repaired is repaired and counted. Memory does not
grow with a file, nor with what is in it, beyond `RECORD_BYTES`.
"""

import contextlib
import json
import re
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from llm_jax.config import CorpusConfig
from llm_jax.data import faults as faults_lib
from llm_jax.data import files
from llm_jax.data.documents import HTML, TEXT, split_long
from llm_jax.data.encodings import clean, decode
from llm_jax.data.entities import without_residue
from llm_jax.data.faults import Faults
from llm_jax.errors import UserError

RECORD_BYTES = 1 << 24  # a line, row, page or cell that is longer is left out
BLOCK_BYTES = 1 << 23  # of a .txt file decoded at once
PARQUET_ROWS = 64  # decoded at once
HEAD_BYTES = 4096  # of a page, where it says what its encoding is
CHARSET = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
PAGE_TYPES = {"text/html": HTML, "application/xhtml+xml": HTML, "text/plain": TEXT}
PAGE_RECORDS = ("response", "resource", "conversion")
JSON = json.JSONDecoder(strict=False)  # null bytes inside of a text are not the end of its record


class Raw(NamedTuple):
    """A document before anything is done to it."""

    text: str
    format: str
    file: str
    place: str  # in the file, if it holds several documents
    url: str = ""

    @property
    def origin(self) -> str:
        """Where it is from, for people."""
        return self.url or (f"{self.file}: {self.place}" if self.place else self.file)


Read = Callable[[Path, str, CorpusConfig, Faults], Iterator[Raw]]


def read_files(root: Path, paths: Sequence[Path], config: CorpusConfig, faults: Faults) -> Iterator[Raw]:
    """The documents of files, which are named after their place in `root`."""
    for path in paths:
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        yield from finished(_read_file(path, name, config, faults), faults)


def finished(texts: Iterable[Raw], faults: Faults) -> Iterator[Raw]:
    """Texts with a UTF-8 form, those that are no pages cut to document size, blank ones left out."""
    for raw in texts:
        # What a reference becomes may need cleaning, too.
        text, references = without_residue(raw.text) if raw.format == TEXT else (raw.text, 0)
        text, *repaired = clean(text)
        kinds = (faults_lib.REFERENCES, faults_lib.NULLS, faults_lib.MARKS, faults_lib.SURROGATES)
        for kind, times in zip(kinds, (references, *repaired), strict=True):
            if times:
                faults.add(kind, raw.file, raw.place or "its text", times)
        if not text or text.isspace():
            faults.add(faults_lib.BLANK, raw.file, raw.place or "its text")
        elif raw.format == HTML:
            yield raw._replace(text=text)
        else:
            yield from (raw._replace(text=part) for part in split_long(text) if not part.isspace())


def _read_file(path: Path, name: str, config: CorpusConfig, faults: Faults) -> Iterator[Raw]:
    place = ""
    try:
        for raw in READERS[files.kind(path) or ""](path, name, config, faults):
            place = raw.place
            yield raw
    except _damage() as error:
        kind = faults_lib.DAMAGED if place else faults_lib.UNREADABLE
        after = f"after {place}: " if place else ""
        faults.add(kind, name, f"{after}{' '.join(str(error).split())[:200] or type(error).__name__}")


def _damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    found: list[type[Exception]] = [OSError, EOFError, UnicodeError, zlib.error, sqlite3.Error]
    with contextlib.suppress(ImportError):
        from pyarrow import ArrowInvalid

        found.append(ArrowInvalid)
    with contextlib.suppress(ImportError):
        from warcio.exceptions import ArchiveLoadFailed

        found.append(ArchiveLoadFailed)
    return tuple(found)


def _decoded(data: bytes, name: str, place: str, faults: Faults, declared: str = "") -> str | None:
    """The text of bytes, with what was repaired counted; None, and counted, if they hold none."""
    found = decode(data, declared)
    if found is None:
        faults.add(faults_lib.NO_TEXT, name, place)
        return None
    if found.encoding != "utf-8":
        faults.add(faults_lib.ENCODING, name, f"{place}, {found.encoding}")
    if found.replaced:
        faults.add(faults_lib.CHARACTERS, name, place, found.replaced)
    return found.text


@contextlib.contextmanager
def _opened(path: Path, name: str, faults: Faults) -> Iterator[IO[bytes]]:
    """A file of text, as UTF-8 or what is like it."""
    with files.open_bytes(path) as packed:
        file, encoding = files.narrow(packed)
        if encoding:
            faults.add(faults_lib.ENCODING, name, f"its beginning, {encoding}")
        yield file


def _read_txt(path: Path, name: str, config: CorpusConfig, faults: Faults) -> Iterator[Raw]:
    with _opened(path, name, faults) as file:
        offset, rest = 0, b""
        while data := file.read(BLOCK_BYTES):
            block = rest + data
            end = _last_border(block) if len(data) == BLOCK_BYTES else len(block)
            yield from _block(block[:end], name, offset, faults)
            offset, rest = offset + end, block[end:]
        if rest:
            yield from _block(rest, name, offset, faults)


def _block(data: bytes, name: str, offset: int, faults: Faults) -> Iterator[Raw]:
    text = _decoded(data, name, f"byte {offset}", faults)
    if text is not None:
        yield Raw(text, TEXT, name, f"byte {offset}" if offset else "")


def _last_border(data: bytes) -> int:
    """Where to cut bytes of which more follow: behind a line, or a word, or before the last character in UTF-8."""
    end = data.rfind(b"\n") + 1 or data.rfind(b" ") + 1
    if end:
        return end
    return next((i for i in range(len(data) - 1, len(data) - 5, -1) if data[i] & 0xC0 != 0x80), len(data))


def _read_jsonl(path: Path, name: str, config: CorpusConfig, faults: Faults) -> Iterator[Raw]:
    with _opened(path, name, faults) as file:
        for number, line in enumerate(files.lines(file, RECORD_BYTES), start=1):
            place = f"line {number}"
            if line is None:
                faults.add(faults_lib.TOO_LONG, name, place)
            elif not line.isspace():
                text = _field_of(line, name, place, config.text_field, faults)
                if text is not None:
                    yield Raw(text, TEXT, name, place)


def _field_of(line: bytes, name: str, place: str, field: str, faults: Faults) -> str | None:
    decoded = _decoded(line, name, place, faults)
    if decoded is None:
        return None
    try:
        record = JSON.decode(decoded)
    except (ValueError, RecursionError) as error:
        faults.add(faults_lib.INVALID, name, f"{place}, {error}")
        return None
    if not isinstance(record, dict):
        faults.add(faults_lib.NO_OBJECT, name, f"{place}, {type(record).__name__}")
    elif field not in record:
        faults.add(faults_lib.NO_FIELD, name, f"{place}, {_no_field(field, record)}")
    else:
        return _text(record[field], name, place, faults)
    return None


def _no_field(field: str, names: Iterable[str]) -> str:
    listed = ", ".join(map(repr, list(names)[:10])) or "none"
    return f"{field!r} is not among {listed} (CorpusConfig.text_field)"


def _text(value: Any, name: str, place: str, faults: Faults) -> str | None:
    """The text of a field or cell; None, and counted, if it holds none, or too much."""
    if isinstance(value, bytes) and len(value) <= RECORD_BYTES:
        return _decoded(value, name, place, faults)
    if not isinstance(value, str | bytes):
        faults.add(faults_lib.NOT_TEXT, name, f"{place}, {type(value).__name__}")
        return None
    if len(value) > RECORD_BYTES:
        faults.add(faults_lib.TOO_LONG, name, place)
        return None
    return value if isinstance(value, str) else None


def _read_html(path: Path, name: str, config: CorpusConfig, faults: Faults) -> Iterator[Raw]:
    with _opened(path, name, faults) as file:
        data = file.read(RECORD_BYTES + 1)
    text = _page(data, name, "its text", "", faults)
    if text is not None:
        yield Raw(text, HTML, name, "")


def _page(data: bytes, name: str, place: str, declared: str, faults: Faults) -> str | None:
    """The text of a page, whose encoding is declared outside of it or in it."""
    if len(data) > RECORD_BYTES:
        faults.add(faults_lib.TOO_LONG, name, place)
        return None
    found = CHARSET.search(data[:HEAD_BYTES])
    return _decoded(data, name, place, faults, declared or (found[1].decode("ascii", "ignore") if found else ""))


def _read_warc(path: Path, name: str, config: CorpusConfig, faults: Faults) -> Iterator[Raw]:
    try:
        from warcio.archiveiterator import ArchiveIterator
    except ImportError:
        raise UserError(f"{path}: reading WARC needs warcio: pip install 'llm-jax[data]'") from None
    with files.open_bytes(path) as file:  # unpacked here, because a whole file may be one gzip member
        stream = _Stream(file)
        for number, record in enumerate(ArchiveIterator(stream), start=1):
            if record.rec_type in PAGE_RECORDS:
                yield from _record(record, name, f"record {number}", faults)
        if stream.error:
            raise stream.error


class _Stream:
    """A file as warcio reads it, which takes an error for the end; nothing that comes before one is lost."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, size: int) -> bytes:
        try:
            return self._file.read1(size)
        except (OSError, EOFError, zlib.error) as error:
            self.error = error
            return b""


def _record(record: Any, name: str, place: str, faults: Faults) -> Iterator[Raw]:
    """The page of a record, if there is one: an answer with status 200 that is HTML or plain text."""
    headers = record.http_headers
    status = headers.get_statuscode() if headers else "200"
    content_type = (headers or record.rec_headers).get_header("Content-Type") or ""
    page_type = PAGE_TYPES.get(content_type.partition(";")[0].strip().lower())
    if page_type is None or status != "200":
        faults.add(faults_lib.NO_PAGE, name, f"{place}, {content_type or 'no type'}, status {status}")
        return
    data = record.content_stream().read(RECORD_BYTES + 1)
    missing = record.raw_stream.limit
    if len(data) <= RECORD_BYTES and missing > 0 and not record.raw_stream.read(1):
        raise EOFError(f"{place} ends {missing} bytes too early")
    declared = CHARSET.search(content_type.encode())
    text = _page(data, name, place, declared[1].decode() if declared else "", faults)
    if text is not None:
        url = record.rec_headers.get_header("WARC-Target-URI") or ""
        yield Raw(text, page_type, name, place, url)


def _read_parquet(path: Path, name: str, config: CorpusConfig, faults: Faults) -> Iterator[Raw]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'llm-jax[data]'") from None
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        if config.text_field not in file.schema_arrow.names:
            faults.add(faults_lib.NO_FIELD, name, _no_field(config.text_field, file.schema_arrow.names))
            return
        row = 0
        for group in range(file.num_row_groups):
            end = row + file.metadata.row_group(group).num_rows
            try:
                for value in _values(file, group, config.text_field):
                    text = _text(value, name, f"row {row}", faults)
                    if text is not None:
                        yield Raw(text, TEXT, name, f"row {row}")
                    row += 1
            except _damage() as error:  # the next group may be whole
                faults.add(faults_lib.DAMAGED, name, f"row {row}: {str(error).splitlines()[0]}", end - row)
                row = end


def _values(file: Any, group: int, field: str) -> Iterator[Any]:
    import pyarrow

    for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field]):
        column = batch.column(0)
        is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        # As bytes, because Arrow does not look whether a text is one.
        yield from (column.cast(pyarrow.large_binary()) if is_text else column).to_pylist()


def _read_sqlite(path: Path, name: str, config: CorpusConfig, faults: Faults) -> Iterator[Raw]:
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
        database.text_factory = bytes
        tables = _tables(database)
        chosen = [table for table, columns in tables.items() if config.text_field in columns]
        if config.table in chosen:
            chosen = [config.table]
        if len(chosen) != 1 or config.table not in ("", chosen[0]):
            faults.add(faults_lib.NO_FIELD, name, _which_table(config, tables, chosen))
            return
        table, field = (
            f'"{identifier.replace(chr(34), chr(34) * 2)}"' for identifier in (chosen[0], config.text_field)
        )
        # In the order of the rows, which an index would change.
        query = f"SELECT length({field}) > ?1, iif(length({field}) > ?1, NULL, {field}) FROM {table} NOT INDEXED"
        for row, (is_too_long, value) in enumerate(database.execute(query, (RECORD_BYTES,))):
            if is_too_long:
                faults.add(faults_lib.TOO_LONG, name, f"row {row}")
                continue
            text = _text(value, name, f"row {row}", faults)
            if text is not None:
                yield Raw(text, TEXT, name, f"row {row}")


def _tables(database: sqlite3.Connection) -> dict[str, list[str]]:
    """The columns of every table of the user's."""
    names = database.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name"
    )
    query = "SELECT name FROM pragma_table_info(?)"
    return {
        name.decode(): [column.decode() for (column,) in database.execute(query, (name.decode(),))]
        for (name,) in names.fetchall()
    }


def _which_table(config: CorpusConfig, tables: dict[str, list[str]], chosen: list[str]) -> str:
    if len(chosen) > 1 and not config.table:
        return f"{config.text_field!r} is in the tables {', '.join(chosen)}: choose one with CorpusConfig.table"
    listed = "; ".join(f"{table}: {', '.join(columns)}" for table, columns in tables.items())
    table = f"a table {config.table!r}" if config.table else "any table"
    return f"no {config.text_field!r} in {table} of {listed or 'none'} (CorpusConfig.table, CorpusConfig.text_field)"


READERS: dict[str, Read] = {
    ".txt": _read_txt,
    ".parquet": _read_parquet,
    **dict.fromkeys(files.JSONL_KINDS, _read_jsonl),
    **dict.fromkeys(files.HTML_KINDS, _read_html),
    **dict.fromkeys(files.WARC_KINDS, _read_warc),
    **dict.fromkeys(files.SQLITE_KINDS, _read_sqlite),
}
