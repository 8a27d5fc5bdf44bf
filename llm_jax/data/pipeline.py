"""From documents to the tokenised dataset that training reads.

Everything is written to `OUTPUT.partial`, which is renamed to `OUTPUT` when it is whole. A source that was finished
there is kept when an interrupted run is started again; any other leftover is written anew.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from llm_jax.config import CorpusConfig
from llm_jax.data import files
from llm_jax.data.documents import Census, Document
from llm_jax.data.records import (
    SUMMARY,
    SourceSummary,
    SplitWriter,
    Summary,
    heldout_line,
    heldout_text_path,
    read_summary,
    source_from_json,
    write_metadata,
)
from llm_jax.data.sources import Source, corpus, public_names
from llm_jax.errors import UserError, require

logger = logging.getLogger(__name__)

BATCH_BYTES = 1 << 20  # of text tokenised at once
PROGRESS = "progress"  # the folder, inside the unfinished dataset, that says what is finished


class TextEncoder(Protocol):
    """What preparing a dataset needs of a tokenizer; ids of specials are negative where it has none."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode_batch(self, texts: Sequence[str], workers: int = 0) -> list[list[int]]:
        """The ids of every text, without specials, on `workers` threads (0 = one per core)."""
        ...

    def save(self, folder: Path) -> Path:
        """Write the tokenizer into a folder; returns its main file."""
        ...


def prepare(config: CorpusConfig, tokenizer: TextEncoder) -> Summary:
    """Write the dataset of a corpus to `config.output`, or find it there already, and return its summary.

    The tokenizer is saved into the dataset. Raises `UserError` for a corpus that is missing, damaged or empty, and for
    an output folder that holds something else.
    """
    require(bool(config.output), "CorpusConfig.output is not set: name the dataset's folder")
    output = Path(config.output)
    fingerprint = _fingerprint(config, tokenizer.fingerprint)
    if (output / SUMMARY).is_file():
        return _existing(output, fingerprint, config)
    require(
        not output.exists() or (output.is_dir() and not any(output.iterdir())),
        f"{output} exists and is not a dataset: choose another CorpusConfig.output",
    )
    sources = corpus(config)
    partial = output.with_name(output.name + ".partial")
    _open_partial(partial, fingerprint)
    summaries = _write_sources(sources, partial, config, tokenizer)
    if not summaries:
        shutil.rmtree(partial)
        raise UserError(f"the corpus at {config.path or config.profile!r} is empty")
    saved = tokenizer.save(partial)
    summary = Summary(tokenizer.vocab_size, saved.name, tokenizer.fingerprint, fingerprint, summaries)
    _finish(partial, output, summary)
    return summary


def _existing(output: Path, fingerprint: str, config: CorpusConfig) -> Summary:
    summary = read_summary(output)
    require(
        summary.fingerprint == fingerprint,
        f"{output} holds a dataset of another corpus, tokenizer or settings: remove it or choose another output",
    )
    logger.info("%s is already prepared", output)
    missing = [] if config.path else [name for name in public_names(config) if name not in summary.sources]
    if missing:
        logger.warning("%s lacks %s, left out when it was made: remove it to try again", output, ", ".join(missing))
    return summary


def _fingerprint(config: CorpusConfig, tokenizer_sha256: str) -> str:
    """A digest of all that decides a dataset's content, with the files' sizes and times standing for their content."""
    facts: list[object] = [config.profile, config.path, config.text_field, config.holdout_fraction, tokenizer_sha256]
    if config.sources:
        facts.append(config.sources)
    if config.path:
        facts += files.state(Path(config.path).expanduser())
    else:
        facts.append(sys.version_info[:3])  # its library is a source
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _open_partial(partial: Path, fingerprint: str) -> None:
    """Keep the unfinished dataset of the same settings; drop one of others."""
    marker = partial / PROGRESS / "fingerprint"
    if partial.exists():
        require(marker.is_file(), f"{partial} is in the way and is no unfinished dataset: remove it")
        if marker.read_text() == fingerprint:
            return
        logger.info("dropping the unfinished dataset of other settings at %s", partial)
        shutil.rmtree(partial)
    marker.parent.mkdir(parents=True)
    marker.write_text(fingerprint)


def _write_sources(
    sources: Sequence[Source], partial: Path, config: CorpusConfig, tokenizer: TextEncoder
) -> dict[str, SourceSummary]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    summaries = {}
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        for source in sources:
            done = _done_path(partial, source.name)
            if done.is_file():
                logger.info("%s is already tokenised", source.name)
                summary = source_from_json(json.loads(done.read_text()))
            else:
                summary = _write_source(source, partial, config, tokenizer, progress)
                _write_atomically(done, json.dumps(dataclasses.asdict(summary)))
            if summary.train.documents + summary.heldout.documents:
                summaries[source.name] = summary
            else:
                logger.warning("the source %s holds no text", source.name)
    return summaries


def _write_source(
    source: Source, partial: Path, config: CorpusConfig, tokenizer: TextEncoder, progress: Progress
) -> SourceSummary:
    """Tokenise a source into the records of its two splits."""
    census = source.census(config.holdout_fraction)
    train = SplitWriter(partial, source.name, "train", tokenizer.vocab_size)
    heldout = SplitWriter(partial, source.name, "heldout", tokenizer.vocab_size)
    task = progress.add_task(f"tokenising {source.name}", total=census.text_bytes)
    texts_path = heldout_text_path(partial, source.name)
    texts_path.parent.mkdir(exist_ok=True)
    with texts_path.open("w", encoding="utf-8") as texts:
        for batch in _batches(source.documents()):
            for (digest, document), ids in zip(batch, _encode(batch, tokenizer, config.workers), strict=True):
                held_out = digest < census.threshold
                size = len(document.text.encode())
                (heldout if held_out else train).add(ids, size, f"{digest:016x}")
                if held_out:
                    texts.write(heldout_line(document.text))
            progress.advance(task, sum(len(document.text.encode()) for _, document in batch))
    _log_counts(source.name, census)
    return SourceSummary(source.language, census.duplicates, train.finish(), heldout.finish())


def _log_counts(name: str, census: Census) -> None:
    logger.info("%s: %d documents, %d exact duplicates dropped", name, census.documents, census.duplicates)


def _batches(documents: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Runs of documents of about `BATCH_BYTES` of text."""
    batch: list[tuple[int, Document]] = []
    size = 0
    for digest, document in documents:
        batch.append((digest, document))
        size += len(document.text.encode())
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: Sequence[tuple[int, Document]], tokenizer: TextEncoder, workers: int) -> Iterator[list[int]]:
    """`[bos] + ids + [eos]` of every document, with whichever of the two the tokenizer has."""
    first = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    last = [tokenizer.eos_id] if tokenizer.eos_id >= 0 else []
    rows = tokenizer.encode_batch([document.text for _, document in batch], workers=workers)
    return (first + ids + last for ids in rows)


def _finish(partial: Path, output: Path, summary: Summary) -> None:
    """Complete the dataset's folder and give it its name."""
    write_metadata(partial, summary)
    partial.replace(output)
    shutil.rmtree(output / PROGRESS)


def _done_path(partial: Path, source: str) -> Path:
    """Holds a finished source's summary, so that its presence says that the source is whole."""
    return partial / PROGRESS / f"{source}.json"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
