"""Training a model further: interrupted is as straight, the best is kept, and other runs are left alone."""

import dataclasses
import itertools
import json
import signal

import jax
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import models
from llm_jax.alignment import finetune
from llm_jax.alignment.config import FineTuneConfig, SftConfig
from llm_jax.config import CheckpointConfig, LoraConfig, LossConfig, OptimizerConfig
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.interop import pretrained
from llm_jax.models import lora
from llm_jax.training import language_model, metrics
from tests.alignment import base_models

STEPS, ROWS, LENGTH = 6, 8, 8
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
LORA = LoraConfig(rank=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_models.make(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(settings(base), task(losses=[3.0, 1.0, 2.0]), folder)
    return folder


def settings(base, **changes):
    values = {"model": str(base), "steps": STEPS, "log_every": 1, "eval_every": 2, "optimizer": OPTIMIZER}
    values |= {"checkpoint": CheckpointConfig(every_steps=2, keep_last=1)}
    return FineTuneConfig(**values | changes)


def batch(step):
    ids = np.random.default_rng(step).integers(0, 300, (ROWS, LENGTH + 1)).astype(np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, ones * np.arange(LENGTH, dtype=np.int32))


def task(stop_at=-1, losses=None, fingerprint="data"):
    """Random tokens; asked to stop while step `stop_at` is read; judged by the given losses, or by falling ones."""
    judged = iter(losses) if losses else itertools.count(9, -1)

    def batches(start):
        for step in itertools.count(start):
            if step == stop_at:
                signal.raise_signal(signal.SIGTERM)
            yield batch(step)

    return finetune.Task(
        loss=lambda model: language_model.loss_function(model, LossConfig()),
        batches=batches,
        evaluate=lambda model, params: {"loss": float(next(judged))},
        steps_per_epoch=3,
        batch_size=ROWS,
        sequence_length=LENGTH,
        fingerprint=fingerprint,
    )


def train(config, what, workdir):
    mesh = finetune.build_mesh(config)
    model = finetune.load(config, mesh)
    return finetune.train(config, model, what, workdir, mesh, SftConfig(training=config))


def weights(folder):
    return jax.device_get(pretrained.load(folder).params)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def differs(found, expected):
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), found, expected)))


@pytest.mark.parametrize("changes", [{}, {"lora": LORA, "quantize": "int8"}], ids=["all", "qlora"])
def test_interrupted_is_as_straight_bit_for_bit(base, tmp_path, changes):
    config = settings(base, **changes)
    assert train(config, task(), tmp_path / "straight")
    assert not train(config, task(stop_at=3), tmp_path / "stopped")
    assert train(config, task(), tmp_path / "stopped")
    straight = weights(tmp_path / "straight")
    assert_same(weights(tmp_path / "stopped"), straight)
    assert differs(straight, weights(base))
    assert [r["step"] for r in metrics.read(tmp_path / "stopped", "train")] == list(range(1, STEPS + 1))


def test_adapters_leave_the_rest_alone_and_are_merged_in_the_end(base, tmp_path):
    config = settings(base, lora=dataclasses.replace(LORA, targets=("query",)))
    train(config, task(), tmp_path)
    before, after = weights(base), weights(tmp_path)
    assert differs(after["layers"]["attention"].pop("query"), before["layers"]["attention"].pop("query"))
    assert_same(after, before)
    abstract = lora.abstract(base_models.MODEL, config.lora)
    assert json.loads((tmp_path / "config.json").read_text())["training"]["lora"]["rank"] == 2
    assert lora.count(base_models.MODEL, config.lora) == sum(leaf.size for leaf in jax.tree.leaves(abstract))


def test_the_best_model_is_kept(base, finished, tmp_path):
    """Evaluated after steps 2, 4 and 6, of which the second was best; or after the last alone."""
    assert [path.name for path in (finished / "best" / "checkpoints").iterdir()] == ["4"]
    assert differs(weights(finished / "best"), weights(finished))
    train(settings(base, eval_every=0), task(losses=[3.0]), tmp_path)
    assert_same(weights(tmp_path / "best"), weights(tmp_path))


def test_the_best_model_of_a_continued_run_is_that_of_the_whole_run(base, tmp_path):
    config = settings(base)
    train(config, task(losses=[1.0, 9.0], stop_at=3), tmp_path)
    train(config, task(losses=[2.0, 3.0]), tmp_path)
    assert [path.name for path in (tmp_path / "best" / "checkpoints").iterdir()] == ["2"]


def test_no_best_model_where_none_is_wanted(base, tmp_path):
    train(settings(base, keep_best=False), task(), tmp_path)
    assert not (tmp_path / "best").exists()


def test_epochs_become_steps_and_a_share_of_them_warms_up(base, tmp_path):
    config = settings(base, steps=0, epochs=1.5, warmup_fraction=0.5)
    train(config, task(), tmp_path)
    rates = [record["learning_rate"] for record in metrics.read(tmp_path, "train")]
    assert len(rates) == 5  # of 3 steps each, rounded up
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_gradients_reach_adapters_alone(base, quantize):
    """The part that is trained holds adapters only; the model beside them is handed over as it is."""
    config = settings(base, lora=LORA, quantize=quantize)
    mesh = finetune.build_mesh(config)
    model = finetune.load(config, mesh)
    part = finetune._adapters(config, model, mesh)
    assert part.config.quantization == quantize
    first = part.first().params
    assert jax.tree.structure(first) == jax.tree.structure(lora.abstract(base_models.MODEL, LORA))
    kept = part.merge(first, *part.frozen)  # before the first step, adapters change nothing
    expected = models.init(base_models.MODEL, jax.random.key(0))
    assert differs(kept, expected) == (quantize != "none")


@pytest.mark.parametrize(
    ("changes", "fingerprint", "message"),
    [
        ({"seed": 1}, "data", r"holds a run of another config \(training.seed 0 -> 1\)"),
        ({"lora": LORA}, "data", r"training.lora.rank 0 -> 2"),
        ({}, "other", "holds a run on other data"),
    ],
)
def test_another_run_is_left_alone(base, finished, changes, fingerprint, message):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        train(settings(base, **changes), task(fingerprint=fingerprint), finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"steps": 3}', "another experiment's run, or a damaged config.json: choose another --workdir"),
        ("config.json", "{", "another experiment's run, or a damaged config.json: choose another --workdir"),
        ("data.json", "{", "data.json is damaged"),
        ("data.json", "[]", "data.json is damaged"),
    ],
)
def test_a_folder_that_is_no_run_of_this_kind_is_refused(base, tmp_path, name, content, message):
    whole = SftConfig(training=settings(base))
    config_lib.save(whole, tmp_path / "config.json")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        finetune.check_folder(whole, "data", tmp_path)


def test_what_does_not_decide_numbers_may_change(base, finished):
    changed = settings(base, log_every=2, eval_every=3, attention="chunked")
    finetune.check_folder(SftConfig(training=changed), task().fingerprint, finished)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantize": "int8"}, "set lora.rank to train"),
        ({"warmup_fraction": 1.0}, r"must be in \[0, 1\)"),
        ({"epochs": 0.0}, "must be positive"),
        ({"model": ""}, "set --config.training.model"),
    ],
)
def test_mistakes_are_one_line(base, tmp_path, values, message):
    with pytest.raises(UserError, match=message) as error:
        train(settings(base, **values), task(), tmp_path)
    assert "\n" not in str(error.value)
