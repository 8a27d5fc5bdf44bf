"""The baselines against other implementations and against sums written out token by token."""

import gzip
import lzma
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from llm_jax.data import records
from llm_jax.data.records import SourceSummary, SplitWriter, Summary
from llm_jax.evaluation import baselines

VOCAB = 7
TEXTS = ["the quick brown fox\n" * 40, "天地玄黄，宇宙洪荒。" * 30, "def f(x):\n    return x\n" * 25]


def write_dataset(folder: Path, documents: dict[str, dict[str, list[list[int]]]]) -> Path:
    """A dataset of given token lists: {source: {split: documents}}."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"")
    sources = {}
    for source, splits in documents.items():
        sides = {}
        for split, rows in splits.items():
            writer = SplitWriter(folder, source, split, VOCAB)
            for index, tokens in enumerate(rows):
                writer.add(tokens, 1, str(index))
            sides[split] = writer.finish()
        sources[source] = SourceSummary("en", 0, **sides)
    records.write_metadata(folder, Summary(VOCAB, "tokenizer.model", "", "", sources))
    return folder


@pytest.mark.parametrize(
    ("name", "unpack"),
    [("gzip -9", gzip.decompress), ("xz -9e", lzma.decompress)],
)
def test_compressors_keep_every_byte(name, unpack):
    data = "".join(TEXTS).encode()
    packed = baselines.COMPRESSORS[name](data)
    assert unpack(packed) == data
    assert len(packed) == baselines.compressed_bytes(TEXTS)[name]


@pytest.mark.parametrize("name", baselines.COMPRESSORS)
def test_compressors_agree_with_their_command_lines(name, tmp_path):
    command = name.split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    data = "".join(TEXTS).encode() + np.random.default_rng(0).bytes(3000)
    packed = subprocess.run([*command, "-c"], input=data, capture_output=True, check=True).stdout
    # The tools may choose another checksum or store a name: some bytes, not some percent.
    assert abs(len(packed) - len(baselines.COMPRESSORS[name](data))) <= 16


def test_unigram_nats_token_by_token():
    train, heldout = [0, 1, 1, 2, 2, 2, 5], [1, 2, 2, 6]
    expected = -sum(math.log((train.count(t) + 1) / (len(train) + VOCAB)) for t in heldout)
    counts = [np.bincount(tokens, minlength=VOCAB) for tokens in (train, heldout)]
    assert baselines.unigram_nats(*counts) == pytest.approx(expected, rel=1e-12)


def test_unigram_probabilities_sum_to_one():
    train = np.array([5, 0, 0, 2, 1, 0, 9])
    nats = [baselines.unigram_nats(train, np.eye(VOCAB, dtype=int)[token]) for token in range(VOCAB)]
    assert np.exp(-np.array(nats)).sum() == pytest.approx(1.0, rel=1e-12)


def test_unigram_is_fitted_on_all_training_tokens_but_each_documents_first(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "READ_DOCUMENTS", 2)  # so that a source takes several reads
    documents = {
        "a": {"train": [[1, 3, 3, 2], [1, 4, 2], [1, 3, 2]], "heldout": [[1, 3, 4, 2]]},
        "b": {"train": [[1, 5, 5, 5, 2]], "heldout": [[1, 6, 2], [1, 2]]},
    }
    folder = write_dataset(tmp_path / "data", documents)
    train = [token for splits in documents.values() for row in splits["train"] for token in row[1:]]

    def nats(source: str) -> float:
        tokens = [token for row in documents[source]["heldout"] for token in row[1:]]
        return -sum(math.log((train.count(t) + 1) / (len(train) + VOCAB)) for t in tokens)

    assert baselines.unigram_heldout(folder) == pytest.approx({"a": nats("a"), "b": nats("b")}, rel=1e-12)


def test_a_source_without_heldout_documents_costs_nothing(tmp_path):
    folder = write_dataset(tmp_path / "data", {"a": {"train": [[1, 3, 2]], "heldout": []}})
    assert baselines.unigram_heldout(folder) == {"a": 0.0}
