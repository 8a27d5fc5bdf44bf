"""The experiment as its users run it: a reward model of pairs, PMP, its evaluation, and the mistakes one can make."""

import dataclasses
import json
import random

import numpy as np
import pytest

from experiments import reward_model, reward_report
from llm_jax import config as config_lib
from llm_jax.alignment import reward
from llm_jax.alignment.config import FineTuneConfig, PreferenceConfig, RewardConfig, RewardDataConfig, RewardLossConfig
from llm_jax.alignment.rewards import Response
from llm_jax.config import MeshConfig, OptimizerConfig
from llm_jax.errors import UserError
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.tokenization.chat import Message
from tests.alignment import base_models
from tests.processes import assert_same_numbers, run_together


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_models.make(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Responses with "three" are better than others, and "two one" is unsafe."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    draw = random.Random(0)
    with file.open("w") as lines:
        for number in range(80):
            last = draw.choice(base_models.WORDS[:2])
            record = {
                "prompt": f"{number} {draw.choice(base_models.WORDS)}",
                "chosen": "three " + draw.choice(base_models.WORDS),
                "rejected": f"two {last}",
                "strength": 1 + number % 4,
                "chosen_safe": True,
                "rejected_safe": last != "one",
                "category": "short" if number % 8 else "rare",
            }
            lines.write(json.dumps(record) + "\n")
    return file


def settings(base, pairs, **changes):
    training = FineTuneConfig(
        model=str(base), epochs=2.0, eval_every=0, optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=0)
    )
    values = {
        "training": training,
        "preferences": PreferenceConfig(path=str(pairs), holdout_fraction=0.2),
        "template": "llama2",
        "data": RewardDataConfig(sequence_length=64, batch_size=8),
        "loss": RewardLossConfig(margin="small", safety_coefficient=0.5),
    }
    return RewardConfig(**values | changes)


@pytest.fixture(scope="module")
def trained(base, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    reward_model.run(settings(base, pairs), folder)
    return folder


def test_what_people_prefer_gets_the_higher_reward(trained):
    model = reward.load(trained, mesh_lib.build(MeshConfig()))
    prompts = [(Message("user", "7 one"),)] * 2
    better, worse = model(prompts, [Response("three two"), Response("two two")])
    assert better > worse
    judged = json.loads((trained / "evaluation.json").read_text())
    assert judged["pairs"]["pairs"]["accuracy"] > 0.9
    assert judged["unsafe"]["0.5"]["recall"] > 0.7 and judged["unsafe"]["0.5"]["precision"] > 0.7
    assert set(judged["pairs"]["pairs"]["by_strength"]) <= set("1234")
    scores = [json.loads(line) for line in (trained / "scores.jsonl").read_text().splitlines()]
    right = np.mean([score["chosen"] > score["rejected"] for score in scores])
    assert right == pytest.approx(judged["pairs"]["pairs"]["accuracy"])
    assert json.loads((trained / "reward.json").read_text())["offset"] == 0  # where safety begins, and no mean
    assert judged["training_pairs"] == 80 - judged["pairs"]["pairs"]["pairs"]
    assert all(
        (trained / name).stat().st_size for name in ("report.md", "accuracy.png", "calibration.png", "scores.png")
    )


def test_what_says_that_all_is_judged_is_written_last(base, pairs, tmp_path, monkeypatch):
    """Stopped while it draws the last figure: the same command judges once more."""
    training = dataclasses.replace(settings(base, pairs).training, steps=1, eval_every=0)
    config = settings(base, pairs, training=training)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reward_report.reward_figures, "score_histogram", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reward_model.run(config, tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
    reward_model.run(config, tmp_path)
    assert (tmp_path / "evaluation.json").exists() and (tmp_path / "scores.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("order", [(), ("tests.parallel.interleaved",)], ids=["by process", "in turns"])
def test_two_processes_train_and_judge_as_one(base, pairs, trained, tmp_path, order):
    config_lib.save(settings(base, pairs), tmp_path / "config.json")
    run_together(
        ["-m", *order, "experiments.reward_model", f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/run"]
    )
    assert_same_numbers(tmp_path / "run", trained, tolerance=5e-3)  # 2.3e-3 in turns, 1.2e-3 by process
    scores = [
        [[line[side] for side in ("chosen", "rejected")] for line in map(json.loads, text.splitlines())]
        for text in ((folder / "scores.jsonl").read_text() for folder in (tmp_path / "run", trained))
    ]
    np.testing.assert_allclose(*scores, atol=1e-2)


def test_a_reward_model_is_trained_further(base, pairs, trained, tmp_path):
    """Preference-model pre-training: the second run begins with the first one's head, and so with its accuracy."""
    config = settings(trained, pairs)
    training = dataclasses.replace(
        config.training, steps=1, optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=0)
    )
    reward_model.run(dataclasses.replace(config, training=training), tmp_path)
    first, second = (json.loads((folder / "evaluation.json").read_text()) for folder in (trained, tmp_path))
    assert second["pairs"]["pairs"]["accuracy"] == first["pairs"]["pairs"]["accuracy"]


def test_some_of_the_pairs(base, pairs, tmp_path):
    """Of one category, as many as asked for, others with another seed; the held-out ones stay."""
    config = settings(base, pairs, preferences=PreferenceConfig(path=str(pairs), categories=("short",)))
    everything = reward_model.read(config)
    assert {pair.category for pair in everything.train} == {"short"} and len(everything.train) > 50

    def drawn(limit, seed=0):
        data = reward_model.read(dataclasses.replace(config, data=RewardDataConfig(limit=limit, seed=seed)))
        assert data.heldout == everything.heldout
        return {pair.record for pair in data.train}

    assert len(drawn(20)) == 20 and drawn(10) < drawn(20) and drawn(20, seed=1) != drawn(20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preferences": PreferenceConfig()}, "set --config.preferences.path"),
        ({"data": RewardDataConfig(sequence_length=8, batch_size=8)}, "no pair of responses is left"),
        ({"template": "chatml"}, "<|im_start|>"),
        ({"data": RewardDataConfig(limit=81)}, "limit=81: there are only"),
    ],
    ids=["path", "length", "template", "limit"],
)
def test_mistakes_are_one_line(base, pairs, tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        reward_model.run(settings(base, pairs, **changes), tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_sources_of_pairs_are_one_too_many(pairs):
    with pytest.raises(UserError, match="set one"):
        RewardConfig(ratings=("en",), preferences=PreferenceConfig(path=str(pairs)))
