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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


class DocumentSource(Protocol):
    """A source whose documents can be read as often as wanted, in the same order each time."""

    @property
    def name(self) -> str: ...
    @property
    def language(self) -> str: ...
    def census(self, holdout_fraction: float) -> Census:
        """The documents' number and size, and which of them are held out."""
        ...

    def documents(self) -> Iterator[tuple[int, Document]]:
        """(hash, document) of each; the hash says on which side of the split it is."""
        ...


class Corpus(Protocol):
    """What is tokenised."""

    def facts(self) -> list[object]:
        """All that decides its documents, for a fingerprint, as JSON has it."""
        ...

    def sources(self, scratch: Path) -> Sequence[DocumentSource]:
        """Its sources; `scratch` is a folder that is kept until the dataset is whole, in an interrupted run too."""
        ...

    def finish(self, folder: Path, sources: Mapping[str, SourceSummary]) -> Mapping[str, float]:
        """Write what goes into the dataset's folder beside the records; the weights that training takes by default."""
        ...

    def missing(self, summary: Summary) -> list[str]:
        """Which sources a finished dataset lacks that were asked for."""
        ...


class RawCorpus:
    """The sources of a config as they are."""

    def __init__(self, config: CorpusConfig):
        self._config = config

    def facts(self) -> list[object]:
        """The settings, and the files' sizes and times, which stand for their content."""
        config = self._config
        facts: list[object] = [config.profile, config.path, config.text_field]
        facts += [value for value in (config.sources, config.table) if value]
        if config.path:
            facts += files.state(Path(config.path).expanduser())
        else:
            facts.append(sys.version_info[:3])  # its library is a source
        return facts

    def sources(self, scratch: Path) -> Sequence[Source]:
        """As `sources.corpus` finds them."""
        return corpus(self._config)

    def finish(self, folder: Path, sources: Mapping[str, SourceSummary]) -> Mapping[str, float]:
        """Nothing, and no weights."""
        return {}

    def missing(self, summary: Summary) -> list[str]:
        """Public sources that could not be had."""
        config = self._config
        return [] if config.path else [name for name in public_names(config) if name not in summary.sources]


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


def prepare(config: CorpusConfig, tokenizer: TextEncoder, documents: Corpus | None = None) -> Summary:
    """Write the dataset of a corpus to `config.output`, or find it there already, and return its summary.

    The tokenizer is saved into the dataset. `documents` are those of the config's sources, unless they are given.
    Raises `UserError` for a corpus that is missing, damaged or empty, and for an output folder that holds something
    else.
    """
    documents = documents or RawCorpus(config)
    fingerprint = check_output(config, tokenizer, documents)
    output = Path(config.output)
    if (output / SUMMARY).is_file():
        return _existing(output, documents)
    partial = output.with_name(output.name + ".partial")
    scratch = _open_partial(partial, fingerprint)
    summaries = _write_sources(documents.sources(scratch), partial, config, tokenizer)
    if not summaries:
        shutil.rmtree(partial)
        raise UserError(f"the corpus at {config.path or config.profile!r} is empty")
    saved = tokenizer.save(partial)
    weights = documents.finish(partial, summaries)
    summary = Summary(tokenizer.vocab_size, saved.name, tokenizer.fingerprint, fingerprint, summaries, weights)
    _finish(partial, output, summary)
    return summary


def check_output(config: CorpusConfig, tokenizer: TextEncoder, documents: Corpus) -> str:
    """The digest of all that decides what `prepare` writes; nothing of the documents but their facts is asked for.

    Raises `UserError` for an output folder that holds something else.
    """
    require(bool(config.output), "CorpusConfig.output is not set: name the dataset's folder")
    output = Path(config.output)
    facts = [*documents.facts(), config.holdout_fraction, tokenizer.fingerprint]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if (output / SUMMARY).is_file():
        require(
            read_summary(output).fingerprint == fingerprint,
            f"{output} holds a dataset of another corpus, tokenizer or settings: remove it or choose another output",
        )
    else:
        require(
            not output.exists() or (output.is_dir() and not any(output.iterdir())),
            f"{output} exists and is not a dataset: choose another CorpusConfig.output",
        )
    return fingerprint


def _existing(output: Path, documents: Corpus) -> Summary:
    summary = read_summary(output)
    logger.info("%s is already prepared", output)
    missing = documents.missing(summary)
    if missing:
        logger.warning("%s lacks %s, left out when it was made: remove it to try again", output, ", ".join(missing))
    return summary


def _open_partial(partial: Path, fingerprint: str) -> Path:
    """Keep the unfinished dataset of the same settings, drop one of others; the folder inside for the corpus's own."""
    marker = partial / PROGRESS / "fingerprint"
    if partial.exists():
        require(marker.is_file(), f"{partial} is in the way and is no unfinished dataset: remove it")
        if marker.read_text() == fingerprint:
            return partial / PROGRESS
        logger.info("dropping the unfinished dataset of other settings at %s", partial)
        shutil.rmtree(partial)
    marker.parent.mkdir(parents=True)
    marker.write_text(fingerprint)
    return partial / PROGRESS


def _write_sources(
    sources: Sequence[DocumentSource], partial: Path, config: CorpusConfig, tokenizer: TextEncoder
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
    source: DocumentSource, partial: Path, config: CorpusConfig, tokenizer: TextEncoder, progress: Progress
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
