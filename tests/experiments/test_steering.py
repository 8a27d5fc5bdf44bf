"""Steering reviews, small: on texts made here, every method brings more of what is paid, and of what is not."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from configs.steering import small
from experiments import steering
from llm_jax import config as config_lib
from llm_jax.alignment import judging, ratings, referees
from llm_jax.alignment.conversations import Tally
from llm_jax.alignment.preferences import Pair
from llm_jax.alignment.prompts import Prompt
from llm_jax.alignment.ratings import RatedText
from llm_jax.alignment.rejection import Drawn, Scored
from llm_jax.alignment.steering_config import SteeringConfig
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message

TINY = config_lib.from_config_dict(SteeringConfig, small.get_config("tiny"))
THINGS = ("plot", "cast", "film", "sound", "hero", "story", "music", "ending")
WORDS = {"good": 2, "fine": 1, "great": 3, "bad": -2, "dull": -1, "awful": -3}


def texts():
    """Three things and what somebody thinks of them, which the first words do not tell."""
    found = []
    for i, things in enumerate(2 * list(itertools.permutations(THINGS, 3))):
        words = np.random.default_rng(i).choice(list(WORDS), 3)
        said = f"I saw it: the {things[0]} is {words[0]}, the {things[1]} {words[1]}, the {things[2]} {words[2]}."
        mean = float(np.mean([WORDS[word] for word in words]))
        found.append(RatedText(said, mean, (1,), ("movies", "products")[i % 2], "en", f"text {i}"))
    return found


def shorter(training, learning_rate, steps=0):
    optimizer = dataclasses.replace(training.optimizer, learning_rate=learning_rate)
    return dataclasses.replace(training, steps=steps, optimizer=optimizer)


def rollouts(settings, prompts, samples):
    return dataclasses.replace(settings, prompts=prompts, max_prompt_tokens=16).sampled(
        max_new_tokens=24, num_samples=samples
    )


CONFIG = dataclasses.replace(
    TINY,
    judged_fraction=0.2,
    referee_fraction=0.3,
    model=dataclasses.replace(TINY.model, vocab_size=330, hidden_size=32, num_layers=2, head_dim=8, ffn_size=64),
    sft=dataclasses.replace(
        TINY.sft,
        training=shorter(TINY.sft.training, 1e-2, 120),
        data=dataclasses.replace(TINY.sft.data, sequence_length=64, batch_size=8),
    ),
    reward=dataclasses.replace(
        TINY.reward,
        training=dataclasses.replace(shorter(TINY.reward.training, 5e-3), epochs=3.0),
        preferences=dataclasses.replace(TINY.reward.preferences, pairs_per_text=4),
        data=dataclasses.replace(TINY.reward.data, sequence_length=128, batch_size=4),
    ),
    ppo=dataclasses.replace(
        TINY.ppo,
        training=shorter(TINY.ppo.training, 3e-3, 20),
        prompts=dataclasses.replace(TINY.ppo.prompts, max_tokens=16),
        rollout=rollouts(TINY.ppo.rollout, 32, 1),
    ),
    ppo_betas=(0.3,),
    rejection=dataclasses.replace(
        TINY.rejection,
        training=shorter(TINY.rejection.training, 2e-3),
        prompts=dataclasses.replace(TINY.rejection.prompts, max_tokens=16),
        rollout=rollouts(TINY.rejection.rollout, 16, 8),
        rounds=2,
        data=dataclasses.replace(TINY.rejection.data, sequence_length=64, batch_size=4),
        curves=dataclasses.replace(TINY.rejection.curves, prompts=8, samples=4, temperatures=(1.0,)),
    ),
    dpo=dataclasses.replace(
        TINY.dpo,
        training=shorter(TINY.dpo.training, 8e-4),
        data=dataclasses.replace(TINY.dpo.data, sequence_length=128, batch_size=4),
    ),
    dpo_betas=(0.3,),
    seeds=(0,),
    judging=rollouts(TINY.judging, 16, 2),
    judged=32,
    best_of=(1, 4, 16),
    best_of_samples=16,
)


@pytest.fixture(scope="module", autouse=True)
def nothing_from_outside(one_device):
    """Texts made here, and one device."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ratings, "load", lambda language: (texts(), Tally()))
        patched.setattr(referees, "lexicon", lambda: referees.Lexicon(WORDS))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The whole study."""
    folder = tmp_path_factory.mktemp("steering")
    steering.run(CONFIG, folder)
    return folder


def columns(folder):
    return judging.columns(judging.read(folder / "judged.jsonl"))


def test_every_method_brings_what_is_paid_and_what_is_not(done):
    begun = columns(done / "best_of_n" / "seed_0")
    assert begun["kl"].shape == (32, 16) and not begun["kl"].any()
    for name in ("ppo_0.3/seed_0", "dpo_0.3/seed_0", "rejection/seed_0/round_2"):
        found = columns(done / name)
        gains = {each: found[each].mean() - begun[each].mean() for each in ("reward", "regression", "lexicon")}
        spread = found["reward"].mean(axis=1).std() / 32**0.5
        assert gains["reward"] > 3 * spread and min(gains.values()) > 0.1 and found["kl"].mean() > 0.1, (name, gains)


def test_rewards_agree_with_people(done):
    found = json.loads((done / "reward" / "result.json").read_text())
    assert set(found) == {"reward", "regression", "lexicon"}
    assert all(each["rho"] > 0.7 and each["texts"] > 20 for by_domain in found.values() for each in by_domain.values())
    assert set(found["reward"]) == {"movies", "products"}


def test_the_report(done):
    text = (done / "report.md").read_text()
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")]
    for row in (
        ["| the start", ""],
        ["| best of n", "n = 16"],
        ["| PPO", "beta 0.3"],
        ["| rejection sampling", "round 1"],
    ):
        assert row in rows
    assert "PPO, at no more than 3.67 nats: reward" in text and "Spearman" in text and "What they write" in text
    found = json.loads((done / "report.json").read_text())["points"]
    best = [each["scores"]["reward"][0] for each in found if each["method"] == "best of n"]
    begun = columns(done / "best_of_n" / "seed_0")["reward"]
    assert best[0] == pytest.approx(begun.mean()) and best[2] == pytest.approx(begun.max(axis=1).mean())
    assert best == sorted(best) and [each["method"] for each in found].count("rejection sampling") == 2
    assert (done / "frontier.png").stat().st_size > 10_000
    assert (done / "rejection" / "seed_0" / "temperature.png").is_file()  # curves, of the first seed


def test_what_is_done_is_not_done_again(done, capsys):
    steering.run(CONFIG, done, stages=("start", "rewards", "runs"))
    assert capsys.readouterr().out.count("done earlier") == 6


def test_the_judged_prompts_begin_texts_that_nothing_learned_from(done):
    study = steering.Study(CONFIG, done)
    judged, others = ({each.text for each in side} for side in (study.texts.judged, study.texts.learned))
    assert not judged & (others | {each.text for each in study.texts.referee})
    asked = {prompt.messages[-1].content for prompt in study.judged_prompts(study.load(done / "start").tokenizer)}
    assert len(asked) == 32 and all(any(text.startswith(start) for text in judged) for start in asked)


def test_a_judged_prompt_that_another_text_begins_with_too_is_not_trained_on(done):
    study = steering.Study(CONFIG, done)
    model = study.load(done / "start")
    study.texts = study.texts._replace(referee=[*study.texts.referee, *study.texts.judged])
    data = steering.data_of(study, model, 64, 0)
    seen = {prompt.messages for step in range(len(study.texts.referee) // 64) for prompt in data.prompts.batch(step)}
    assert seen and not seen & {prompt.messages for prompt in data.heldout}


def test_a_lexicon_of_english_words_judges_no_chinese_prompt(done):
    study = steering.Study(CONFIG, done)
    prompts = [Prompt((Message("user", said),), (1,)) for said in ["the film"] * 30 + ["电影"] * 2]
    (found,) = steering.columns_of(study, prompts, "ppo_0.3", "")
    assert np.isnan(found["lexicon"][30:]).all() and np.isfinite(found["lexicon"][:30]).all()
    assert np.isfinite(found["regression"]).all()


def test_pairs_are_the_best_over_the_worst_response_that_ended():
    def scored(*rows):
        return [Scored(text, (), reward, ended) for text, reward, ended in rows]

    prompts = [Prompt((Message("user", f"{i}"),), (i,)) for i in range(4)]
    rows = [
        scored((" a", 1.0, True), (" b", 3.0, True), (" c", 9.0, False), (" d", -1.0, True), ("", -2.0, True)),
        scored((" a", 1.0, True)),
        scored((" a", 1.0, False), (" b", 2.0, False)),
        scored((" a", 1.0, True), (" a ", 2.0, True)),
    ]
    assert steering.pairs_of(Drawn(prompts, rows, None)) == [Pair(prompts[0].messages, " b", " d")]


def test_mistakes(done, tmp_path):
    with pytest.raises(UserError, match="another judged"):
        steering.run(dataclasses.replace(CONFIG, judged=16), done)
    with pytest.raises(UserError, match="do the stage `start` first"):
        steering.run(CONFIG, tmp_path, stages=("runs",))
    shutil.copytree(done / "start", tmp_path / "start")
    with pytest.raises(UserError, match="do the stage `rewards` first"):
        steering.run(CONFIG, tmp_path, stages=("runs",))
    with pytest.raises(UserError, match="do the run best_of_n/0 first"):
        steering.run(CONFIG, tmp_path, stages=("report",))
    with pytest.raises(UserError, match="--only"):
        steering.run(CONFIG, tmp_path, only=("ppo_7/0",))
    with pytest.raises(UserError, match="full or tiny"):
        small.get_config("large")


def test_the_full_study():
    full = config_lib.from_config_dict(SteeringConfig, small.get_config())
    assert full.seeds == (0, 1, 2) and full.languages == ("en", "zh") and 16 in full.best_of
    assert len(full.ppo_betas) >= 3 and len(full.dpo_betas) >= 3
