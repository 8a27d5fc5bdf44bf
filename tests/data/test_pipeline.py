"""From files to a TFDS dataset and back, interrupted runs, and damaged input."""

import dataclasses
import errno
import gzip
import json
import logging

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from llm_jax.config import CorpusConfig
from llm_jax.data import files, pipeline, records, sources
from llm_jax.errors import UserError
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.tokenization.tokenizer_json import JsonTokenizer
from tests.data import corpora
from tests.tokenization.texts import byte_level_bpe


@pytest.fixture
def config(tmp_path):
    """Of a folder `texts` that the test fills."""
    (tmp_path / "texts").mkdir()
    return CorpusConfig(path=str(tmp_path / "texts"), output=str(tmp_path / "dataset"), holdout_fraction=0.2)


def texts_of(config):
    return sorted(document.text for document in corpora.every_document(config))


def test_tfds_reads_every_document_back(dataset, corpus_folder, tokenizer):
    builder = tfds.builder_from_directory(str(dataset))
    assert sorted(builder.info.splits) == ["heldout_books", "heldout_letters", "train_books", "train_letters"]
    found = []
    for split in builder.info.splits:
        for record in builder.as_data_source(split):
            text = tokenizer.decode(record["tokens"].tolist())
            assert record["tokens"][0] == tokenizer.bos_id and record["tokens"][-1] == tokenizer.eos_id
            assert record["text_bytes"] == len(text.encode())
            found.append(text)
    assert sorted(found) == texts_of(CorpusConfig(path=str(corpus_folder)))


def test_the_summary_counts_what_is_there(dataset, corpus_folder):
    summary = records.read_summary(dataset)
    documents = list(corpora.every_document(CorpusConfig(path=str(corpus_folder))))
    for name, source in summary.sources.items():
        mine = [document.text for document in documents if document.source == name]
        sides = (source.train, source.heldout)
        assert sum(side.documents for side in sides) == len(mine)
        assert sum(side.text_bytes for side in sides) == sum(len(text.encode()) for text in mine)
        assert sum(side.tokens for side in sides) == sum(len(text.encode()) + 2 for text in mine)
        assert source.heldout.documents >= 1
    assert (dataset / summary.tokenizer).read_bytes() == b"a model file"


def test_files_split_over_shards_read_the_same(config, corpus_folder, tokenizer, dataset, monkeypatch):
    monkeypatch.setattr(records, "SHARD_TOKENS", 3000)
    config = dataclasses.replace(config, path=str(corpus_folder), holdout_fraction=0.1)
    sharded = pipeline.prepare(config, tokenizer)
    assert len(sharded.sources["books"].train.files) > 2
    whole = records.read_summary(dataset)
    for split in records.SPLITS:
        one = records.TokenReader(dataset, "books", split, whole)
        many = records.TokenReader(pipeline.Path(config.output), "books", split, sharded)
        order = np.random.default_rng(0).permutation(len(one.lengths)).tolist()
        for a, b in zip(one.read(order), many.read(order), strict=True):
            np.testing.assert_array_equal(a, b)
    splits = tfds.builder_from_directory(config.output).info.splits
    assert splits["train_books"].num_examples == sharded.sources["books"].train.documents


def test_large_vocabularies_need_wide_ids():
    assert records.token_dtype(1 << 16) is np.uint16
    assert records.token_dtype((1 << 16) + 1) is np.int32


def test_held_out_documents_are_never_sampled(dataset, corpus_folder):
    config = CorpusConfig(path=str(corpus_folder), holdout_fraction=0.1)
    held_out = {text for name in ("books", "letters") for text in records.heldout_texts(dataset, name)}
    sampled = [document.text for document in sources.sample_documents(config, 0, 0)]
    assert held_out and held_out.isdisjoint(sampled)
    assert sorted([*held_out, *sampled]) == texts_of(config)


def test_a_sample_has_the_wanted_size_and_depends_on_the_seed(corpus_folder):
    config = CorpusConfig(path=str(corpus_folder))

    def sample(seed):
        return [document.text for document in sources.sample_documents(config, 15_000, seed)]

    assert sample(0) == sample(0) != sample(1)
    assert 5_000 < sum(len(text.encode()) for text in sample(0)) < 25_000


def test_exact_duplicates_are_dropped_and_counted(config, tmp_path, tokenizer):
    lines = [json.dumps({"text": text}) for text in ("a", "b", "a", "c", "a")]
    (tmp_path / "texts" / "x.jsonl").write_text("\n".join(lines))
    summary = pipeline.prepare(config, tokenizer)
    assert summary.sources["x"].duplicates == 2
    assert texts_of(config) == ["a", "b", "c"]


def test_every_kind_of_file_gives_its_texts(config, tmp_path):
    folder = tmp_path / "texts"
    (folder / "one.txt").write_text("\ufefftext one\r\n", newline="")
    (folder / "two.jsonl").write_text('{"text": "two", "n": 1}\n\n{"text": "zwei"}')
    with gzip.open(folder / "three.jsonl.gz", "wt") as file:
        file.write('{"text": "three"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["four", "vier"]}), folder / "four.parquet")
    (folder / "in" / "ner").mkdir(parents=True)
    (folder / "in" / "ner" / "five.txt").write_text("five")
    found = {(document.source, document.text) for document in corpora.every_document(config)}
    assert found == {
        ("one", "text one\r\n"), ("two", "two"), ("two", "zwei"), ("three", "three"), ("four", "four"),
        ("four", "vier"), ("in", "five"),
    }  # fmt: skip
    single = dataclasses.replace(config, path=str(folder / "one.txt"))
    assert [document.source for document in corpora.every_document(single)] == ["one"]


def test_a_long_text_file_becomes_several_documents(config, tmp_path):
    text = "".join(f"paragraph {i}\n" * 20 + "\n" for i in range(1000))
    (tmp_path / "texts" / "long.txt").write_text(text)
    parts = [document.text for document in corpora.every_document(config)]
    assert len(parts) > 3 and "".join(parts) == text
    assert all(len(part) <= 1 << 16 for part in parts)


def test_files_of_other_kinds_are_counted(config, tmp_path, caplog):
    for name in ("a.txt", "b.pdf", "c.pdf", "d"):
        (tmp_path / "texts" / name).write_text("x")
    with caplog.at_level(logging.WARNING):
        assert texts_of(config) == ["x"]
    assert "ignored 3 files of other kinds: 2 .pdf, 1 without a suffix" in caplog.text


BAD = {
    "is empty": lambda f: (f / "x.txt").write_text(" \n\n"),
    "holds no .txt, .jsonl, .jsonl.gz,": lambda f: None,
    "file, only 1 .docx": lambda f: (f / "x.docx").write_text("text"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_leaves_no_dataset(message, config, tmp_path, tokenizer):
    BAD[message](tmp_path / "texts")
    with pytest.raises(UserError) as error:
        pipeline.prepare(config, tokenizer)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "dataset").exists()


def test_a_missing_path_is_refused(config, tmp_path, tokenizer):
    with pytest.raises(UserError, match="no file or folder at"):
        pipeline.prepare(dataclasses.replace(config, path=str(tmp_path / "nowhere")), tokenizer)
    with pytest.raises(UserError, match="no file or folder at"):
        list(corpora.every_document(dataclasses.replace(config, path=str(tmp_path / "nowhere"))))


class FailingTokenizer:
    """Runs out of disk at the second source."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts, workers=0):
        self.calls += 1
        if self.calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._tokenizer.encode_batch(texts)


def test_an_interrupted_run_continues_with_the_next_source(config, corpus_folder, tokenizer, dataset, caplog):
    config = dataclasses.replace(config, path=str(corpus_folder), holdout_fraction=0.1)
    failing = FailingTokenizer(tokenizer)
    with pytest.raises(OSError, match="No space left"):
        pipeline.prepare(config, failing)
    assert not pipeline.Path(config.output).exists()
    with caplog.at_level(logging.INFO):
        summary = pipeline.prepare(config, failing)
    assert failing.calls == 3 and "books is already tokenised" in caplog.text
    straight = records.read_summary(dataset)
    for name in summary.sources:
        for split in records.SPLITS:
            one, two = summary.split(name, split), straight.split(name, split)
            assert (one.documents, one.tokens) == (two.documents, two.tokens)


def test_what_was_done_is_dropped_when_a_file_changes(config, tmp_path, tokenizer):
    folder = tmp_path / "texts"
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(name)
    with pytest.raises(OSError, match="No space left"):
        pipeline.prepare(config, FailingTokenizer(tokenizer))
    (folder / "a.txt").write_text("longer")
    summary = pipeline.prepare(config, tokenizer)
    assert summary.sources["a"].train.text_bytes == len("longer")
    assert not (tmp_path / "dataset.partial").exists()


def test_a_dataset_brings_whichever_tokenizer_it_was_made_with(config, tmp_path):
    (tmp_path / "texts" / "a.txt").write_text("text")
    tokenizer = JsonTokenizer(json.dumps(byte_level_bpe()), bos_id=-1, eos_id=2)
    summary = pipeline.prepare(config, tokenizer)
    again = tokenizers.load(tmp_path / "dataset" / summary.tokenizer)
    assert summary.tokenizer == "tokenizer.json" and (again.bos_id, again.eos_id) == (-1, 2)
    assert again.encode("text") == tokenizer.encode("text")


def test_a_finished_dataset_is_kept_and_another_is_not_overwritten(config, tmp_path, tokenizer):
    (tmp_path / "texts" / "a.txt").write_text("text")
    first = pipeline.prepare(config, tokenizer)
    stamp = (tmp_path / "dataset" / records.SUMMARY).stat().st_mtime_ns
    assert pipeline.prepare(config, tokenizer) == first
    assert (tmp_path / "dataset" / records.SUMMARY).stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="another corpus, tokenizer or settings"):
        pipeline.prepare(dataclasses.replace(config, holdout_fraction=0.5), tokenizer)


def test_a_folder_of_something_else_is_left_alone(config, tmp_path, tokenizer):
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "precious").write_text("!")
    with pytest.raises(UserError, match="exists and is not a dataset"):
        pipeline.prepare(config, tokenizer)
    assert (tmp_path / "dataset" / "precious").read_text() == "!"


def test_source_names_are_fit_for_file_names(tmp_path):
    for name in ("a-b c.txt", "中文.jsonl", ".txt"):
        (tmp_path / name).write_text("x")
    assert list(files.find_sources(tmp_path)) == ["a_b_c", "text", "中文"]
