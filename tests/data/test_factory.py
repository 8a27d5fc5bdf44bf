"""The engine: what it counts and keeps, where it goes on after a stop, and which stages it does not believe."""

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from typing import Any

import daft
import numpy as np
import pyarrow.parquet as pq
import pytest
from daft import col, lit
from daft import functions as F

from experiments import runner
from llm_jax.data import counts, embeddings, factory, parquet
from llm_jax.data.documents import text_hash
from llm_jax.data.prepare import PrepareConfig
from llm_jax.data.stages import COLUMNS, DROPPED, Result
from llm_jax.data.stages.contamination import Contamination, ContaminationConfig
from llm_jax.data.stages.instructions import Instructions, InstructionsConfig
from llm_jax.data.stages.mixture import Mixture, MixtureConfig
from llm_jax.data.stages.quality import Quality, QualityConfig
from llm_jax.data.stages.semantic import Semantic, SemanticConfig
from llm_jax.errors import UserError
from llm_jax.evaluation.sentence_bits import TRANSFORMERS
from tests.data import corpora
from tests.data.corpora import Short, Shout

ROWS = corpora.documents()
CONFIG = PrepareConfig()


@pytest.fixture(autouse=True)
def applied():
    corpora.applied.clear()
    return corpora.applied


def run(folder, stages, config=CONFIG, rows=ROWS, files=1):
    return factory.run(config, folder, stages, corpora.reader(rows, files))


def size(text):
    return len(text.encode())


@dataclasses.dataclass
class Does:
    """A stage that does what a function says, which is none of its settings."""

    does: dataclasses.InitVar[Any]
    name: str = "exact"
    prepares: dataclasses.InitVar[Any] = None

    def __post_init__(self, does, prepares):
        self.apply = lambda documents, scratch: does(documents)
        if prepares:
            self.prepare = prepares


def test_documents_come_through_changed_or_are_dropped(tmp_path):
    corpus = run(tmp_path, [Short(100), Shout()], files=3)
    kept = pq.read_table(corpus.documents).to_pylist()
    wanted = {row[0]: row[5].upper() + "!" for row in ROWS if size(row[5]) >= 100}
    assert {row["id"]: row["text"] for row in kept} == wanted
    # What a stage found stays, and a document is known by its text as it was read.
    texts = {row[0]: row[5] for row in ROWS}
    assert all(row["size"] == size(texts[row["id"]]) for row in kept)
    assert all(row["document_id"] == f"{text_hash(texts[row['id']]):016x}" for row in kept)


def test_the_report_counts_what_a_loop_counts(tmp_path):
    read, short, shout = run(tmp_path, [Short(100), Shout()]).reports
    kept = [row for row in ROWS if size(row[5]) >= 100]
    total = sum(size(row[5]) for row in ROWS)
    remaining = sum(size(row[5]) for row in kept)
    assert read["documents"] == {"in": len(ROWS), "added": 0, "kept": len(ROWS)} and read["facts"] == {"files": 1}
    assert short["documents"] == {"in": len(ROWS), "added": 0, "kept": len(kept)}
    assert short["bytes"] == {"in": total, "added": 0, "kept": remaining}
    assert shout["bytes"] == {"in": remaining, "added": 0, "kept": remaining + len(kept)}
    for reason, low, high in (("very short", 0, 50), ("short", 50, 100)):
        found = [size(row[5]) for row in ROWS if low <= size(row[5]) < high]
        assert short["dropped"][reason] == {"documents": len(found), "bytes": sum(found)}
    for source, language in (("letters", "en"), ("briefe", "de")):
        before, after = ([size(row[5]) for row in rows if row[1] == source] for rows in (ROWS, kept))
        assert short["by_source"][source] == {
            "language": language, "documents_in": len(before), "documents_kept": len(after), "bytes_in": sum(before),
            "bytes_kept": sum(after),
        }  # fmt: skip
    composed = {(row["source"], row["language"]): (row["documents"], row["bytes"]) for row in shout["composition"]}
    assert sum(documents for documents, _ in composed.values()) == len(kept)
    assert all(report["seconds"] > 0 and report["peak_mb"] > 50 for report in (read, short, shout))


def test_a_report_on_disk_is_the_one_that_is_returned(tmp_path):
    corpus = run(tmp_path, [Short()])
    folders = sorted(path.name for path in (tmp_path / "stages").iterdir())
    assert folders == ["00_read", "04_heuristics"]
    for folder, report in zip(folders, corpus.reports, strict=True):
        assert json.loads((tmp_path / "stages" / folder / "report.json").read_text()) == report


def test_dropped_documents_can_be_found_and_some_are_shown(tmp_path):
    run(tmp_path, [Short(500)], dataclasses.replace(CONFIG, audit=3))
    folder = tmp_path / "stages" / "04_heuristics"
    texts = {row[0]: row[5] for row in ROWS}
    found = pq.read_table(folder / "dropped").to_pylist()
    assert {row["id"] for row in found} == {id for id, text in texts.items() if size(text) < 500}
    assert all(row["bytes"] == size(texts[row["id"]]) == int(row["because"]) for row in found)
    shown = [json.loads(line) for line in (folder / "audit.jsonl").open()]
    assert [row["reason"] for row in shown] == ["short"] * 3 + ["very short"] * 3
    assert all(row["text"] == texts[row["id"]][:300] for row in shown)
    assert max(len(row["text"]) for row in shown) == 300


def test_the_seed_draws_the_documents_that_are_shown(tmp_path):
    def shown(seed, name):
        run(tmp_path / name, [Short(500)], dataclasses.replace(CONFIG, seed=seed, audit=2))
        return (tmp_path / name / "stages" / "04_heuristics" / "audit.jsonl").read_text()

    assert shown(0, "a") == shown(0, "b") != shown(1, "c")


def test_scores_have_histograms(tmp_path):
    scores = run(tmp_path, [Short(100)]).reports[1]["scores"]
    sizes = np.array([size(row[5]) for row in ROWS], np.float32)
    low, high = scores["size"]["edges"][0], scores["size"]["edges"][-1]
    place = np.clip((sizes - low) / (high - low) * counts.BINS, 0, counts.BINS - 1).astype(int)
    for side, chosen in (("kept", sizes >= 100), ("dropped", sizes < 100)):
        assert scores["size"][side] == np.bincount(place[chosen], minlength=counts.BINS).tolist()
    assert list(scores) == ["size"]


def test_a_second_run_does_nothing_and_a_new_setting_what_follows_it(tmp_path, applied):
    stages = [Short(100), Shout("!")]
    first = run(tmp_path, stages)
    assert run(tmp_path, stages) == first and applied == ["heuristics", "lines"]
    applied.clear()
    changed = run(tmp_path, [Short(100), Shout("?")])
    assert applied == ["lines"] and all(
        row["text"].endswith("?") for row in pq.read_table(changed.documents).to_pylist()
    )
    applied.clear()
    run(tmp_path, [Short(99), Shout("?")])
    assert applied == ["heuristics", "lines"]
    applied.clear()
    run(tmp_path, [Short(99)])  # a stage is turned off: nothing is done, and its result goes
    assert applied == [] and not (tmp_path / "stages" / "06_lines").exists()


def test_a_setting_that_fails_takes_nothing_of_what_was_done(tmp_path, applied):
    stages = [Short(100), Shout()]
    first = run(tmp_path, stages)

    def missing(config, folder, compression):
        raise UserError("no such folder")

    with pytest.raises(UserError, match="no such folder"):
        factory.run(dataclasses.replace(CONFIG, text_field="body"), tmp_path, stages, missing)
    with pytest.raises(UserError, match="04_heuristics failed"):
        run(tmp_path, [Does(fails, "heuristics"), Shout()])
    applied.clear()
    assert run(tmp_path, stages) == first and applied == []
    assert not list((tmp_path / "stages").glob("*.partial"))


def test_sources_that_there_are_not_are_refused_before_any_stage_works(tmp_path, applied):
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    added = Instructions(InstructionsConfig(str(tmp_path)))
    source = "letters"
    for stage, message in (
        (Mixture(MixtureConfig(weights={source + "s": 1.0})), f"no source '{source}s'; did you mean '{source}'"),
        (Quality(QualityConfig(reference=("wikipedia", "instructions_talks")), TRANSFORMERS), "'instructions_talk'"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path, [Short(100), added, stage])
        assert applied == [] and (tmp_path / "stages" / "00_read").is_dir()
    run(tmp_path, [Short(100), added, Mixture(MixtureConfig(weights={source: 1.0, "instructions_talk": 2.0}))])


def test_a_damaged_report_is_named(tmp_path):
    run(tmp_path, [Short(100)])
    report = tmp_path / "stages" / "00_read" / "report.json"
    report.write_text(report.read_text()[:100])
    with pytest.raises(UserError, match=r"00_read/report.json is damaged .*remove it and run"):
        run(tmp_path, [Short(100)])
    report.unlink()
    assert run(tmp_path, [Short(100)]).documents


def test_what_a_run_will_return_is_known_before_it(tmp_path):
    stages = [Short(100), Shout()]
    before = factory.expected(CONFIG, tmp_path, stages)
    assert before.fingerprint == run(tmp_path, stages).fingerprint
    assert before.fingerprint != factory.expected(CONFIG, tmp_path, stages[:1]).fingerprint


def test_another_corpus_is_read_anew(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    config = dataclasses.replace(CONFIG, path=str(tmp_path / "texts"))
    read = corpora.reader(ROWS)
    for change in ({}, {"tokenizer": "x", "seed": 3, "holdout_fraction": 0.5}, {"text_field": "body"}):
        factory.run(dataclasses.replace(config, **change), tmp_path, [], read)
    assert read.calls == 2  # for the field, not for what changes no document
    (tmp_path / "texts" / "a.txt").write_text("another text")
    factory.run(config, tmp_path, [], read)
    assert read.calls == 3


def test_conversations_are_added_anew_when_their_file_changes(tmp_path):
    file = tmp_path / "talk.jsonl"
    stage = Instructions(InstructionsConfig(str(tmp_path)))
    for reply in ("Hello", "Hello!"):
        file.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"content": reply}]}))
        rows = pq.read_table(run(tmp_path / "run", [stage]).documents).to_pylist()
        assert [row["text"] for row in rows if row["source"] == "instructions_talk"] == [f"Hi\n\n{reply}"]


@pytest.mark.parametrize("kind", ["evaluation set", "model", "encoder"])
def test_files_that_settings_name_count_by_what_they_hold(tmp_path, kind, monkeypatch):
    named = {"evaluation set": ["own.jsonl"], "model": ["model.gguf"], "encoder": embeddings.ENCODER_FILES}[kind]
    files = [tmp_path / name for name in named]
    stage = {
        "evaluation set": lambda: Contamination(ContaminationConfig(sets=(), paths=(str(files[0]),))),
        "model": lambda: Quality(QualityConfig(model=str(files[0])), TRANSFORMERS),
        "encoder": lambda: Semantic(SemanticConfig(encoder=str(tmp_path))),
    }[kind]()
    calls = []

    def applied(self, documents, scratch):
        calls.append(1)
        return Result(documents.with_column(DROPPED, daft.lit(None)), {})

    monkeypatch.setattr(type(stage), "apply", applied)
    monkeypatch.setattr(type(stage), "prepare", lambda self: self, raising=False)
    for content, times, when in (("one", 1, 1), ("two", 2, 1), ("two", 2, 9)):  # of one size and time; another time
        for path in files:
            path.write_text(content)
            os.utime(path, (when, when))
        run(tmp_path / "run", [stage])
        assert len(calls) == times
    files[-1].unlink()
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        run(tmp_path / "run", [stage])


def test_stages_are_prepared_while_earlier_ones_work(tmp_path, applied):
    begun, ready = threading.Event(), threading.Event()

    def waits(documents):
        begun.set()
        assert ready.wait(30)
        return Result(documents.with_column(DROPPED, KEEP), {})

    def prepared():
        assert begun.wait(30)
        ready.set()
        return Shout("?")

    later = Does(None, "lines", prepared)
    corpus = run(tmp_path, [Does(waits), later])
    assert applied == ["lines"] and all(row["text"][-1] == "?" for row in pq.read_table(corpus.documents).to_pylist())
    later.prepare = None  # what is done already is not prepared
    assert run(tmp_path, [Does(waits), later]).documents == corpus.documents


def test_what_cannot_be_prepared_is_refused_before_its_turn(tmp_path, applied):
    begun, refused = threading.Event(), threading.Event()

    def refuses():
        assert begun.wait(30)
        refused.set()
        raise UserError("no such set")

    def waits(documents):
        begun.set()
        assert refused.wait(30)
        time.sleep(0.2)  # until the thread knows that it failed
        return Result(documents.with_column(DROPPED, KEEP), {})

    stages = [Does(waits), Short(), Does(None, "lines", refuses)]
    with pytest.raises(UserError, match=r"^no such set$"):
        run(tmp_path, stages)
    assert applied == [] and (tmp_path / "stages" / "03_exact").is_dir()  # and what was done stays

    def breaks():
        raise ValueError("a defect")

    with pytest.raises(UserError, match="stage 06_lines failed: ValueError: a defect"):
        run(tmp_path, [*stages[:2], Does(None, "lines", breaks)])
    assert applied == ["heuristics"]


@pytest.mark.parametrize(("compression", "found"), [("none", "UNCOMPRESSED"), ("zstd", "ZSTD")])
def test_documents_are_compressed_if_wanted(tmp_path, compression, found):
    corpus = run(tmp_path, [Shout()], dataclasses.replace(CONFIG, compression=compression, keep_stages=True))
    raw = parquet.files(tmp_path / "stages" / "00_read" / "kept")
    assert {of_texts(path) for path in [*raw, *corpus.documents]} == {found}


def of_texts(path):
    """How the texts of a Parquet file are compressed."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    return next(column.compression for column in columns if column.path_in_schema == "text")


def test_a_run_that_is_killed_goes_on_in_the_same_stage(tmp_path, applied):
    flag = tmp_path / "flag"
    stages = f"[corpora.Short(), corpora.Shout(), corpora.Dies({str(flag)!r})]"
    code = (
        "from pathlib import Path; from llm_jax.data import factory; from tests.data import corpora\n"
        "from llm_jax.data.prepare import PrepareConfig\n"
        f"factory.run(PrepareConfig(), Path({str(tmp_path)!r}), {stages}, corpora.reader(corpora.documents()))"
    )
    died = subprocess.run([sys.executable, "-c", code], cwd=runner.REPOSITORY, capture_output=True, check=False)
    assert died.returncode == -9, died.stderr.decode()
    assert (tmp_path / "stages" / "07_fuzzy.partial").exists()
    flag.touch()
    resumed = run(tmp_path, [Short(), Shout(), corpora.Dies(str(flag))])
    assert applied == ["fuzzy"]
    assert not list((tmp_path / "stages").glob("*.partial"))
    straight = run(tmp_path / "straight", [Short(), Shout(), corpora.Dies(str(flag))])
    assert corpora.held(resumed.documents) == corpora.held(straight.documents)


def test_stages_can_be_removed_as_the_run_goes(tmp_path, applied):
    config = dataclasses.replace(CONFIG, keep_stages=False)
    run(tmp_path, [Short(), Shout()], config)
    assert [path.parent.name for path in sorted((tmp_path / "stages").glob("*/kept"))] == ["06_lines"]
    assert len(list((tmp_path / "stages").glob("*/report.json"))) == 3
    applied.clear()
    assert run(tmp_path, [Short(), Shout()], config).documents and applied == []
    run(tmp_path, [Short(), Shout("?")], config)  # what it needs is gone, so all is done again
    assert applied == ["heuristics", "lines"]


@pytest.mark.parametrize("files", [1, 7])
def test_the_layout_of_the_files_changes_nothing(tmp_path, files):
    found = run(tmp_path, [Short(), Shout()], rows=ROWS[::-1], files=files)
    wanted = run(tmp_path / "other", [Short(), Shout()])
    assert corpora.held(found.documents) == corpora.held(wanted.documents)
    fields = ("documents", "bytes", "dropped", "by_source", "composition")
    assert [[r[f] for f in fields] for r in found.reports] == [[r[f] for f in fields] for r in wanted.reports]


KEEP = lit(None)
FAULTS = {
    r"lost 1 \(letters/00000001\)": lambda d: d.where(col("id") != "letters/00000001"),
    r"repeated 1 \(letters/00000001\)": lambda d: d.concat(d.where(col("id") == "letters/00000001")),
    r"lost 1 \(letters/00000001\); repeated 1 \(letters/00000002\)": lambda d: d.where(
        col("id") != "letters/00000001"
    ).concat(d.where(col("id") == "letters/00000002")),
    r"lost 1 \(letters/00000001\); made up 1 \(x/1\)": lambda d: d.with_column(
        "id", F.when(col("id") == "letters/00000001", lit("x/1")).otherwise(col("id"))
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_stage_that_loses_or_makes_documents_is_caught(tmp_path, message):
    stage = Does(lambda documents: Result(FAULTS[message](documents).with_column("dropped", KEEP), {}))
    with pytest.raises(UserError, match=message):
        run(tmp_path, [stage])
    assert not (tmp_path / "stages" / "03_exact").exists()


def test_a_lost_text_is_caught(tmp_path):
    empty = F.when(col("id") != "letters/00000001", col("text")).otherwise(lit(None))
    stage = Does(lambda documents: Result(documents.with_columns({"text": empty, "dropped": KEEP}), {}))
    with pytest.raises(UserError, match="1 documents have no text"):
        run(tmp_path, [stage])


def test_counts_of_groups_are_held_against_the_rows():
    documents = daft.from_pydict({"id": ["a", "b"], "source": ["s", "s"], "language": ["en", "de"], "bytes": [1, 2]})
    assert len(counts.groups(documents, 2)) == 2
    with pytest.raises(UserError, match="3 documents were written, 2 are counted"):
        counts.groups(documents, 3)


def test_ids_must_differ(tmp_path):
    with pytest.raises(UserError, match="41 documents were read, with 40 different ids"):
        run(tmp_path, [], rows=[*ROWS, ROWS[0]])


def test_missing_columns_and_empty_results_are_named(tmp_path):
    with pytest.raises(UserError, match="exact gives documents without origin, dropped"):
        run(tmp_path, [Does(lambda documents: Result(documents.exclude("origin"), {}))])
    with pytest.raises(UserError, match="exact drops every document"):
        run(tmp_path, [Does(lambda documents: Result(documents.with_column("dropped", lit("bad")), {}))])
    with pytest.raises(UserError, match="the corpus is empty"):
        run(tmp_path / "empty", [], rows=[])


def test_a_stage_may_add_documents(tmp_path):
    extra = ("extra/00000000", "extra", "en", "text", "x", "an added text")
    added = daft.from_pydict({name: [value] for name, value in zip(COLUMNS, extra)})
    stage = Does(lambda documents: Result(documents.with_columns({"score": lit(0.5), "dropped": KEEP}), {}, added))
    corpus = run(tmp_path, [stage, Shout()])
    assert corpus.reports[1]["documents"] == {"in": 40, "added": 1, "kept": 41}
    rows = {row["id"]: row for row in pq.read_table(corpus.documents).to_pylist()}
    assert rows[extra[0]]["text"] == "AN ADDED TEXT!" and rows[extra[0]]["score"] is None
    assert rows[extra[0]]["document_id"] == f"{text_hash(extra[5]):016x}"


def fails(documents):
    @daft.func
    def broken(text: str) -> str:
        raise KeyError("boom")

    return Result(documents.with_columns({"text": broken(col("text")), "dropped": KEEP}), {})


def test_a_stage_that_fails_is_one_line_with_its_traceback_in_a_file(tmp_path):
    with pytest.raises(UserError, match=r"stage 03_exact failed: .*boom.* its traceback is in .*error\.txt") as error:
        run(tmp_path, [Does(fails)])
    assert "\n" not in str(error.value)
    assert "Traceback" in (tmp_path / "stages" / "03_exact.partial" / "error.txt").read_text()
    run(tmp_path, [Does(lambda documents: Result(documents.with_column("dropped", KEEP), {}))])


def test_a_full_disk_is_said_to_be_one(tmp_path):
    def full(documents):
        raise OSError(errno.ENOSPC, "No space left on device", "part-0.parquet")

    with pytest.raises(OSError, match="No space left") as error:
        run(tmp_path, [Does(full)])
    assert "the disk is full while writing part-0.parquet" in (runner.describe(error.value) or "")
