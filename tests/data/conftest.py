"""A byte-level tokenizer, a small folder of texts, and the dataset made from it."""

import hashlib
import json
import random

import pytest

from llm_jax.config import CorpusConfig
from llm_jax.data import pipeline


class ByteTokenizer:
    """One id a byte, and both specials."""

    vocab_size = 259
    bos_id = 256
    eos_id = 257
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode_batch(self, texts, workers=0):
        return [list(text.encode()) for text in texts]

    def save(self, folder):
        path = folder / "tokenizer.model"
        path.write_bytes(b"a model file")
        return path

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode()


def write_corpus(folder, seed=0):
    """Two sources: `letters`, many short texts in one file, and `books`, long ones in a folder."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "letters.jsonl").open("w") as lines:
        for i in range(200):
            words = " ".join(
                generator.choice(["alpha", "beta", "中文", "字", "gamma"]) for _ in range(generator.randint(1, 30))
            )
            lines.write(json.dumps({"text": f"letter {i}: {words}"}) + "\n")
    (folder / "books").mkdir()
    for i in range(12):
        text = "\n".join(f"{i} {generator.random()}" for _ in range(100))
        (folder / "books" / f"{i}.txt").write_text(text)


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, corpus_folder):
    """The prepared dataset's folder, for reading only."""
    output = tmp_path_factory.mktemp("prepared") / "dataset"
    config = CorpusConfig(path=str(corpus_folder), output=str(output), holdout_fraction=0.1)
    pipeline.prepare(config, ByteTokenizer())
    return output
