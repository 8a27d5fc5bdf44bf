"""The experiment as its users run it: a policy of pairs, adapters, resuming, and the mistakes one can make."""

import dataclasses
import json
import random
import signal

import jax
import numpy as np
import pytest

from configs.dpo import small
from experiments import dpo, samples
from llm_jax import config as config_lib
from llm_jax.alignment import dpo as library
from llm_jax.alignment.config import DpoConfig, DpoLossConfig, FineTuneConfig, PairDataConfig, PreferenceConfig
from llm_jax.config import CheckpointConfig, LoraConfig, LossConfig, OptimizerConfig, SamplingConfig
from llm_jax.errors import UserError
from llm_jax.interop import pretrained
from llm_jax.training import metrics
from tests.alignment import base_models
from tests.processes import assert_same_numbers, run_together


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_models.make(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Responses that begin with "three" are better than others."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    draw = random.Random(0)
    with file.open("w") as lines:
        for number in range(80):
            record = {
                "prompt": f"{number} {draw.choice(base_models.WORDS)}",
                "chosen": "three " + draw.choice(base_models.WORDS),
                "rejected": "two " + draw.choice(base_models.WORDS[:2]),
                "strength": 1 + number % 4,
            }
            lines.write(json.dumps(record) + "\n")
    return file


def settings(base, pairs, training=None, **changes):
    values = {
        "model": str(base),
        "steps": 6,
        "log_every": 1,
        "eval_every": 3,
        "optimizer": OptimizerConfig(learning_rate=0.01, warmup_steps=0),
        "loss": LossConfig(chunk_size=16),
        "checkpoint": CheckpointConfig(every_steps=3, keep_last=1),
    }
    config = DpoConfig(
        training=FineTuneConfig(**values | (training or {})),
        preferences=PreferenceConfig(path=str(pairs), holdout_fraction=0.2),
        template="llama2",
        data=PairDataConfig(sequence_length=64, batch_size=8),
        samples=1,
        sampling=SamplingConfig(max_new_tokens=3, num_samples=2),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def trained(base, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "run"
    dpo.run(settings(base, pairs), folder)
    return folder


def weights(folder):
    return jax.device_get(pretrained.load(folder).params)


def test_a_policy_learns_what_is_preferred_and_says_so(trained, capsys):
    first, *_ = metrics.read(trained, "train")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5), "before the first step the policy is its reference"
    assert abs(first["chosen_drift"]) < 1e-5 and abs(first["margin"]) < 1e-4
    last = metrics.read(trained, "heldout")[-1]
    assert last["accuracy"] > 0.9 and last["loss"] < 0.6 and last["margin"] > 0
    assert last["chosen_drift"] > last["rejected_drift"]
    by_strength = [last[f"accuracy/strength_{step}"] for step in range(1, 5)]
    assert min(by_strength) <= last["accuracy"] <= max(by_strength) and "loss/strength_5" not in last
    assert last["loss/pairs"] == last["loss"] and last["accuracy/pairs"] == last["accuracy"]
    said = [json.loads(line) for line in (trained / samples.FILE).read_text().splitlines()]
    assert len(said) == 2 * 2 and len({sample["record"] for sample in said}) == 1
    assert "accuracy" in dpo.summary(trained)
    assert pretrained.load(trained / "best").config.architecture() == base_models.MODEL.architecture()


@pytest.mark.parametrize("adapted", [{}, {"lora": LoraConfig(rank=2)}], ids=["all", "lora"])
def test_resumed_is_as_straight_bit_for_bit(base, pairs, tmp_path, monkeypatch, adapted):
    """Stopped in the middle, by a signal at the first evaluation, and continued with the references that it kept."""
    config = settings(base, pairs, {"keep_best": False, **adapted}, samples=0)
    dpo.run(config, tmp_path / "straight")
    stopping = lambda *_, **__: signal.raise_signal(signal.SIGTERM)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "append_samples", stopping)
        dpo.run(config, tmp_path / "stopped")
    assert metrics.read(tmp_path / "stopped", "train")[-1]["step"] == 3
    with monkeypatch.context() as patch:
        patch.setattr(library, "reference_logprobs", lambda *_: pytest.fail("the references are there"))
        dpo.run(config, tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "stopped"), weights(tmp_path / "straight"))


@pytest.mark.slow
@pytest.mark.parametrize("order", [(), ("tests.parallel.interleaved",)], ids=["by process", "in turns"])
def test_two_processes_train_as_one(base, pairs, trained, tmp_path, order):
    """References, steps and held-out numbers; only samples are left out."""
    config_lib.save(settings(base, pairs), tmp_path / "config.json")
    run_together(["-m", *order, "experiments.dpo", f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/run"])
    references = [np.load(folder / library.REFERENCES)["references"] for folder in (tmp_path / "run", trained)]
    np.testing.assert_allclose(*references, atol=1e-4)
    assert_same_numbers(tmp_path / "run", trained)
    for part in ("", "best"):
        jax.tree.map(
            lambda found, expected: np.testing.assert_allclose(found, expected, atol=2e-4),
            weights(tmp_path / "run" / part),
            weights(trained / part),
        )


@pytest.mark.parametrize("quantize", ["none", pytest.param("int8", marks=pytest.mark.slow)])
def test_beside_adapters_the_reference_is_the_model_without_them(base, pairs, tmp_path, quantize):
    """Rounded, where they are trained beside a rounded one: so the first loss is that of no preference."""
    training = {"steps": 2, "eval_every": 0, "keep_best": False, "lora": LoraConfig(rank=2), "quantize": quantize}
    dpo.run(settings(base, pairs, training, samples=0), tmp_path)
    first, last = metrics.read(tmp_path, "train")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5) and last["loss"] < first["loss"] - 1e-3
    with np.load(tmp_path / library.REFERENCES) as kept:
        expected = kept["references"]
    dpo.run(settings(base, pairs, {"steps": 1, "eval_every": 0, "keep_best": False}, samples=0), tmp_path / "all")
    with np.load(tmp_path / "all" / library.REFERENCES) as kept:
        assert np.array_equal(kept["references"], expected) == (quantize == "none")


def test_plain_texts_have_samples_and_other_losses_other_numbers(base, tmp_path):
    file = tmp_path / "texts.jsonl"
    texts = [f"{number} {base_models.WORDS[number % 3]}" for number in range(100)]
    records = [{"chosen": f"{text} three", "rejected": f"{text} two"} for text in texts]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = {}
    for kind, beta in (("ipo", 0.5), ("normalised", 5.0)):
        training = {"steps": 1, "eval_every": 0, "keep_best": False}
        data = PairDataConfig(sequence_length=64, batch_size=8, packed=False)
        changes = {"preferences": PreferenceConfig(path=str(file), holdout_fraction=0.5), "data": data}
        config = settings(base, file, training, template="none", loss=DpoLossConfig(kind, beta), **changes)
        dpo.run(config, tmp_path / kind)
        found[kind] = metrics.read(tmp_path / kind, "train")[0]["loss"]
        said = [json.loads(line) for line in (tmp_path / kind / samples.FILE).read_text().splitlines()]
        assert [sample["asked"] for sample in said] == ["", ""]
    assert found == {"ipo": pytest.approx(1.0, abs=1e-4), "normalised": pytest.approx(np.log(2), abs=1e-5)}


def test_another_run_is_left_alone(base, pairs, trained):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    for changes, message in (
        ({"loss": DpoLossConfig(beta=0.2)}, r"another config \(loss.beta 0.1 -> 0.2\)"),
        ({"preferences": PreferenceConfig(path=str(pairs), holdout_fraction=0.3)}, "preferences.holdout_fraction"),
    ):
        with pytest.raises(UserError, match=message):
            dpo.run(settings(base, pairs, **changes), trained)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before


def test_the_config_of_the_documents():
    config = config_lib.from_config_dict(DpoConfig, small.get_config())
    assert (config.ratings, config.template, config.loss) == (("en",), "none", DpoLossConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preferences": PreferenceConfig()}, "set --config.preferences.path"),
        ({"data": PairDataConfig(sequence_length=8, batch_size=8)}, "no pair of responses is left"),
        ({"data": PairDataConfig(sequence_length=64, batch_size=512)}, "lower PairDataConfig.batch_size"),
        ({"data": PairDataConfig(sequence_length=128, batch_size=8)}, "max_length=64"),
        ({"template": "chatml"}, "<|im_start|>"),
        ({"training": {"optimizer": OptimizerConfig(warmup_steps=9)}}, "warmup_steps=9"),
        ({"training": {"microbatches": 3}}, "batch_size=8 does not divide into 3 microbatches"),
    ],
    ids=["path", "pairs", "batch", "length", "template", "warm-up", "microbatches"],
)
def test_mistakes_are_one_line_before_the_references(base, pairs, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(library, "reference_logprobs", lambda *_: pytest.fail("they take long"))
    with pytest.raises(UserError) as error:
        dpo.run(settings(base, pairs, **changes), tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_that_would_compare_other_models_are_refused(pairs):
    with pytest.raises(UserError, match="dropout_rate and neftune_alpha must be 0"):
        DpoConfig(training=FineTuneConfig(dropout_rate=0.1))
    with pytest.raises(UserError, match="two sources of pairs: set one"):
        DpoConfig(ratings=("en",), preferences=PreferenceConfig(path=str(pairs)))
