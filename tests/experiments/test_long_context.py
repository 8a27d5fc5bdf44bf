"""The experiment on a small corpus of its own: its files, what it reuses, and what it refuses."""

import dataclasses
import json
import random

import numpy as np
import pytest

from experiments import long_context, runner
from experiments.long_context import LongContextConfig
from llm_jax import models
from llm_jax.config import CorpusConfig, DataConfig, ModelConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from llm_jax.data import records
from llm_jax.errors import UserError
from llm_jax.evaluation.long_context import EXTENSIONS
from llm_jax.interop import pretrained

ROWS = [*EXTENSIONS, "ALiBi"]
TRAIN = TrainConfig(
    steps=12,
    eval_every=0,
    eval_batches=1,
    model=ModelConfig(
        vocab_size=300,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        ffn_size=16,
        max_length=16,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    data=DataConfig(sequence_length=16, batch_size=8),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("corpus"), random.Random(0)
    (folder / "words").mkdir()
    for i in range(40):
        words = (generator.choice(["one", "two", "three", "four"]) for _ in range(100))
        (folder / "words" / f"{i}.txt").write_text(f"{i}: {' '.join(words)}")
    return LongContextConfig(
        multiples=(1, 4),
        documents=3,
        corpus=CorpusConfig(path=str(folder), holdout_fraction=0.2, workers=1),
        tokenizer=TokenizerConfig(vocab_size=280, workers=1),
        train=TRAIN,
    )


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "run"
    long_context.run(config, folder)
    return folder


def test_it_writes_a_table_numbers_and_figures(config, workdir):
    results = json.loads((workdir / "results.json").read_text())
    assert list(results["rows"]) == ROWS
    assert all(list(row) == ["16", "64"] for row in results["rows"].values())
    assert (results["documents"], results["tokens"]) == (3, 3 * 64)
    text = (workdir / "table.md").read_text()
    assert "|  | 16 | 64 |" in text and "| ALiBi |" in text and results["command"] in text
    # Nothing that only acts past the trained length acts at it.
    at_trained = [results["nats_by_document"][name]["16"] for name in EXTENSIONS]
    assert all(row == at_trained[0] for row in at_trained)
    assert results["nats_by_document"]["+ log-n"]["64"] != results["nats_by_document"]["+ dynamic NTK"]["64"]
    assert all((workdir / name).stat().st_size > 5000 for name in ("perplexity.png", "position.png"))


def test_a_cell_is_what_the_loaded_model_gives(config, workdir):
    """Perplexity at the greatest length, from the dataset's held-out texts and the plain logits."""
    model = pretrained.load(workdir / "rope_seed0")
    texts = long_context.heldout_texts(config.corpus)
    assert sorted(texts) == sorted(records.heldout_texts(workdir / "data" / "dataset", "words"))
    nats = []
    for text in texts[:3]:
        ids = np.array([model.tokenizer.bos_id, *model.tokenizer.encode(text)])[:65]
        logits = np.asarray(models.logits(model.params, model.config, ids[None, :-1])[0], np.float64)
        nats.append(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(64), ids[1:]]))
    results = json.loads((workdir / "results.json").read_text())
    assert results["rows"]["plain RoPE"]["64"]["perplexity"]["mean"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)


def test_a_second_run_trains_nothing_again(config, workdir, monkeypatch, capsys):
    before = json.loads((workdir / "results.json").read_text())["rows"]
    monkeypatch.setattr(long_context.pretrain, "run", None)
    monkeypatch.setattr(long_context.own_dataset.train_tokenizer, "run", None)
    long_context.run(config, workdir)
    assert capsys.readouterr().out.count("trained earlier") == 2
    assert json.loads((workdir / "results.json").read_text())["rows"] == before


def test_a_given_model_is_measured_without_training(config, workdir, tmp_path):
    given = dataclasses.replace(config, model=str(workdir / "rope_seed0"), trained_length=8, multiples=(2, 8))
    report = long_context.run(given, tmp_path)
    assert [(name, list(row)) for name, row in report.items()] == [(name, [16, 64]) for name in EXTENSIONS]
    results = json.loads((workdir / "results.json").read_text())["rows"]
    got, want = report["plain RoPE"][64].perplexity.mean, results["plain RoPE"]["64"]["perplexity"]["mean"]
    assert got == pytest.approx(want, rel=1e-6)
    assert not (tmp_path / "tokenizer").exists()


def test_other_settings_in_the_same_workdir_are_refused(config, workdir):
    changed = dataclasses.replace(config, train=dataclasses.replace(TRAIN, seed=0, steps=11))
    with pytest.raises(UserError, match="another config"):
        long_context.run(changed, workdir)
    changed = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, vocab_size=281))
    with pytest.raises(UserError, match="tokenizer of other settings"):
        long_context.run(changed, workdir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multiples": (1, 3, 4)}, "each must divide the greatest"),
        ({"multiples": ()}, "each must divide the greatest"),
        ({"seeds": ()}, "name one seed"),
        ({"documents": 0}, "documents=0 must be positive"),
        ({"longest_window": -1}, "longest_window=-1 must not be negative"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        LongContextConfig(**changes)


def test_a_path_that_holds_no_model_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="no model at"):
        long_context.run(dataclasses.replace(config, model=str(tmp_path / "none")), tmp_path)


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_the_configs_are_consistent(name):
    config = runner.load_config(f"configs/long_context/{name}.py", LongContextConfig)
    assert config.train.model.max_length == config.train.data.sequence_length
    assert config.train.model.vocab_size == config.tokenizer.vocab_size
