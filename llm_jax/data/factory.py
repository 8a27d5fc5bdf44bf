"""Runs the stages of the corpus factory one after another, each from Parquet files to Parquet files.

    FOLDER/stages/
      00_read/
        kept/*.parquet      the documents that go on, with all that stages have found of them
        report.json         counts by source and reason, histograms of scores, facts, seconds, memory
      03_exact/
        kept/*.parquet
        dropped/*.parquet   of the others: id, source, reason, because, bytes
        audit.jsonl         a few dropped documents of each reason
        report.json
      ...

A stage is written to `NN_name.partial`, which gets its name when it is whole. Its fingerprint is a digest of its
settings, of what is in the files that they name, and of all that came before: a run that was stopped goes on with the
stage in which it was, and a run with another setting begins where that setting matters; what an earlier run did stays
until the first new stage is whole. Every stage must give back each document once: their number and the sums of their
ids' hashes are compared with what it got, and counts by source with the rows that the files hold.
"""

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import json
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import daft
import pyarrow as pa
from daft import DataType, col, lit
from daft import functions as F
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llm_jax.config import CorpusConfig
from llm_jax.data import counts, files, parquet, runners
from llm_jax.data.counts import BYTES, Group
from llm_jax.data.documents import DOCUMENT_ID, document_id
from llm_jax.data.prepare import ORDER, PrepareConfig
from llm_jax.data.stages import BECAUSE, COLUMNS, DROPPED, ID, Result, Stage
from llm_jax.errors import UserError, require
from llm_jax.files import read_json, write_json, write_lines
from llm_jax.host_memory import keep_freed_memory

STAGES, KEPT, AUDIT, REPORT, ERROR = "stages", "kept", "audit.jsonl", "report.json", "error.txt"
PARTIAL = ".partial"  # the end of the name of a step's folder that is not whole
SCRATCH, WRITTEN = "scratch", "written"  # folders of a step that is not whole
SHARD = "shard"  # a column by which a step's files are written side by side
# Settings that change no document.
NO_CONTENT = {"cache", "tokenizer", "output", "holdout_fraction", "workers", "runner", "ray_address"}
NO_CONTENT |= {"seed", "audit", "keep_stages", "compression"}
FREED_BYTES = 64 << 20  # of NumPy's arrays, which a step allocates again and again, stay with the process
FLOATS = (DataType.float32(), DataType.float64())
Read = Callable[[CorpusConfig, Path, str], dict[str, Any]]


class Corpus(NamedTuple):
    """What the factory made."""

    documents: list[Path]  # Parquet files of all that is kept
    fingerprint: str  # of all that decides what they hold
    reports: list[dict[str, Any]]  # one for each stage, in order


class _Step(NamedTuple):
    """A stage with its place; reading is the one without."""

    folder: Path
    fingerprint: str
    stage: Stage | None

    @property
    def name(self) -> str:
        return self.stage.name if self.stage else ORDER[0]


def run(config: PrepareConfig, folder: Path, stages: Sequence[Stage], read: Read) -> Corpus:
    """Bring a corpus through stages, or find there what earlier runs have done of it.

    Args:
        config: the corpus and the runner.
        folder: where `stages/` is written; on a cluster, one that all hosts see.
        stages: in the order of `prepare.ORDER`, which numbers them.
        read: writes the raw documents as Parquet files into a folder, with `COLUMNS`, DOCUMENT_ID and BYTES and
            compressed as told, and returns facts for the report.

    Raises `UserError` for damaged sources, for a stage that fails or loses documents, and if nothing is kept.
    """
    runners.start(config)
    keep_freed_memory(FREED_BYTES)
    with _without_what_is_there():
        return _run(config, folder, stages, read)


def _run(config: PrepareConfig, folder: Path, stages: Sequence[Stage], read: Read) -> Corpus:
    steps = _steps(config, folder, stages)
    reports = _finished(steps)
    stages_folder = steps[0].folder.parent
    for unfinished in stages_folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(unfinished)
    console = Console(stderr=True)
    for step in steps[: len(reports)]:
        console.print(f"{step.folder.name}: done earlier", highlight=False, soft_wrap=True)
    with _prepared(steps[len(reports) :]) as prepared:
        for index in range(len(reports), len(steps)):
            before = steps[index - 1] if index else None
            if before:
                _check_sources(stages, reports[0])
            with _progress(steps[index].folder.name, console), _one_line_errors(steps[index]):
                step = prepared(steps[index])
                reports.append(_make(step, before, reports[-1] if before else {}, config, read))
                _remove_others(stages_folder, steps[:index])
                _partial(step).replace(step.folder)
            console.print(_line(step, reports[-1]), highlight=False, soft_wrap=True)
            if before and not config.keep_stages:
                shutil.rmtree(before.folder / KEPT)
    _remove_others(stages_folder, steps)
    return Corpus(parquet.files(steps[-1].folder / KEPT), steps[-1].fingerprint, reports)


@contextlib.contextmanager
def _prepared(steps: Sequence[_Step]) -> Iterator[Callable[[_Step], _Step]]:
    """Have the stages that can be prepared prepared by a thread; a function that gives a step with its stage ready.

    It raises what a later stage would be refused for, as soon as that is known.
    """
    with ThreadPoolExecutor(1) as pool:
        stages: list[tuple[_Step, Any]] = [(step, step.stage) for step in steps]
        waiting = {step.name: pool.submit(stage.prepare) for step, stage in stages if hasattr(stage, "prepare")}

        def prepared(step: _Step) -> _Step:
            for future in waiting.values():
                if future.done() and isinstance(future.exception(), UserError):
                    future.result()
            return step._replace(stage=waiting.pop(step.name).result()) if step.name in waiting else step

        try:
            yield prepared
        finally:
            pool.shutdown(cancel_futures=True)


def expected(config: PrepareConfig, folder: Path, stages: Sequence[Stage]) -> Corpus:
    """What `run` will return, without documents and reports: nothing is read but the files that settings name."""
    return Corpus([], _steps(config, folder, stages)[-1].fingerprint, [])


def _partial(step: _Step) -> Path:
    return step.folder.with_name(step.folder.name + PARTIAL)


def _steps(config: PrepareConfig, folder: Path, stages: Sequence[Stage]) -> list[_Step]:
    """Reading and the stages, each with the digest of all that decides what it gives."""
    folder = folder.resolve() / STAGES
    fingerprint = _digest(_corpus_facts(config))
    steps = [_Step(folder / f"00_{ORDER[0]}", fingerprint, None)]
    for stage in stages:
        settings: Any = stage
        inputs: Callable[[], list[Path]] = getattr(stage, "files", list)  # what it reads besides its documents
        contents = [(path.name, files.digest(path)) for path in inputs()]
        fingerprint = _digest([fingerprint, stage.name, dataclasses.asdict(settings), contents])
        steps.append(_Step(folder / f"{ORDER.index(stage.name):02d}_{stage.name}", fingerprint, stage))
    return steps


def _corpus_facts(config: PrepareConfig) -> list[Any]:
    """What decides the raw documents, with files' sizes and times standing for what they hold."""
    chosen = {k: v for k, v in dataclasses.asdict(config).items() if k not in {*NO_CONTENT, *ORDER[1:]}}
    return [chosen, files.state(Path(config.path).expanduser()) if config.path else sys.version_info[:3]]


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_name).encode()).hexdigest()


def _name(function: Callable[..., Any]) -> str:
    """What a function among a stage's settings counts by."""
    return f"{function.__module__}.{function.__qualname__}"


def _finished(steps: Sequence[_Step]) -> list[dict[str, Any]]:
    """The reports of the steps that need not be done again."""
    reports = []
    for step in steps:
        path = step.folder / REPORT
        report = read_json(path) if path.is_file() else {}
        if report.get("fingerprint") != step.fingerprint:
            break
        reports.append(report)
    while reports and not (steps[len(reports) - 1].folder / KEPT).is_dir():
        reports.pop()  # its documents were removed to save space
    return reports


def _check_sources(stages: Sequence[Any], read: dict[str, Any]) -> None:
    """Have stages refuse names of sources that there are not, before any of them works."""
    known = set(read["by_source"])
    for stage in stages:
        known.update(getattr(stage, "added_sources", list)())
    for stage in stages:
        getattr(stage, "check_sources", set)(known)


def _remove_others(folder: Path, steps: Sequence[_Step]) -> None:
    """Remove whole steps that an earlier run with other settings did."""
    wanted = [step.folder for step in steps]
    for path in folder.glob("[0-9][0-9]_*"):
        if path not in wanted and path.suffix != PARTIAL:
            shutil.rmtree(path)


def _make(
    step: _Step, before: _Step | None, earlier: dict[str, Any], config: PrepareConfig, read: Read
) -> dict[str, Any]:
    """Do one step in its unfinished folder and return its report, which is there too."""
    partial = _partial(step)
    partial.mkdir(parents=True)
    _release_memory()
    _reset_peak()
    started = time.monotonic()
    if before is None:
        facts, report = _read_all(config, partial, read)
    else:
        facts, report = _apply(step, before.folder / KEPT, earlier, partial, config)
    seconds = time.monotonic() - started
    head = {"name": step.name, "seconds": round(seconds, 3), "peak_mb": round(_peak_mb())}
    report = head | report | {"facts": facts, "fingerprint": step.fingerprint}
    write_json(partial / REPORT, report)
    return report


def _read_all(config: PrepareConfig, partial: Path, read: Read) -> tuple[dict[str, Any], dict[str, Any]]:
    """Have the raw documents written, and check that their ids differ."""
    (partial / KEPT).mkdir()
    facts = read(config, partial / KEPT, config.compression)
    require(bool(parquet.files(partial / KEPT)), "the corpus is empty")
    written = parquet.scan(parquet.files(partial / KEPT))
    _check_columns(written, (*COLUMNS, DOCUMENT_ID, BYTES), ORDER[0])
    number = counts.rows(parquet.files(partial / KEPT))
    require(number > 0, "the corpus is empty")
    distinct = len(written.select(ID).distinct().to_arrow())
    require(distinct == number, f"{number} documents were read, with {distinct} different ids")
    found = counts.groups(written, number)
    return facts, _counts(found, [], found)


def _apply(
    step: _Step, documents: Path, earlier: dict[str, Any], partial: Path, config: PrepareConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write what a stage makes of the documents of the step before; its facts, and the counts of the report."""
    assert step.stage is not None
    (partial / SCRATCH).mkdir()
    given = as_given(parquet.files(documents))
    result = step.stage.apply(given, partial / SCRATCH)
    _check_columns(result.documents, (*COLUMNS, DOCUMENT_ID, DROPPED), step.name)
    before = counts.groups_of(earlier["composition"])
    added: list[Group] = []
    if result.added is not None:
        added = counts.groups(_sized(result.added))
    kept, dropped = _write(result, partial, config)
    shutil.rmtree(partial / SCRATCH)
    require(bool(kept), f"{step.name} drops every document: see its settings")
    written = parquet.scan(kept + dropped)
    found = counts.groups(written, counts.rows(kept + dropped))
    if counts.identity(found) != counts.identity([*before, *added]):
        raise UserError(f"{step.name} does not give back each document once: {_difference(given, written)}")
    report = _counts(before, added, found)
    scores = [
        field.name for field in written.schema() if field.name not in given.column_names and field.dtype in FLOATS
    ]
    report["scores"] = counts.histograms(written, scores)
    if dropped:
        _keep_dropped(dropped, partial, config)
    return result.facts, report


def as_given(paths: Sequence[Path]) -> daft.DataFrame:
    """The documents in the files of a step, as the next stage gets them."""
    documents = parquet.scan(paths)
    return documents.exclude(*(name for name in (DROPPED, BECAUSE, BYTES) if name in documents.column_names))


def _sized(documents: daft.DataFrame) -> daft.DataFrame:
    return documents.with_column(BYTES, F.length_bytes(col("text")).cast(DataType.int64()))


def _identified(documents: daft.DataFrame) -> daft.DataFrame:
    return documents.with_column(DOCUMENT_ID, _document_ids(col("text")))


@daft.func.batch(return_dtype=DataType.string())
def _document_ids(texts: daft.Series) -> list[str]:
    return [document_id(text) for text in texts.to_pylist()]


def _write(result: Result, partial: Path, config: PrepareConfig) -> tuple[list[Path], list[Path]]:
    """The files of the documents that are kept and of those that are dropped, texts and all."""
    documents = result.documents
    if BECAUSE not in documents.column_names:
        documents = documents.with_column(BECAUSE, lit(None))
    documents = documents.with_columns({name: col(name).cast(DataType.string()) for name in (DROPPED, BECAUSE)})
    if result.added is not None:
        documents = documents.union_all_by_name(_identified(result.added))
    # A folder has one writer: each core gets a folder of its own.
    shard = F.hash(col(ID)) % lit(config.workers or os.cpu_count() or 1)
    documents = _sized(documents).with_columns({KEPT: col(DROPPED).is_null(), SHARD: shard.cast(DataType.int32())})
    parquet.write(documents, partial / WRITTEN, config.compression, partition_cols=[KEPT, SHARD])
    for name, kept in ((KEPT, True), (DROPPED, False)):
        for path in (partial / WRITTEN).glob(f"{KEPT}={str(kept).lower()}/*/*.parquet"):
            (partial / name).mkdir(exist_ok=True)
            path.replace(partial / name / path.name)
    shutil.rmtree(partial / WRITTEN)
    return parquet.files(partial / KEPT), parquet.files(partial / DROPPED)


def _check_columns(documents: daft.DataFrame, wanted: Iterable[str], name: str) -> None:
    missing = [column for column in wanted if column not in documents.column_names]
    require(not missing, f"{name} gives documents without {', '.join(missing)}")


def _difference(given: daft.DataFrame, written: daft.DataFrame) -> str:
    """Which ids a stage lost, made up or repeated: a few of each."""
    before, after = given.select(ID), written.select(ID)
    lost = before.join(after, on=ID, how="anti")
    new = after.join(before, on=ID, how="anti")
    often = after.groupby(ID).agg(col(ID).count().alias("times")).where(col("times") > lit(1))
    parts = []
    for what, rows in (("lost", lost), ("made up", new), ("repeated", often)):
        ids = sorted(rows.to_pydict()[ID])
        if ids:
            parts.append(f"{what} {len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})")
    return "; ".join(parts) or "the same ids, counted otherwise"


def _counts(before: list[Group], added: list[Group], found: list[Group]) -> dict[str, Any]:
    """What the report says of documents and bytes: all, by reason, by source, by source and language."""
    kept = [group for group in found if not group.reason]
    sides = {"in": before, "added": added, "kept": kept}
    return {
        "documents": {side: counts.identity(groups).documents for side, groups in sides.items()},
        "bytes": {side: sum(group.bytes for group in groups) for side, groups in sides.items()},
        "dropped": counts.dropped(found),
        "by_source": counts.by_source([*before, *added], kept),
        "composition": counts.composition(kept),
    }


def _keep_dropped(dropped: Sequence[Path], partial: Path, config: PrepareConfig) -> None:
    """Show some of the dropped documents in the audit, and keep of all what is needed to find them again."""
    documents = parquet.scan(dropped)
    write_lines(partial / AUDIT, counts.audit(documents, config.audit, config.seed))
    columns = (ID, "source", col(DROPPED).alias("reason"), BECAUSE, BYTES)
    parquet.write(documents.select(*columns), partial / WRITTEN)
    shutil.rmtree(partial / DROPPED)
    (partial / WRITTEN).replace(partial / DROPPED)


@contextlib.contextmanager
def _progress(name: str, console: Console) -> Iterator[None]:
    """A line that says which step is at work, and for how long."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(name, total=None)
        yield


def _line(step: _Step, report: dict[str, Any]) -> str:
    """What a step did, as a line."""
    documents, size, seconds = report["documents"], report["bytes"], report["seconds"]
    return (
        f"{step.folder.name}: {documents['in']:,} -> {documents['kept']:,} documents, "
        f"{size['in'] / 1e6:,.2f} -> {size['kept'] / 1e6:,.2f} MB, {seconds:.1f} s, "
        f"{size['in'] / 1e6 / max(seconds, 1e-3):,.1f} MB/s, at most {report['peak_mb']:,} MB of memory"
    )


@contextlib.contextmanager
def _one_line_errors(step: _Step) -> Iterator[None]:
    """Turn a failure inside a step into one line, with its traceback in a file; a full disk is the caller's to tell."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "No space left on device" in str(error):
            raise
        path = _partial(step) / ERROR
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8")
        lines = str(error).strip().splitlines() or [""]
        reason = lines[-1].strip()[:300]  # of what Daft and Ray say, the last line is the cause
        raise UserError(
            f"stage {step.folder.name} failed: {type(error).__name__}: {reason}; its traceback is in {path}. "
            "The same command goes on with this stage."
        ) from error


@contextlib.contextmanager
def _without_what_is_there() -> Iterator[None]:
    """Collect no garbage among what was there before, mostly modules: they take a fifth of a second each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _release_memory() -> None:
    """Give back what earlier steps have freed: the allocators would keep hundreds of MB of it."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # glibc has it, others do not
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    """Let the process's peak memory be measured from here on, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    """The most memory that the process has had, in MB, since it was reset."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) / 1000 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes
