"""The first step of the corpus factory: every document of a corpus, as it is, in Parquet files.

Parts of the corpus are read by several processes, each of which writes what it finds; here the documents get their
places in the order of the parts, which does not depend on who read what, and when.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from llm_jax.config import CorpusConfig
from llm_jax.data import files, sources
from llm_jax.data.children import ChildError, Children
from llm_jax.data.documents import BYTES, COLUMNS, DOCUMENT_ID, document_id
from llm_jax.data.faults import Faults, Place
from llm_jax.data.sources import Source, SourceError
from llm_jax.errors import UserError, require

logger = logging.getLogger(__name__)

PART_BYTES = 1 << 24  # of the files that one process reads at a time
BATCH_BYTES = 1 << 20  # of text in memory before it is written
GROUP_BYTES = 1 << 23  # of text in a row group
FILE_BYTES = 1 << 26  # of text in a file
PARALLEL_BYTES = 1 << 24  # a smaller corpus is read before another process has begun
KINDS = {BYTES: pa.int64()}  # of columns that are no strings
SCHEMA = pa.schema([(name, KINDS.get(name, pa.string())) for name in (*COLUMNS, DOCUMENT_ID, BYTES)])
READ_SCHEMA = pa.schema([SCHEMA.field(name) for name in ("format", "origin", "text", DOCUMENT_ID, BYTES)])


class Found(NamedTuple):
    """What a part of a corpus holds."""

    documents: int
    text_bytes: int
    places: list[Place]  # of faults
    error: SourceError | None  # why nothing was read


def read(config: CorpusConfig, folder: Path, compression: str = "none") -> dict[str, Any]:
    """Write all documents of a corpus, duplicates included, to `folder/part-*.parquet`.

    The columns are those of SCHEMA; a document's id is SOURCE/POSITION, its position among the source's.

    Returns:
        Facts for a report: files, bytes and documents of every source, and what was repaired and left out.

    Raises `UserError` for a path or source that does not exist, and where there is nothing that can be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("part-*.parquet"):
        leftover.unlink()
    unnumbered = folder / "unnumbered"
    shutil.rmtree(unnumbered, ignore_errors=True)
    unnumbered.mkdir()
    parts = sources.parts(config, PART_BYTES)
    faults = Faults()
    by_source: dict[str, dict[str, Any]] = {}
    left_out = {}
    with _Writer(folder, compression) as writer:
        for part, path, found in _read_parts(parts, unnumbered, config.workers):
            faults.extend(found.places)
            if found.error:
                sources.warn_left_out(part.name, found.error)
                left_out[part.name] = str(found.error)
                continue
            row = by_source.setdefault(part.name, {"language": part.language, "documents": 0, "text_bytes": 0})
            writer.add(path, part, row["documents"])
            row["documents"] += found.documents
            row["text_bytes"] += found.text_bytes
    shutil.rmtree(unnumbered)
    faults.warn()
    require(any(row["documents"] for row in by_source.values()), sources.nothing_found(config))
    return _files_facts(config) | {"sources": by_source, "sources_left_out": left_out} | faults.facts()


def _files_facts(config: CorpusConfig) -> dict[str, Any]:
    if not config.path:
        return {}
    path = Path(config.path).expanduser()
    sizes = [size for _, size, _ in files.state(path)]
    return {"files": len(sizes), "bytes": sum(sizes), "files_of_other_kinds": files.ignored(path)}


def _read_parts(parts: Sequence[Source], folder: Path, workers: int) -> Iterator[tuple[Source, Path, Found]]:
    """What was found in each part, in order, and the file that it is in."""
    paths = [folder / f"{index:06d}.arrow" for index in range(len(parts))]
    workers = min(workers or os.cpu_count() or 1, len(parts))
    if workers == 1 or sum(part.size for part in parts) < PARALLEL_BYTES:
        yield from ((part, path, read_part(part, path)) for part, path in zip(parts, paths))
        return
    with Children(read_part, workers) as children:
        for part, path, call in zip(parts, paths, children.map(zip(parts, paths))):
            try:
                yield part, path, call.result()
            except ChildError as error:
                raise UserError(f"{part.name} was not read to its end: {error} (out of memory?)") from None


def read_part(part: Source, path: Path) -> Found:
    """Write the documents of a part as an Arrow stream with the columns of `READ_SCHEMA`."""
    faults = Faults()
    try:
        raws = part.read(faults)
    except SourceError as error:
        return Found(0, 0, [], error)
    documents = text_bytes = waiting = 0
    columns: tuple[list[Any], ...] = ([], [], [], [], [])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, READ_SCHEMA) as stream:
        for raw in raws:
            size = len(raw.text.encode())
            documents, text_bytes, waiting = documents + 1, text_bytes + size, waiting + size
            for column, value in zip(columns, (raw.format, raw.origin, raw.text, document_id(raw.text), size)):
                column.append(value)
            if waiting >= BATCH_BYTES:
                stream.write_batch(pa.record_batch(list(columns), schema=READ_SCHEMA))
                columns, waiting = ([], [], [], [], []), 0
        stream.write_batch(pa.record_batch(list(columns), schema=READ_SCHEMA))
    return Found(documents, text_bytes, faults.places(), None)


def identified(documents: pa.Table) -> pa.Table:
    """Documents with `COLUMNS`, with DOCUMENT_ID and BYTES as if they had been read so."""
    texts = documents["text"].to_pylist()
    added = [[document_id(text) for text in texts], [len(text.encode()) for text in texts]]
    columns = [*(documents[name] for name in COLUMNS), *added]
    return pa.table(dict(zip(SCHEMA.names, columns))).cast(SCHEMA)


class _Writer:
    """Numbers the documents of parts and writes them to files of about `FILE_BYTES`."""

    def __init__(self, folder: Path, compression: str) -> None:
        self._folder = folder
        self._compression = compression
        self._files = 0
        self._file: parquet.ParquetWriter | None = None
        self._file_bytes = 0
        self._batches: list[pa.RecordBatch] = []
        self._batches_bytes = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._write()
        self._close()

    def add(self, path: Path, part: Source, position: int) -> None:
        """Move the documents of a part from `path`; `position` is the first one's."""
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                count = batch.num_rows
                ids = pa.array([f"{part.name}/{i:08d}" for i in range(position, position + count)], pa.string())
                names = [pa.array([value] * count, pa.string()) for value in (part.name, part.language)]
                self._append(pa.record_batch([ids, *names, *batch.columns], schema=SCHEMA))
                position += count
        path.unlink()

    def _append(self, batch: pa.RecordBatch) -> None:
        self._batches.append(batch)
        self._batches_bytes += batch.nbytes
        if self._batches_bytes >= GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        """Write what waits as one row group."""
        table = pa.Table.from_batches(self._batches, SCHEMA)
        if self._file is None and len(table):
            path = self._folder / f"part-{self._files:05d}.parquet"
            repeated = ["source", "language", "format", "origin"]
            self._file = parquet.ParquetWriter(path, SCHEMA, compression=self._compression, use_dictionary=repeated)
        if self._file and len(table):
            self._file.write_table(table)
        self._file_bytes += self._batches_bytes
        self._batches, self._batches_bytes = [], 0
        if self._file_bytes >= FILE_BYTES:
            self._close()

    def _close(self) -> None:
        if self._file:
            self._file.close()
            self._files += 1
        self._file, self._file_bytes = None, 0
