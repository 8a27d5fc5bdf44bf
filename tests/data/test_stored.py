"""From kept documents to a dataset: pools, order, the held-out split, weights, and the way back from a token."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from experiments import runner
from llm_jax.config import DataConfig
from llm_jax.data import factory, loader, pipeline, records, stored, trace
from llm_jax.data.documents import HASH_RANGE, text_hash
from llm_jax.data.prepare import PrepareConfig
from llm_jax.data.stages.mixture import Mixture, MixtureConfig
from llm_jax.data.stored import StoredCorpus
from llm_jax.data.trace import Place
from llm_jax.errors import UserError
from tests.data import corpora
from tests.data.conftest import ByteTokenizer
from tests.data.corpora import Short, Shout

ROWS = corpora.documents(120)
TEXTS = {row[0]: row[5] for row in ROWS}


STAGES = (Short(100), Shout())
PLAIN = MixtureConfig()


def prepared(folder, mixture=PLAIN, stages=STAGES, rows=ROWS, files=1):
    """The dataset of the kept documents, and its folder."""
    config = PrepareConfig(output=str(folder / "dataset"), holdout_fraction=0.2, mixture=mixture)
    corpus = factory.run(config, folder, [*stages, Mixture(mixture)], corpora.reader(rows, files))
    summary = pipeline.prepare(config, ByteTokenizer(), StoredCorpus(corpus, mixture))
    return summary, folder / "dataset"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("stored"))[1]


def texts_of(dataset, source, split):
    reader = records.TokenReader(dataset, source, split, records.read_summary(dataset))
    return [ByteTokenizer().decode(ids.tolist()) for ids in reader.read(range(len(reader.lengths)))]


def test_records_come_in_the_order_of_ids(dataset):
    for source in ("briefe", "letters"):
        found = texts_of(dataset, source, "train") + texts_of(dataset, source, "heldout")
        kept = [(row[0], row[5]) for row in ROWS if row[1] == source and len(row[5].encode()) >= 100]
        wanted = [text.upper() + "!" for _, text in sorted(kept)]
        assert sorted(found) == sorted(wanted)
        train = texts_of(dataset, source, "train")
        assert train == [text for text in wanted if text in train]


def test_documents_read_block_by_block_are_the_same(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "BLOCK_BYTES", 3000)
    _, blocks = prepared(tmp_path)
    for split in records.SPLITS:
        assert texts_of(blocks, "letters", split) == texts_of(dataset, "letters", split)


def test_the_text_as_it_was_read_decides_what_is_held_out(dataset):
    hashes = {text.upper() + "!": text_hash(text) for text in TEXTS.values() if len(text.encode()) >= 100}
    sides = {
        split: [hashes[text] for source in ("briefe", "letters") for text in texts_of(dataset, source, split)]
        for split in records.SPLITS
    }
    # Far more are held out than the one of each source that must be.
    assert len(sides["heldout"]) > 10 and len(sides["heldout"]) + len(sides["train"]) == len(hashes)
    assert max(sides["heldout"]) < 0.2 * HASH_RANGE <= min(sides["train"])


def test_equal_texts_and_blank_ones_are_left_out_and_long_ones_cut(tmp_path):
    long = "\n\n".join(f"{i} " + "x" * 5000 for i in range(30))
    rows = [(f"s/{i}", "s", "en", "text", "o", text) for i, text in enumerate(["same", "same", " \n", long, "other"])]
    summary, folder = prepared(tmp_path, stages=(), rows=rows)
    found = texts_of(folder, "s", "train") + texts_of(folder, "s", "heldout")
    assert sorted(text for text in found if "x" not in text) == ["other", "same"]
    parts = [text for text in found if "x" in text]
    assert len(parts) == 3 and "".join(parts) == long
    assert summary.sources["s"].duplicates == 1


def test_equal_texts_stay_where_that_is_asked_for(tmp_path):
    rows = [*ROWS[:30], *((f"letters/copy_{row[0][-8:]}", *row[1:]) for row in ROWS[:30])]
    found = {}
    for repeats in (False, True):
        config = PrepareConfig(output=str(tmp_path / f"dataset_{repeats}"))
        corpus = factory.run(config, tmp_path, [], corpora.reader(rows))
        summary = pipeline.prepare(config, ByteTokenizer(), StoredCorpus(corpus, PLAIN, repeats))
        found[repeats] = sum(side.documents for each in summary.sources.values() for side in (each.train, each.heldout))
    assert found == {False: 30, True: 60}


def test_every_record_leads_back_to_its_document(dataset):
    table = {row["document_id"]: row for row in pq.read_table(dataset / stored.TABLE).to_pylist()}
    for source in ("briefe", "letters"):
        for split in records.SPLITS:
            for record, text in enumerate(texts_of(dataset, source, split)):
                row = trace.document_of(dataset, Place(source, split, record, 0))
                assert TEXTS[row["id"]].upper() + "!" == text
                assert row == table[row["document_id"]] and row["origin"] == f"{source}.txt"
                assert row["size"] == len(TEXTS[row["id"]].encode())  # what a stage found
    assert "text" not in row


def test_every_token_of_a_batch_leads_back_to_its_document(dataset):
    config = DataConfig(dataset=str(dataset), sequence_length=64, batch_size=4, seed=3)
    summary = records.read_summary(dataset)
    readers = {name: records.TokenReader(dataset, name, "train", summary) for name in summary.sources}
    for step in (0, 7, 1200):  # the last is some epochs later
        batch = next(loader.train_batches(config, start_step=step))
        for row, position in np.argwhere(batch.segment_ids).tolist()[::7]:
            place = trace.place_in_batch(config, step, row, position)
            (ids,) = readers[place.source].read([place.record])
            assert ids[place.token] == batch.tokens[row, position]
            assert place.token >= batch.positions[row, position]
    with pytest.raises(UserError, match="a batch has 4 rows"):
        trace.place_in_batch(config, 0, 4, 0)


def test_an_epoch_has_every_token_once_and_padding_is_from_nowhere(dataset):
    config = DataConfig(dataset=str(dataset), sequence_length=1000, batch_size=4)
    source = loader.packed_sources(config)[0]["briefe"]
    found, padding = [], 0
    for window in range(source.windows, 2 * source.windows):  # the second epoch
        for position in range(1000):
            try:
                found.append(source.locate(window, position))
            except UserError as error:
                assert "holds no token" in str(error)
                padding += 1
    lengths = np.load(records.lengths_path(dataset, "briefe", "train"))
    assert len(set(found)) == len(found) == lengths.sum() and padding > 0
    assert {document for document, _ in found} == set(range(len(lengths)))


def test_a_document_is_found_by_id_and_by_hash(dataset):
    (row,) = trace.find(dataset, "letters/00000100")
    assert trace.find(dataset, row["document_id"]) == [row]
    assert trace.find(dataset, "letters/99") == []
    with pytest.raises(UserError, match="no train/letter; there are briefe, letters"):
        trace.document_of(dataset, Place("letter", "train", 0, 0))
    with pytest.raises(UserError, match="no 5000"):
        trace.document_of(dataset, Place("letters", "train", 5000, 0))


def test_plain_mixtures_weigh_by_tokens(dataset):
    summary = records.read_summary(dataset)
    assert summary.weights == {}
    plan = json.loads((dataset / stored.PLAN).read_text())
    assert [row["epochs"] for row in plan] == [1, 1]
    tokens = {name: source.train.tokens for name, source in summary.sources.items()}
    shares = {row["pool"]: row["share"] for row in plan}
    assert shares == {name: pytest.approx(count / sum(tokens.values())) for name, count in tokens.items()}


TIERED = MixtureConfig(
    weights={"briefe": 3.0}, score="size", tier_edges=(1000.0,), tier_weights=(1.0, 2.0), max_epochs=2.5
)


def test_tiers_become_sources_with_weights_that_training_takes(tmp_path):
    summary, folder = prepared(tmp_path, TIERED)
    assert list(summary.sources) == ["briefe_high", "briefe_low", "letters_high", "letters_low"]
    assert all("!" in text and len(text) > 1000 for text in texts_of(folder, "letters_high", "train"))
    factors = {"briefe_high": 6.0, "briefe_low": 3.0, "letters_high": 2.0, "letters_low": 1.0}
    plan = {row["pool"]: row for row in json.loads((folder / stored.PLAN).read_text())}
    assert {name: row["factor"] for name, row in plan.items()} == factors
    assert summary.weights == {name: row["share"] for name, row in plan.items()}
    config = DataConfig(dataset=str(folder), sequence_length=64, batch_size=4)
    assert loader.describe(config).weights == pytest.approx(summary.weights)
    asked = dataclasses.replace(config, weights={"letters_low": 1.0})
    assert loader.describe(asked).weights == {"letters_low": 1.0}


def test_another_budget_is_another_dataset(tmp_path):
    prepared(tmp_path, TIERED)
    with pytest.raises(UserError, match="another corpus, tokenizer or settings"):
        prepared(tmp_path, dataclasses.replace(TIERED, token_budget=10**6))


def test_an_interrupted_tokenisation_goes_on(tmp_path, dataset, monkeypatch):
    calls = []
    write = pipeline._write_source

    def failing(source, *rest):
        calls.append(source.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(source, *rest)

    monkeypatch.setattr(pipeline, "_write_source", failing)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path)
    prepared(tmp_path)
    assert calls == ["briefe", "letters", "letters"]
    assert texts_of(tmp_path / "dataset", "letters", "train") == texts_of(dataset, "letters", "train")
    assert not (tmp_path / "dataset" / pipeline.PROGRESS).exists()


def test_the_dataset_does_not_depend_on_the_layout_of_the_files(tmp_path, dataset):
    prepared(tmp_path, files=5)
    for name in ("briefe", "letters"):
        for split in records.SPLITS:
            lengths = [np.load(records.lengths_path(folder, name, split)) for folder in (dataset, tmp_path / "dataset")]
            np.testing.assert_array_equal(*lengths)
            assert texts_of(dataset, name, split) == texts_of(tmp_path / "dataset", name, split)


def test_the_files_of_a_dataset_are_the_same_in_every_process(tmp_path, dataset):
    code = (
        f"from pathlib import Path; from tests.data import test_stored\ntest_stored.prepared(Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=runner.REPOSITORY, check=True, capture_output=True)
    paths = [path.relative_to(dataset) for path in sorted(dataset.rglob("*")) if path.is_file()]
    assert len(paths) > 10
    for path in paths:
        assert (dataset / path).read_bytes() == (tmp_path / "dataset" / path).read_bytes(), path
    (record,) = ArrayRecordReader(str(next(dataset.glob("*.array_record*")))).read([0])
    features = ("document_id", "text_bytes", "tokens")  # protobuf's maps have an order of their own in each process
    assert sorted(features, key=lambda name: record.index(name.encode())) == list(features)
