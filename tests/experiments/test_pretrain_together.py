"""Runs trained together leave the folders that single runs would: same records, checkpoints that go on alone."""

import dataclasses
import json
import signal

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
)
from llm_jax.data import pipeline
from llm_jax.errors import UserError
from llm_jax.training import metrics
from llm_jax.training.checkpoint import FOLDER, load_model
from tests.data.conftest import ByteTokenizer, write_corpus

RUNS = {"a": (0, 1e-2), "b": (1, 1e-2), "c": (0, 3e-2)}  # seed and learning rate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
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


def make_config(dataset, seed=0, rate=1e-2, **changes):
    config = TrainConfig(
        steps=6,
        seed=seed,
        log_every=2,
        eval_every=3,
        eval_batches=2,
        model=ModelConfig(
            vocab_size=264,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            ffn_size=24,
            max_length=32,
        ),
        loss=LossConfig(chunk_size=16),
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=2),
        mesh=MeshConfig(data=1),
        data=DataConfig(dataset=dataset, sequence_length=32, batch_size=8, seed=seed),
        checkpoint=CheckpointConfig(every_steps=2),
    )
    return dataclasses.replace(config, **changes)


def run_all(dataset, folder, runs=RUNS, **changes):
    configs = [make_config(dataset, *values, **changes) for values in runs.values()]
    pretrain.run_together(configs, [folder / name for name in runs])


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """A single run takes all devices; here they are one, as runs trained together have it."""
    patch = pytest.MonkeyPatch()
    devices = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: devices)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for name, values in RUNS.items():
        pretrain.run(make_config(dataset, *values), folder / name)
    return folder


@pytest.fixture(scope="module")
def together(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    run_all(dataset, folder)
    return folder


def assert_same_run(got, want):
    for kind in ("train", "heldout"):
        records, expected = metrics.read(got, kind), metrics.read(want, kind)
        assert [record["step"] for record in records] == [record["step"] for record in expected]
        for record, other in zip(records, expected):
            assert list(record) == list(other)
            for name in set(record) - {"kind", "tokens_per_second", "mfu"}:
                assert record[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    (config, params, step), (other_config, other_params, other_step) = load_model(got), load_model(want)
    assert (config, step) == (other_config, other_step)
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(other_params), strict=True):
        np.testing.assert_allclose(leaf, other, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_each_folder_is_that_of_a_single_run(name, alone, together):
    assert_same_run(together / name, alone / name)
    for file in ("config.json", "dataset.json", "tokenizer.model"):
        assert (together / name / file).read_bytes() == (alone / name / file).read_bytes()
    saved = {path.name for path in (alone / name / FOLDER).iterdir()}
    assert {path.name for path in (together / name / FOLDER).iterdir()} == saved == {"2", "4", "6"}


def test_the_runs_are_not_the_same_run(together):
    losses = [metrics.read(together / name, "train")[-1]["loss"] for name in RUNS]
    assert len({round(loss, 4) for loss in losses}) == 3


@pytest.fixture
def stop_after_three(monkeypatch):
    """Sends SIGTERM after the third step of the first run that it sees."""
    reports = []

    class StopAfterThree(pretrain.Loop):
        def _report(self, *arguments):
            super()._report(*arguments)
            reports.append(arguments[1])
            if len(reports) == 2:  # after steps 2 and 3
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(pretrain, "Loop", StopAfterThree)


def test_stopped_runs_go_on_together_or_alone(dataset, alone, tmp_path, stop_after_three):
    run_all(dataset, tmp_path)
    assert [load_model(tmp_path / name)[2] for name in RUNS] == [3, 3, 3]
    pretrain.run(make_config(dataset, *RUNS["b"]), tmp_path / "b")
    run_all(dataset, tmp_path)  # of which b is finished
    for name in RUNS:
        assert_same_run(tmp_path / name, alone / name)


def test_runs_at_different_steps_are_finished(dataset, alone, tmp_path, stop_after_three):
    pretrain.run_together([make_config(dataset, *RUNS[name]) for name in "ab"], [tmp_path / name for name in "ab"])
    run_all(dataset, tmp_path)  # c begins
    for name in RUNS:
        assert_same_run(tmp_path / name, alone / name)


def test_a_diverged_run_is_named_after_the_others_are_finished(dataset, alone, tmp_path):
    runs = {**RUNS, "wild": (5, 1e30)}
    with pytest.raises(UserError, match=r"^1 of 4 runs trained together diverged: .*wild: non-finite loss .* at step"):
        run_all(dataset, tmp_path, runs)
    for name in RUNS:
        assert_same_run(tmp_path / name, alone / name)
    record = json.loads((tmp_path / "wild" / metrics.FILE).read_text().splitlines()[-1])
    assert record["kind"] == "failed" and not np.isfinite(record["parameter_norm"])
    saved = [int(path.name) for path in (tmp_path / "wild" / FOLDER).iterdir() if path.name.isdigit()]
    assert all(step < record["step"] for step in saved)
    with pytest.raises(UserError, match=r"^2 of 2 runs trained together diverged"):
        run_all(dataset, tmp_path / "both", {"x": (5, 1e30), "y": (6, 1e30)})


def test_a_stop_is_no_divergence_and_reaches_the_runs_at_other_steps(dataset, tmp_path, stop_after_three):
    runs = {"a": RUNS["a"], "wild": (5, 1e30)}
    run_all(dataset, tmp_path, runs)  # returns: its launcher must not take the stop for a failure
    assert load_model(tmp_path / "a")[2] == 3
    assert "failed" in (tmp_path / "wild" / metrics.FILE).read_text()


def test_a_stop_during_the_last_evaluation_is_not_lost(dataset, tmp_path, monkeypatch):
    configs = [make_config(dataset, *values) for values in RUNS.values()]
    for config, name in zip(configs, RUNS):
        with pretrain.open_checkpoints(config, tmp_path / name) as checkpointer:
            if name != "c":  # a and b begin at step 5 of 6, c at 0
                mesh = pretrain.mesh_lib.build(MeshConfig(), jax.local_devices()[:1])
                checkpointer.save(pretrain.first_state(config, checkpointer, mesh)[0], 5)
    evaluation = pretrain.heldout_evaluation

    def interrupted(*arguments, **options):
        evaluate = evaluation(*arguments, **options)
        return lambda params: (signal.raise_signal(signal.SIGTERM), evaluate(params))[1]

    monkeypatch.setattr(pretrain, "heldout_evaluation", interrupted)
    pretrain.run_together(configs, [tmp_path / name for name in RUNS])
    assert [load_model(tmp_path / name)[2] for name in "ab"] == [6, 6]
    assert not (tmp_path / "c" / metrics.FILE).exists()


def test_a_diverged_single_run_says_so_in_its_records(dataset, tmp_path):
    with pytest.raises(UserError, match=r"^non-finite loss"):
        run_all(dataset, tmp_path, {"wild": (5, 1e30)})
    (record,) = metrics.read(tmp_path / "wild", metrics.FAILED)
    assert not np.isfinite(record["parameter_norm"])
    assert json.loads((tmp_path / "wild" / metrics.FILE).read_text().splitlines()[-1])["kind"] == "failed"


@pytest.mark.parametrize("text", ['{"fing', "[]"])
def test_a_damaged_note_of_the_dataset_is_one_line(dataset, tmp_path, text):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset.json is damaged, so the dataset of that run is not known: delete"):
        run_all(dataset, tmp_path, {"a": RUNS["a"]})


def test_runs_that_differ_in_more_are_refused_before_anything_is_written(dataset, tmp_path):
    config = make_config(dataset)
    wider = dataclasses.replace(config, seed=1, model=dataclasses.replace(config.model, ffn_size=32))
    folders = [tmp_path / "a", tmp_path / "b"]
    for configs, message in (
        ([config, wider], r"a and .*/b cannot be trained together: they differ in model.ffn_size 24 and 32; only seed"),
        ([config, dataclasses.replace(config, steps=7)], "differ in steps 6 and 7"),
        ([dataclasses.replace(config, mesh=MeshConfig(tensor=2))] * 2, "share one device of one process, but"),
        ([dataclasses.replace(config, profile_steps=2)] * 2, "are not profiled"),
        ([config], "1 configs for 2 folders"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain.run_together(configs, folders)
    with pytest.raises(UserError, match="need a folder each"):
        pretrain.run_together([config, config], [folders[0]] * 2)
    assert not folders[0].exists()


def test_one_run_is_a_single_run(dataset, alone, tmp_path):
    run_all(dataset, tmp_path, {"b": RUNS["b"]})
    assert_same_run(tmp_path / "b", alone / "b")
