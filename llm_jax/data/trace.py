"""From a training token back to the document that it is from.

A record of a dataset has its document's hash, and the dataset's table says where that document was read and what the
stages found of it. Which record a token of a batch is from follows from the run's config alone, as the batch does.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.dataset
import pyarrow.parquet as pq

from llm_jax.config import DataConfig
from llm_jax.data import mixture
from llm_jax.data.documents import DOCUMENT_ID, ID
from llm_jax.data.loader import packed_sources
from llm_jax.data.records import SPLITS, TokenReader, read_summary
from llm_jax.data.stages.mixture import POOL
from llm_jax.data.stored import TABLE
from llm_jax.errors import require


class Place(NamedTuple):
    """A token of a dataset."""

    source: str  # of the dataset
    split: str
    record: int  # which document of the source's split, in stored order
    token: int  # which of the record's tokens, bos and eos counted


def find(dataset: Path, document: str) -> list[dict[str, Any]]:
    """The rows of the dataset's table for a document's hash or id; texts that were equal as read share a hash."""
    field = pyarrow.dataset.field
    return _rows(dataset, (field(DOCUMENT_ID) == document) | (field(ID) == document))


def document_of(dataset: Path, place: Place) -> dict[str, Any]:
    """The row of the dataset's table for the document that a record is made of.

    Raises `UserError` for a place that there is not, and for a dataset without a table.
    """
    summary = read_summary(dataset)
    known = place.source in summary.sources and place.split in SPLITS
    require(known, f"{dataset} has no {place.split}/{place.source}; there are {', '.join(summary.sources)}")
    reader = TokenReader(dataset, place.source, place.split, summary)
    count = len(reader.lengths)
    require(0 <= place.record < count, f"{place.split}/{place.source} has {count} records, from 0: no {place.record}")
    field = pyarrow.dataset.field
    digest = reader.document_id(place.record)
    (row,) = _rows(dataset, (field(DOCUMENT_ID) == digest) & (field(POOL) == place.source))[:1]
    return row


def place_in_batch(config: DataConfig, step: int, row: int, position: int) -> Place:
    """Where the token at [row, position] of the inputs of a run's global batch is from.

    Raises `UserError` for a row or position outside of the batch, and for padding.
    """
    require(step >= 0, f"step {step} is below 0")
    require(0 <= row < config.batch_size, f"a batch has {config.batch_size} rows, from 0: no {row}")
    sources, shares = packed_sources(config)
    drawn = mixture.mix({name: _Indices(name, source.windows) for name, source in sources.items()}, shares)
    source, index = drawn[step * config.batch_size + row]
    return Place(source, "train", *sources[source].locate(index, position))


class _Indices:
    """Stands for a source's windows: each is the source's name and its number."""

    def __init__(self, name: str, windows: int):
        self._name, self.windows = name, windows

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self._name, index


def _rows(dataset: Path, chosen: pyarrow.dataset.Expression) -> list[dict[str, Any]]:
    path = dataset / TABLE
    require(path.is_file(), f"{dataset} has no {TABLE}: experiments.prepare_data writes one")
    return pq.read_table(path, filters=chosen).to_pylist()
