"""The experiment on a small model and corpus of its own: its numbers, its files, and what it refuses."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from experiments import quantize
from experiments.quantize import QuantizeConfig
from llm_jax import models
from llm_jax.config import CorpusConfig, ModelConfig, TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.interop import pretrained
from llm_jax.tokenization.train import train_on_texts
from llm_jax.training import checkpoint

MODEL = ModelConfig(
    vocab_size=296,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=32,
    max_length=32,
    init_std=0.3,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("quantize"), random.Random(0)
    texts = [" ".join(generator.choices(["one", "two", "three", "four"], k=60)) for _ in range(40)]
    (root / "corpus" / "words").mkdir(parents=True)
    for i, text in enumerate(texts):
        (root / "corpus" / "words" / f"{i}.txt").write_text(text)
    (root / "model").mkdir()
    (root / "model" / "tokenizer.model").write_bytes(train_on_texts(texts, TokenizerConfig(vocab_size=280)))
    checkpoint.save_model(root / "model", MODEL, models.init(MODEL, jax.random.key(0)))
    return QuantizeConfig(
        model=str(root / "model"),
        variants=("bfloat16", "int8", "int4:16"),
        documents=3,
        tokens=24,
        save="int4:16",
        corpus=CorpusConfig(path=str(root / "corpus"), holdout_fraction=0.3, workers=1),
    )


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("result") / "run"
    quantize.run(config, folder)
    return folder


def test_fewer_bits_cost_more(config, workdir):
    results = json.loads((workdir / "results.json").read_text())
    rows = results["rows"]
    assert list(rows) == ["float32", *config.variants]
    assert (results["documents"], results["tokens"]) == (3, 3 * 24)
    kl = [row["kl"]["mean"] for row in rows.values()]
    assert kl[0] == 0 and kl[1] < kl[3] / 100 and kl[2] < kl[3] / 20 and kl[3] > 1e-3
    bits = [row["bits_per_weight"] for row in rows.values()]
    assert bits[:2] == [32, 16] and bits == sorted(bits, reverse=True)
    assert rows["float32"]["agreement"]["mean"] == 1 > rows["int4:16"]["agreement"]["mean"]
    nats = results["by_document"]["int4:16"]
    change = np.asarray(nats["nats"]) - np.asarray(nats["reference_nats"])
    assert rows["int4:16"]["increase"]["mean"] == pytest.approx(np.exp(change.mean()) - 1)
    assert f"| int4:16 | {rows['int4:16']['bytes'] / 1e6:.1f} |" in (workdir / "table.md").read_text()


def test_what_it_saves_is_a_run_folder_of_the_rounded_model(config, workdir):
    original, saved = pretrained.load(config.model), pretrained.load(workdir)
    expected = models.quantize(original.params, original.config, "int4", 16)
    assert saved.config == expected[0]
    assert saved.tokenizer.fingerprint == original.tokenizer.fingerprint
    for leaf, wanted in zip(jax.tree.leaves(saved.params), jax.tree.leaves(expected[1])):
        np.testing.assert_array_equal(leaf, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ("int3",), "save": ""}, "'int3' is neither bfloat16 nor like int8, int8:128 or int4:64"),
        ({"variants": ("int8:a",), "save": ""}, "'int8:a' is neither"),
        ({"variants": ("bfloat16:4",), "save": ""}, "'bfloat16:4' is neither"),
        ({"save": "int4:32"}, r"save='int4:32' is not one of the variants bfloat16, int8, int4:16"),
        ({"tokens": 0}, "tokens=0 must be positive"),
    ],
)
def test_mistakes_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **changes)


def test_documents_that_are_too_short_are_named(config, tmp_path):
    with pytest.raises(UserError, match=r"none of \d+ held-out documents has 501 tokens: lower config.tokens or raise"):
        quantize.run(dataclasses.replace(config, tokens=500, variants=(), save=""), tmp_path)


def test_a_folder_with_checkpoints_is_not_written_to(config, workdir):
    with pytest.raises(UserError, match="has checkpoints already"):
        quantize.run(config, workdir)
