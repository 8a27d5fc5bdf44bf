"""The experiment as its users run it: rounds, stops, memory, curves, and what goes on from its folder."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs.rejection_sampling import small
from experiments import ppo, rejection_sampling, sft
from llm_jax import config as config_lib
from llm_jax.alignment import rejection, rejection_run
from llm_jax.alignment.config import ChatDataConfig, FineTuneConfig, SftConfig
from llm_jax.alignment.policy_config import AdvantageConfig, PpoConfig, PromptDataConfig, RolloutConfig
from llm_jax.alignment.rejection_config import CurvesConfig, RejectionConfig
from llm_jax.config import OptimizerConfig, SamplingConfig
from llm_jax.errors import UserError
from llm_jax.interop import pretrained
from tests.alignment import base_models

REWARD = f"{__name__}:ones"


def ones(prompts, responses):
    """The share of one letter."""
    return np.array([each.text.count("e") / (1 + len(each.text)) for each in responses], np.float32)


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_models.make(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    words = base_models.WORDS
    file.write_text(
        "".join(json.dumps({"prompt": f"{words[i % 3]} {words[i // 3 % 3]} {i}"}) + "\n" for i in range(40))
    )
    return file


def settings(base, asked, **changes):
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0)
    values = {
        "training": FineTuneConfig(model=str(base), steps=8, eval_every=0, keep_best=False, optimizer=optimizer),
        "prompts": PromptDataConfig(path=str(asked), template="llama2", max_tokens=40, holdout_fraction=0.25),
        "rollout": RolloutConfig(
            prompts=8, max_prompt_tokens=40, sampling=SamplingConfig(max_new_tokens=6, num_samples=4)
        ),
        "reward": REWARD,
        "rounds": 2,
        "batches": 2,
        "only_ended": False,
        "data": ChatDataConfig(sequence_length=64, batch_size=8, packed=False, holdout_fraction=0.0),
    }
    return RejectionConfig(**values | changes)


@pytest.fixture(scope="module")
def done(base, asked, tmp_path_factory):
    """A whole run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    curves = CurvesConfig(prompts=4, samples=4, temperatures=(0.8, 1.2))
    rejection_sampling.run(settings(base, asked, curves=curves, temperatures=(0.9, 1.3)), folder)
    return folder


def test_rounds_raise_the_reward(done):
    rounds = rejection_run.read_rounds(done)
    assert [record["samples"] for record in rounds] == [0, 64, 64]
    assert rounds[2]["mean"] > rounds[1]["mean"] and rounds[1]["best"] > rounds[1]["mean"] > 0
    assert rounds[2]["heldout"]["score"] > 1.5 * rounds[0]["heldout"]["score"]
    assert {record["temperature"] for record in rounds[1:]} <= {0.9, 1.3}


def test_what_is_learned_is_the_best_of_all_rounds(done):
    first, second = (rejection.read(done / f"round_{number}" / rejection_run.CHOSEN) for number in (1, 2))
    earlier = {each.prompt: each for each in first}
    assert len(earlier) == 16 == len(first) and {each.round for each in second} == {1, 2}
    for each in second:
        assert each.prompt not in earlier or each.response.reward >= earlier[each.prompt].response.reward
        assert each.round == 2 or each == earlier[each.prompt]


def test_the_report_has_curves_and_figures(done):
    text = (done / "report.md").read_text()
    assert "| 2 | 64 |" in text and "after the last round, T = 1.2 | 4 |" in text
    found = json.loads((done / "report.json").read_text())["curves"]
    assert {name: sorted(by) for name, by in found.items()} == {
        "as it was": ["0.8", "1.2"],
        "after the last round": ["0.8", "1.2"],
    }
    assert (done / "best_of.png").stat().st_size > 1000 and (done / "temperature.png").stat().st_size > 1000


def test_the_folder_is_the_last_rounds_model(done):
    own, last = (pretrained.load(folder) for folder in (done, done / "round_2"))
    same = jax.tree.map(np.array_equal, own.params, last.params)
    assert all(jax.tree.leaves(same))


def test_a_policy_goes_on_from_it_and_a_smaller_model_learns_from_it(done, base, asked, tmp_path):
    training = FineTuneConfig(model=str(done), steps=1, log_every=1, optimizer=OptimizerConfig(warmup_steps=0))
    config = settings(base, asked)
    ppo.run(
        PpoConfig(training, config.prompts, config.rollout, REWARD, advantage=AdvantageConfig("rloo"), eval_prompts=8),
        tmp_path / "ppo",
    )
    assert pretrained.load(tmp_path / "ppo").config.architecture() == base_models.MODEL.architecture()
    student = base_models.make(tmp_path / "student", dataclasses.replace(base_models.MODEL, num_layers=1))
    data = ChatDataConfig(
        path=str(done / "round_2" / "chosen.jsonl"), template="llama2", sequence_length=64, batch_size=8
    )
    assert sft.run(
        SftConfig(dataclasses.replace(training, model=str(student)), data, samples=0), tmp_path / "distilled"
    )


def test_a_stop_changes_nothing(done, base, asked, tmp_path, monkeypatch):
    """Stopped after a round's drawing, and before its record."""
    curves = CurvesConfig(prompts=4, samples=4, temperatures=(0.8, 1.2))
    config, folder = settings(base, asked, curves=curves, temperatures=(0.9, 1.3)), tmp_path / "run"
    for name in ("_fine_tune", "evaluate"):
        with monkeypatch.context() as patched:
            patched.setattr(rejection_run, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                rejection_sampling.run(config, folder)
        if name == "_fine_tune":
            assert (folder / "round_1" / "drawn.json").is_file()
    rejection_sampling.run(config, folder)
    assert rejection_run.read_rounds(folder) == rejection_run.read_rounds(done)
    own, whole = (pretrained.load(each).params for each in (folder, done))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, own, whole)))


def interrupted(config, *arguments):
    raise KeyboardInterrupt


def test_forgetting(base, asked, tmp_path):
    rejection_sampling.run(settings(base, asked, memory="last"), tmp_path)
    assert {each.round for each in rejection.read(tmp_path / "round_2" / "chosen.jsonl")} == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "no.such:thing"}, "No module named 'no'"),
        ({"minimum_reward": 2.0}, "none of 64 responses may be chosen"),
        ({"data": ChatDataConfig(sequence_length=64, batch_size=64, holdout_fraction=0.0)}, "fewer than a batch"),
    ],
)
def test_mistakes_take_a_line(base, asked, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        rejection_sampling.run(settings(base, asked, **changes), tmp_path)


def test_a_folder_of_another_run_is_refused(done, base, asked):
    with pytest.raises(UserError, match="another config"):
        rejection_sampling.run(settings(base, asked, rounds=3), done)


def test_the_preset():
    config = config_lib.from_config_dict(RejectionConfig, small.get_config())
    assert config.samples == 4096 and config.temperatures[-1] == 1.3
