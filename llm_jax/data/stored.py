"""The documents that the factory keeps, as the sources that a dataset is made of.

They are laid out by pool first (see `stages.mixture`), because a dataset is written source by source. Within a pool
they come in the order of their ids, whatever order the stages left them in, and few of them are in memory at a time.
"""

import dataclasses
import functools
import itertools
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
from daft import col

from llm_jax.data import counts, factory, parquet
from llm_jax.data.documents import DOCUMENT_ID, Census, Document, holdout_threshold, split_long
from llm_jax.data.records import SourceSummary, Summary
from llm_jax.data.stages import ID
from llm_jax.data.stages.mixture import POOL, MixtureConfig, Row, plan
from llm_jax.files import write_json

TABLE = "documents.parquet"  # in a dataset: every document but for its text
PLAN = "mixture.json"  # in a dataset: how often each pool is drawn
BLOCK_BYTES = 1 << 26  # of text sorted in memory at once


class StoredSource:
    """A pool's documents in Parquet files."""

    def __init__(self, name: str, files: Sequence[Path], repeats: bool = False):
        self.name = name
        self._files = [str(path) for path in files]
        self._repeats = repeats

    @functools.cached_property
    def _index(self) -> pa.Table:
        """Everything but the texts, in the order of the ids."""
        return pq.read_table(self._files, columns=[ID, "language", DOCUMENT_ID, counts.BYTES]).sort_by(ID)

    @property
    def language(self) -> str:
        """That of most of its text."""
        sums = self._index.group_by("language").aggregate([(counts.BYTES, "sum")])
        return sums.sort_by([(f"{counts.BYTES}_sum", "descending"), ("language", "ascending")])["language"][0].as_py()

    def census(self, holdout_fraction: float) -> Census:
        """The documents' number and size; those are held out whose text was so as it was read."""
        hashes = {int(digest, 16) for digest in self._index[DOCUMENT_ID].to_pylist()}
        size = pc.sum(self._index[counts.BYTES]).as_py()
        repeated = len(self._index) - len(hashes)
        return Census(len(hashes), repeated, size, holdout_threshold(hashes, holdout_fraction))

    def documents(self) -> Iterator[tuple[int, Document]]:
        """(hash of the text as it was read, document) of each; of equal hashes the first, unless repeats are wanted.

        Long ones come in parts.
        """
        language = self.language
        seen: set[int] = set()
        for low, high in self._blocks():
            chosen = (pyarrow.dataset.field(ID) >= low) & (pyarrow.dataset.field(ID) <= high)
            table = pq.read_table(self._files, columns=[ID, DOCUMENT_ID, "text"], filters=chosen).sort_by(ID)
            for digest, text in zip(table[DOCUMENT_ID].to_pylist(), table["text"].to_pylist()):
                number = int(digest, 16)
                if (self._repeats or number not in seen) and text.strip():
                    yield from ((number, Document(self.name, language, part)) for part in split_long(text))
                seen.add(number)

    def _blocks(self) -> Iterator[tuple[str, str]]:
        """The first and the last id of runs of documents of about BLOCK_BYTES."""
        ids = self._index[ID]
        block = np.cumsum(self._index[counts.BYTES].to_numpy()) // BLOCK_BYTES
        starts = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(ids)]
        for start, stop in itertools.pairwise(starts):
            yield ids[start].as_py(), ids[stop - 1].as_py()


@dataclasses.dataclass(frozen=True)
class StoredCorpus:
    """What the factory keeps, for `pipeline.prepare`."""

    corpus: factory.Corpus
    mixture: MixtureConfig
    repeats: bool = False  # equal texts stay in the dataset, if no stage has dropped them

    def facts(self) -> list[object]:
        """What decides the documents, and the mixture's settings where no stage has them."""
        return [self.corpus.fingerprint, dataclasses.asdict(self.mixture), *(["repeats"] if self.repeats else [])]

    def sources(self, scratch: Path) -> list[StoredSource]:
        """The pools, in the order of their names."""
        layout = scratch / "documents"
        if not layout.exists():
            partial = layout.with_suffix(".partial")
            documents = self._documents().select(POOL, ID, "language", DOCUMENT_ID, counts.BYTES, "text")
            shutil.rmtree(partial, ignore_errors=True)
            parquet.write(documents, partial, partition_cols=[POOL])
            partial.replace(layout)
        folders = sorted(layout.iterdir())
        names = [urllib.parse.unquote(folder.name.removeprefix(f"{POOL}=")) for folder in folders]
        return [StoredSource(name, parquet.files(folder), self.repeats) for name, folder in zip(names, folders)]

    def _documents(self) -> daft.DataFrame:
        documents = parquet.scan(self.corpus.documents)
        return documents if POOL in documents.column_names else documents.with_column(POOL, col("source"))

    def finish(self, folder: Path, sources: Mapping[str, SourceSummary]) -> Mapping[str, float]:
        """Write TABLE and PLAN; each pool's share, unless every factor is 1 and no limit binds."""
        hidden = ("text", factory.DROPPED, factory.BECAUSE)
        table = self._documents()
        columns = [name for name in table.column_names if name not in hidden]
        pq.write_table(
            table.select(*columns).to_arrow().sort_by([(POOL, "ascending"), (ID, "ascending")]), folder / TABLE
        )
        rows = self.plan(sources)
        write_json(folder / PLAN, [row._asdict() for row in rows])
        plain = len({round(row.epochs, 9) for row in rows}) == 1
        return {} if plain else {row.pool: row.share for row in rows}

    def plan(self, sources: Mapping[str, SourceSummary]) -> list[Row]:
        """How often each pool of the dataset is drawn."""
        stages = {report["name"]: report for report in self.corpus.reports}
        factors = stages["mixture"]["facts"]["factors"] if "mixture" in stages else {}
        tokens = {name: source.train.tokens for name, source in sources.items()}
        return plan(tokens, factors, self.mixture.token_budget, self.mixture.max_epochs)

    def missing(self, summary: Summary) -> list[str]:
        """Sources that could not be read."""
        return sorted(self.corpus.reports[0]["facts"].get("sources_left_out", []))
