"""Batches for a training run: the batch of a step is a pure function of the config, the step and the process.

Sequence g of the run is the g-th of the mixture, and the global batch of step s is sequences [s*B, (s+1)*B). Process p
of P takes a contiguous P-th of it, so any number of processes sees the same global batches, and a run can start at
any step.

Shapes: B sequences of a global batch, T tokens of a sequence.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from llm_jax.config import DataConfig, unknown_key
from llm_jax.data import mixture
from llm_jax.data.batch import Batch
from llm_jax.data.packing import PackedSource
from llm_jax.data.records import SourceSummary, Summary, TokenReader, read_summary
from llm_jax.errors import UserError, require

READ_THREADS = 2  # batches read at the same time, to hide the latency of storage


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a run wants to know of its dataset before it starts."""

    vocab_size: int
    tokenizer: Path  # its main file, inside the dataset's folder
    tokenizer_sha256: str
    fingerprint: str  # of the corpus and the tokenizer it was made from
    sources: Mapping[str, SourceSummary]  # documents, text bytes and tokens of train and heldout
    weights: Mapping[str, float]  # each source's share of the sequences; they sum to 1

    @property
    def tokens(self) -> int:
        """Training tokens of all sources."""
        return sum(source.train.tokens for source in self.sources.values())

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the training texts of all sources."""
        return sum(source.train.text_bytes for source in self.sources.values())


def describe(config: DataConfig) -> DatasetInfo:
    """Sizes, vocabulary and tokenizer of the dataset; `UserError` where it is missing, damaged or misconfigured."""
    folder, summary = _open(config)
    shares = mixture.fractions(summary, config.weights)
    tokenizer = folder / summary.tokenizer
    return DatasetInfo(
        summary.vocab_size, tokenizer, summary.tokenizer_sha256, summary.fingerprint, summary.sources, shares
    )


def train_batches(
    config: DataConfig, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """This process's rows, [B/process_count,T], of the global batches from `start_step` on, without end.

    Batches are prepared ahead in background threads. Raises `UserError` for a missing or damaged dataset, weights of
    unknown sources, a batch size that the processes do not divide, or a dataset shorter than one sequence.
    """
    sources, shares = packed_sources(config)
    return batches_of_process(
        mixture.mix(sources, shares),
        config.batch_size,
        start_step=start_step,
        process_index=process_index,
        process_count=process_count,
        prefetch=config.prefetch,
    )


def packed_sources(config: DataConfig) -> tuple[dict[str, PackedSource], dict[str, float]]:
    """The training windows of each source that is drawn from, and its share of the sequences.

    Raises `UserError` as `train_batches` does.
    """
    folder, summary = _open(config)
    shares = mixture.fractions(summary, config.weights)
    tokens = sum(summary.sources[name].train.tokens for name in shares)
    require(
        tokens > config.sequence_length,
        f"{folder} has {tokens} training tokens, too few for one sequence of {config.sequence_length}: "
        "lower DataConfig.sequence_length or add text",
    )
    sources = {name: _packed(folder, summary, name, "train", config) for name in shares}
    return sources, shares


def batches_of_process(
    rows: grain.MapDataset[Any],
    batch_size: int,
    *,
    start_step: int,
    process_index: int,
    process_count: int,
    prefetch: int,
) -> Iterator[Any]:
    """A process's part of the global batches of an endless sequence of rows, from `start_step` on, without end.

    `prefetch` batches are prepared ahead in background threads. Raises `UserError` for a batch size that the processes
    do not divide.
    """
    count = rows_of_process(batch_size, process_index, process_count)
    mine = rows.batch(count)[process_index::process_count][start_step:]
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=prefetch)
    return iter(mine.to_iter_dataset(options))


def heldout_batches(
    config: DataConfig, source: str, *, max_batches: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """This process's rows of at most `max_batches` batches of a source's held-out documents, in stored order.

    Rows beyond the last window have zero weight, so every process sees as many batches. Raises `UserError` for an
    unknown source and for what `train_batches` refuses; a source without held-out documents gives no batches.
    """
    folder, summary = _open(config)
    rows = rows_of_process(config.batch_size, process_index, process_count)
    if source not in summary.sources:
        message = unknown_key(source, list(summary.sources)).removeprefix("unknown config key ")
        raise UserError(f"{folder} has no source {message}")
    if not summary.sources[source].heldout.documents:
        return iter(())
    packed = _packed(folder, summary, source, "heldout", config)
    batches = min(max_batches, -(-packed.windows // config.batch_size))
    starts = (batch * config.batch_size + process_index * rows for batch in range(batches))
    return (stack(packed, start, rows) for start in starts)


def stack(packed: mixture.Windows, start: int, rows: int) -> Batch:
    """Windows [start, start + rows) of an epoch as a batch, padded with zeros beyond the last."""
    windows = [packed[i] for i in range(start, min(start + rows, packed.windows))]
    fields = []
    for name in Batch._fields:
        template = getattr(packed[0], name)
        field = np.zeros((rows, *template.shape), template.dtype)
        for row, window in enumerate(windows):
            field[row] = getattr(window, name)
        fields.append(field)
    return Batch(*fields)


def _open(config: DataConfig) -> tuple[Path, Summary]:
    require(bool(config.dataset), "DataConfig.dataset is not set: name the folder that experiments.prepare_data wrote")
    folder = Path(config.dataset)
    return folder, read_summary(folder)


def rows_of_process(batch_size: int, process_index: int, process_count: int) -> int:
    """How many of a batch's rows a process takes; `UserError` where the processes do not divide it."""
    require(
        batch_size % process_count == 0, f"batch_size={batch_size} is not divisible by the {process_count} processes"
    )
    require(0 <= process_index < process_count, f"process {process_index} is not one of {process_count} processes")
    return batch_size // process_count


def _packed(folder: Path, summary: Summary, source: str, split: str, config: DataConfig) -> PackedSource:
    reader = TokenReader(folder, source, split, summary)
    return PackedSource(reader, f"{split}/{source}", config.sequence_length, config.seed, shuffle=split == "train")
