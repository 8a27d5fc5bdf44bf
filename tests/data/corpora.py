"""A small corpus for the factory, stages that stand in for real ones, and what a folder of documents holds."""

import ast
import dataclasses
import itertools
import os
import signal
from pathlib import Path

import daft
import pyarrow as pa
import pyarrow.parquet as pq
from daft import col, lit
from daft import functions as F

from llm_jax.data import planting, readers, reading, sources
from llm_jax.data.stages import COLUMNS, Result
from tests.data import made_up

NODES = (ast.Module, ast.ClassDef, ast.FunctionDef)


def documents(count=40):
    """Rows of COLUMNS: two sources of German and English, long and short."""
    rows = []
    for i in range(count):
        source, language = (("letters", "en"), ("briefe", "de"))[i % 3 == 0]
        text = f"{'Grüße' if language == 'de' else 'letter'} number {i} " * (i + 1)
        rows.append((f"{source}/{i:08d}", source, language, "text", f"{source}.txt", text))
    return rows


def every_document(config):
    """Every distinct document of a corpus, source after source."""
    return (document for source in sources.corpus(config) for _, document in source.documents())


def library(count):
    """Rows of COLUMNS: modules of Python's library as code, their docstrings as English, and copies of some."""
    modules = list(itertools.islice(readers.standard_library(), count))
    rows = [(f"code/{i:08d}", "code", "code", "code", "o", text) for i, text in enumerate([*modules, *modules[::9]])]
    found = [
        ast.get_docstring(node) for text in modules for node in ast.walk(ast.parse(text)) if isinstance(node, NODES)
    ]
    prose = [text for text in found if text and len(text) > 400]
    prose += [text.replace("the", "a", 1) for text in prose[::5]]
    return rows + [(f"prose/{i:08d}", "prose", "en", "text", "o", text) for i, text in enumerate(prose)]


def with_faults():
    """Rows of COLUMNS: the library, pages, and made-up texts, with something to do for every stage."""
    stories = made_up.documents(160)
    page = "<html><head><title>A page</title></head><body><nav>Home</nav><article><p>{}</p></article></body></html>"
    pages = [(f"web/{i:08d}", "web", "und", "html", "o", page.format(row[5])) for i, row in enumerate(stories[-9:])]
    rows = [*library(80), *pages, *stories[:-9]]
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)})
    material = planting.Material({"plants": made_up.items(20)}, [], [])
    planted, _ = planting.plant(table, planting.PlantConfig(2, (0.01, 0.05, 0.1), 300), material, shared_by=4)
    return list(zip(*(planted[name].to_pylist() for name in COLUMNS)))


def reader(rows, files=1):
    """Stands in for `reading.read`: writes the rows as so many Parquet files, and counts its calls in `.calls`."""

    def read(config, folder, compression):
        read.calls += 1
        for part in range(files):
            table = pa.table({name: [row[i] for row in rows[part::files]] for i, name in enumerate(COLUMNS)})
            pq.write_table(reading.identified(table), folder / f"part-{part}.parquet", compression=compression)
        return {"files": files}

    read.calls = 0
    return read


@dataclasses.dataclass(frozen=True)
class Short:
    """Drops texts of fewer than `limit` bytes and scores each by its length."""

    limit: int = 100
    name: str = "heuristics"

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        log(self)
        size = F.length_bytes(col("text"))
        documents = documents.with_column("size", size.cast(daft.DataType.float32()))
        short = size < self.limit
        documents = documents.with_column("because", F.when(short, size.cast(str)).otherwise(lit(None)))
        reason = F.when(size < self.limit // 2, lit("very short")).when(short, lit("short")).otherwise(lit(None))
        return Result(documents.with_column("dropped", reason), {"limit": self.limit})


@dataclasses.dataclass(frozen=True)
class Shout:
    """Changes every text and drops none."""

    mark: str = "!"
    name: str = "lines"

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        log(self)
        documents = documents.with_column("text", F.upper(col("text")) + lit(self.mark))
        return Result(documents.with_column("dropped", lit(None)), {})


@dataclasses.dataclass(frozen=True)
class Dies:
    """As a process that is killed in the middle, unless the file is there."""

    unless: str = ""
    name: str = "fuzzy"

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        if not Path(self.unless).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        log(self)
        return Result(documents.with_column("dropped", lit(None)), {})


applied: list[str] = []


def log(stage):
    applied.append(stage.name)


def held(files):
    """The rows of Parquet files as a set, without the engine's own columns."""
    rows = pa.concat_tables([pq.read_table(path) for path in files], promote_options="permissive").to_pylist()
    own = ("dropped", "because", "bytes")
    return {tuple(sorted((name, str(value)) for name, value in row.items() if name not in own)) for row in rows}
