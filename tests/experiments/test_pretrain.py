"""Pre-training as a user runs it: it learns, resumes bit for bit on any mesh, stops cleanly and refuses mistakes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import pretrain
from llm_jax.config import (
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    save,
)
from llm_jax.data import pipeline
from llm_jax.errors import UserError
from llm_jax.training import metrics
from llm_jax.training.checkpoint import load_model, save_model
from tests.data.conftest import ByteTokenizer, write_corpus
from tests.processes import run_together


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    write_corpus(folder / "texts")
    (folder / "tokenizer.model").write_bytes(b"a model file")
    config = CorpusConfig(
        path=str(folder / "texts"),
        tokenizer=str(folder / "tokenizer.model"),
        output=str(folder / "dataset"),
        holdout_fraction=0.1,
    )
    pipeline.prepare(config, ByteTokenizer())
    return str(folder / "dataset")


def make_config(dataset, **changes):
    config = TrainConfig(
        steps=6,
        log_every=1,
        eval_every=3,
        eval_batches=2,
        model=ModelConfig(
            vocab_size=264,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=8,
            ffn_size=48,
            max_length=32,
            norm_head=True,
        ),
        loss=LossConfig(chunk_size=16),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        data=DataConfig(dataset=dataset, sequence_length=32, batch_size=16),
        checkpoint=CheckpointConfig(every_steps=2),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    pretrain.run(make_config(dataset), workdir)
    return workdir


def params_of(workdir):
    return jax.tree.leaves(jax.device_get(load_model(workdir)[1]))


def test_learns_and_records(straight):
    records = metrics.read(straight, "train")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    # Unit rows against states of norm sqrt(D) make logits of variance 1 at first: half a nat above uniform.
    assert records[0]["loss"] == pytest.approx(np.log(264) + 0.5, abs=0.2)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    heldout = metrics.read(straight, "heldout")
    assert [r["step"] for r in heldout] == [3, 6]
    # One byte is one token here, plus a document's end: bits per byte is a little above loss / ln 2.
    for source in ("books", "letters"):
        ratio = heldout[-1][f"bits_per_byte/{source}"] / (heldout[-1][f"loss/{source}"] / np.log(2))
        assert 1.0 < ratio < 1.05
    assert (straight / "tokenizer.model").read_bytes() == b"a model file"
    assert json.loads((straight / "config.json").read_text())["steps"] == 6


@pytest.fixture
def stop_after_three(monkeypatch):
    """Sends SIGTERM after the third step of the first run that it sees."""
    reports = []

    class StopAfterThree(pretrain.Loop):
        def _report(self, *arguments):
            super()._report(*arguments)
            reports.append(arguments)
            if len(reports) == 3:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(pretrain, "Loop", StopAfterThree)


def losses_of(workdir):
    return [record["loss"] for record in metrics.read(workdir, "train")]


def test_resumed_equals_straight_bit_for_bit(dataset, straight, tmp_path, stop_after_three):
    pretrain.run(make_config(dataset), tmp_path)
    assert load_model(tmp_path)[2] == 3
    pretrain.run(make_config(dataset), tmp_path)
    for got, want in zip(params_of(tmp_path), params_of(straight), strict=True):
        np.testing.assert_array_equal(got, want)
    assert losses_of(tmp_path) == losses_of(straight)


def test_continues_on_another_mesh_with_other_microbatches(dataset, straight, tmp_path, stop_after_three):
    pretrain.run(make_config(dataset, mesh=MeshConfig(replica=1, data=2, tensor=4), microbatches=2), tmp_path)
    pretrain.run(make_config(dataset), tmp_path)
    np.testing.assert_allclose(losses_of(tmp_path), losses_of(straight), rtol=1e-4)
    assert load_model(tmp_path)[2] == 6
    pretrain.run(make_config(dataset), tmp_path)  # finished: nothing is left to do
    assert len(losses_of(tmp_path)) == 6


def test_begins_with_a_model_that_was_put_there(dataset, straight, tmp_path):
    """Trained on from a trained model: the first loss is as low as the last one was, and steps count from one."""
    config, params, _ = load_model(straight)
    save_model(tmp_path, config, params)
    pretrain.run(make_config(dataset, steps=3), tmp_path)
    losses = [r["loss"] for r in metrics.read(straight, "train")]
    begun = metrics.read(tmp_path, "train")
    assert [r["step"] for r in begun] == [1, 2, 3]
    assert begun[0]["loss"] < losses[0] - 0.4


def test_a_workdir_of_another_config_is_refused_and_kept(dataset, straight):
    before = (straight / "config.json").read_text()
    config = make_config(dataset)
    with pytest.raises(UserError, match=r"another config \(model.ffn_size 48 -> 64\)"):
        pretrain.run(dataclasses.replace(config, model=dataclasses.replace(config.model, ffn_size=64)), straight)
    with pytest.raises(UserError, match=r"another config \(steps 6 -> 8\)"):
        pretrain.run(dataclasses.replace(config, steps=8), straight)
    assert (straight / "config.json").read_text() == before


def test_mistakes_are_named_before_anything_is_written(dataset, tmp_path):
    config = make_config(dataset)
    small = dataclasses.replace(config.model, vocab_size=200)
    cases = {
        "has a vocabulary of 259, config.model.vocab_size is 200": {"model": small},
        "batch_size=12 does not divide": {"data": dataclasses.replace(config.data, batch_size=12)},
        "8 devices; the nearest": {"mesh": MeshConfig(data=3)},
        "its 'kv_heads' axis of size 4 does not divide over 8 devices": {"mesh": MeshConfig(tensor=8)},
        "set --config.data.dataset": {"data": dataclasses.replace(config.data, dataset="")},
    }
    for message, change in cases.items():
        with pytest.raises(UserError, match=message):
            pretrain.run(dataclasses.replace(config, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_non_finite_loss_stops_before_its_step_is_saved(dataset, tmp_path):
    config = make_config(dataset)
    diverging = OptimizerConfig(learning_rate=1e30, warmup_steps=0)
    every_step = CheckpointConfig(every_steps=1, keep_last=9)
    with pytest.raises(UserError, match=r"non-finite loss .* at step .*, global batch") as caught:
        pretrain.run(dataclasses.replace(config, optimizer=diverging, checkpoint=every_step), tmp_path)
    failed = int(re.search(r"at step (\d+)", str(caught.value)).group(1))
    folder = tmp_path / "checkpoints"
    assert not [path.name for path in folder.iterdir() if path.name.isdigit() and int(path.name) >= failed]


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint(dataset, tmp_path):
    config = make_config(dataset, steps=100_000, eval_every=0)
    save(config, tmp_path / "wanted.json")
    command = [sys.executable, "-m", "experiments.pretrain", f"--config={tmp_path}/wanted.json"]
    process = subprocess.Popen([*command, f"--workdir={tmp_path}/run"], stderr=subprocess.PIPE, env=dict(os.environ))
    path = tmp_path / "run" / metrics.FILE
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    assert load_model(tmp_path / "run")[2] >= 5


def test_a_corpus_too_small_to_hold_anything_out_still_trains(tmp_path):
    (tmp_path / "text.txt").write_text("one short document\n" * 50)
    (tmp_path / "tokenizer.model").write_bytes(b"a model file")
    corpus = CorpusConfig(
        path=str(tmp_path / "text.txt"),
        tokenizer=str(tmp_path / "tokenizer.model"),
        output=str(tmp_path / "dataset"),
    )
    pipeline.prepare(corpus, ByteTokenizer())
    pretrain.run(make_config(str(tmp_path / "dataset"), steps=3, optimizer=OptimizerConfig(warmup_steps=1)), tmp_path)
    assert "loss" not in metrics.read(tmp_path, "heldout")[-1]
    assert metrics.read(tmp_path, "train")[-1]["step"] == 3


def test_another_dataset_or_tokenizer_is_refused(dataset, straight, tmp_path):
    other = shutil.copytree(dataset, tmp_path / "other")
    pretrain.run(make_config(str(other)), straight)  # the same data elsewhere will do
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"fingerprint": "another"}))
    with pytest.raises(UserError, match="a run on another dataset than"):
        pretrain.run(make_config(str(other)), straight)


def test_sequences_longer_than_the_model_is_trained_for_are_refused(dataset):
    with pytest.raises(UserError, match=r"sequence_length=64 is longer than ModelConfig.max_length=32"):
        make_config(dataset, data=DataConfig(dataset=dataset, sequence_length=64, batch_size=16))


@pytest.mark.slow
@pytest.mark.parametrize("order", [(), ("tests.parallel.interleaved",)], ids=["by process", "in turns"])
def test_two_processes_train_as_one(dataset, straight, tmp_path, order):
    """Two real processes of four devices each, joined by gloo, take the steps of one process of eight."""
    save(make_config(dataset), tmp_path / "wanted.json")
    run_together(
        ["-m", *order, "experiments.pretrain", f"--config={tmp_path}/wanted.json", f"--workdir={tmp_path}/run"]
    )
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(straight), rtol=1e-5)
    for got, want in zip(params_of(tmp_path / "run"), params_of(straight), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
