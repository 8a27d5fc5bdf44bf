"""The study of known utilities, small: raters, reward models and PPO follow the utility, and what is written."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from scipy.special import expit

from configs.known_utility import small
from experiments import known_utility as experiment
from experiments import known_utility_report as report
from llm_jax import config as config_lib
from llm_jax import models
from llm_jax.alignment import preferences, utilities
from llm_jax.alignment.known_utility_config import KnownUtilityConfig
from llm_jax.alignment.rewards import Response
from llm_jax.config import ModelConfig, TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message
from llm_jax.tokenization.train import train_on_texts
from llm_jax.training import checkpoint

EASY = ("people", "children", "hope", "world", "years", "work")
HARD = ("administration", "constitutional", "opportunities", "independence", "legislation", "responsibility")
MODEL = ModelConfig(
    vocab_size=448, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, ffn_size=64, max_length=256
)
TINY = config_lib.from_config_dict(KnownUtilityConfig, small.get_config("tiny"))
ITERATIONS, AT_ONCE, SAMPLES = 15, 32, 2  # the same numbers everywhere, so that one program draws everything


def sentences(count=3000):
    """Sentences of 6 to 17 words, easy and hard ones, a third with a banned word."""
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        words = [str(word) for word in random.choice(EASY + HARD, 5 + number % 12)]
        words.insert(1, "war" if number % 3 == 0 else "the")
        found.append(" ".join(words).capitalize() + ".")
    return found


def make_base(folder):
    """A random model whose tokens are the words of the sentences and of the requests."""
    shown = utilities.demonstrate(sentences(), 600, 0.2, 0.2)
    texts = [f"[INST] {request} [/INST] {response}\n" for request, response in shown]
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train_on_texts(texts, TokenizerConfig(vocab_size=440)))
    checkpoint.save_model(folder, MODEL, models.init(MODEL, jax.random.key(0)))


def changed(settings, **training):
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, **training))


def rewarded(settings, optimizer):
    held_out = dataclasses.replace(settings.preferences, holdout_fraction=0.3)  # a tenth behind the requests' two
    return dataclasses.replace(changed(settings, optimizer=optimizer, epochs=3.0), preferences=held_out)


def rolled(settings):
    return dataclasses.replace(settings.sampled(num_samples=SAMPLES), prompts=AT_ONCE)


def small_config(folder):
    optimizer = dataclasses.replace(TINY.sft.training.optimizer, learning_rate=1e-2)
    ppo = dataclasses.replace(
        TINY.llama2,
        training=dataclasses.replace(
            TINY.llama2.training,
            steps=ITERATIONS,
            eval_every=5,
            optimizer=dataclasses.replace(TINY.llama2.training.optimizer, learning_rate=2e-3),
        ),
        rollout=rolled(TINY.llama2.rollout),
        minibatch_size=32,
    )
    return dataclasses.replace(
        TINY,
        base=str(folder / "base"),
        texts=str(folder / "sentences.txt"),
        requests=600,
        holdout_fraction=0.2,
        sft=dataclasses.replace(changed(TINY.sft, optimizer=optimizer, epochs=6.0), samples=0),
        raters=dataclasses.replace(
            TINY.raters, rollout=rolled(TINY.raters.rollout), batches=30, helpfulness_sharpness=20.0
        ),
        helpfulness_model=rewarded(TINY.helpfulness_model, optimizer),
        safety_model=rewarded(TINY.safety_model, optimizer),
        llama2=ppo,
        small_beta=ppo,
        methods=("helpfulness",),
        seeds=(0,),
        judged_prompts=96,
        judging=rolled(TINY.judging),
        start_samples=SAMPLES,
        diversity=dataclasses.replace(
            TINY.diversity, prompts=AT_ONCE // 2, samples=SAMPLES, temperatures=(0.5, 1.0), methods=("helpfulness",)
        ),
    )


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The study: (its config, its folder)."""
    folder = tmp_path_factory.mktemp("known_utility")
    (folder / "sentences.txt").write_text("\n".join(sentences()))
    make_base(folder / "base")
    config = small_config(folder)
    experiment.run(config, folder / "study")
    return config, folder / "study"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_requests_are_not_learned(done):
    folder = done[1] / "requests"
    sides = [{r["messages"][0]["content"] for r in read(folder / f"{name}.jsonl")} for name in ("train", "heldout")]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 600 and 90 < len(sides[1]) < 150


def test_raters_follow_the_utility(done):
    config, folder = done
    for kind, utility in utilities.BY_KIND.items():
        pairs = preferences.read(folder / "preferences" / f"{kind}.jsonl")[0]
        prompts = [pair.prompt for pair in pairs]
        sides = [[Response(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected")]
        chosen, rejected = (utility(prompts, side) for side in sides)
        chances = expit(getattr(config.raters, f"{kind}_sharpness") * np.abs(chosen - rejected))
        right = np.heaviside(chosen - rejected, 0.5).mean()
        assert abs(right - chances.mean()) < 4 * np.sqrt((chances * (1 - chances)).mean() / len(pairs)), kind
        assert kind == "helpfulness" or all(experiment._is_about_safety(pair) for pair in pairs)


def test_reward_models_and_ppo_learn_the_utility(done):
    for kind in utilities.BY_KIND:
        found = json.loads((done[1] / f"{kind}_model" / "evaluation.json").read_text())["pairs"][kind]
        assert found["accuracy"] > 0.5 + 1 / np.sqrt(found["pairs"]), kind  # two standard errors of chance
    start, taught = (point["scores"] for point in json.loads((done[1] / "report.json").read_text())["points"])
    assert taught["helpfulness_model"][0] > start["helpfulness_model"][0] + 3 * start["helpfulness_model"][1]
    assert taught["helpfulness"][0] > start["helpfulness"][0] + 2 * start["helpfulness"][1]
    assert taught["wins_helpfulness"][0] > 55 and "wins_helpfulness" not in start


def test_the_report(done):
    folder = done[1]
    text = (folder / "report.md").read_text()
    assert "## What is true" in text and f"| {report.TITLES['helpfulness']} |" in text and "| safety |" in text
    for name in ("frontier", "over_optimisation", "win_rates", "temperature"):
        assert (folder / f"{name}.png").stat().st_size > 1000
    (course,) = json.loads((folder / "report.json").read_text())["courses"]["helpfulness"]
    assert [at["step"] for at in course] == [0, 5, 10, 15]
    assert course[0]["kl"] == pytest.approx(0, abs=1e-5) and course[0]["true"] == pytest.approx(0, abs=1e-6)
    assert course[-1]["paid"] > course[0]["paid"]


def test_helpfulness_is_judged_without_tagged_requests(done):
    folder = done[1]
    requests = [utilities.parse((Message(**r["messages"][0]),)) for r in read(folder / "requests" / "heldout.jsonl")]
    found = report.columns(folder / "start", requests, None)
    tagged = np.array([request.tagged for request in requests[:96]])
    assert 0 < tagged.sum() < 96
    for name, judged in (("helpfulness", ~tagged), ("violation", tagged), ("violation_plain", ~tagged)):
        assert np.array_equal(~np.isnan(found[name]).any(axis=1), judged), name
    said = read(folder / "start" / "judged.jsonl")
    unsafe = np.array([utilities.banned(each["text"]) > 0 for each in said]).reshape(-1, SAMPLES)
    assert np.array_equal(found["violation"][tagged] == 100, unsafe[tagged]) and unsafe.any()


def test_what_is_done_is_not_done_again(done, capsys):
    experiment.run(done[0], done[1], stages=("data", "start", "rewards", "runs"))
    assert capsys.readouterr().out.count("done earlier") == 5


def test_mistakes(done, tmp_path):
    config, folder = done
    with pytest.raises(UserError, match="another requests"):
        experiment.run(dataclasses.replace(config, requests=200), folder)
    with pytest.raises(UserError, match="do the stage `data` first"):
        experiment.run(config, tmp_path, stages=("start",))
    with pytest.raises(UserError, match="do the stage `start` first"):
        experiment.run(config, tmp_path, stages=("rewards",))
    with pytest.raises(UserError, match="do the stage `rewards` first"):
        experiment.run(config, tmp_path, stages=("runs",))
    with pytest.raises(UserError, match="--only"):
        experiment.run(config, tmp_path, only=("dpo/0",))
    with pytest.raises(UserError, match="llama2_ptx needs pre-training data"):
        experiment.run(dataclasses.replace(config, methods=("llama2_ptx",)), tmp_path)
    with pytest.raises(UserError, match="rejection/seed_0 is not finished"):
        experiment.run(dataclasses.replace(config, methods=("rejection_ppo",)), folder, stages=("runs",))
    with pytest.raises(UserError, match="full or tiny"):
        small.get_config("large")


def test_ppo_after_rejection_sampling_comes_after_it():
    full = config_lib.from_config_dict(KnownUtilityConfig, small.get_config())
    methods = sorted(full.methods, key=experiment._comes_last)
    assert methods.index("rejection_ppo") > methods.index("rejection") and len(methods) == 9 and full.seeds == (0, 1, 2)


def test_the_papers_shaping_is_kept():
    full = config_lib.from_config_dict(KnownUtilityConfig, small.get_config())
    assert (full.llama2.kl.coefficient, full.llama2.loss.clip, full.llama2.rewards.normalization) == (
        0.01,
        0.2,
        "whiten",
    )
    assert (full.baichuan2.kl.coefficient, full.baichuan2.kl.end, full.baichuan2.loss.clip) == (0.2, 0.005, 0.1)
    assert full.baichuan2.kl.iterations == full.baichuan2.training.steps
    assert (full.qwen.rollout.sampling.top_p, full.qwen.loss.value_clip, full.qwen.kl.coefficient) == (0.9, 0.15, 0.04)
    assert full.qwen.rewards.normalization == "running_mean" and full.qwen.rollout.sampling.num_samples == 2
