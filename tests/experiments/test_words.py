"""The comparison on word tasks, small: every method makes a model better at held-out tasks, and what it writes."""

import dataclasses
import json
import shutil

import pytest

from configs.words import small, smollm2
from experiments import words as experiment
from llm_jax import config as config_lib
from llm_jax.alignment import words
from llm_jax.alignment.prompts import Prompt
from llm_jax.alignment.rejection import Drawn, Scored
from llm_jax.alignment.words_config import WordsConfig
from llm_jax.config import CheckpointConfig
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message
from tests.alignment import base_models

TINY = config_lib.from_config_dict(WordsConfig, small.get_config("tiny"))
ITERATIONS, ROUNDS = 20, 2


def shorter(training, steps, every):
    return dataclasses.replace(training, steps=steps, eval_every=0, checkpoint=CheckpointConfig(every_steps=every))


def short_rows(data):
    """As many tokens in rows of a quarter: most of what attention would compute in longer ones is masked."""
    return dataclasses.replace(data, sequence_length=data.sequence_length // 4, batch_size=4 * data.batch_size)


CONFIG = dataclasses.replace(
    TINY,
    sft=dataclasses.replace(TINY.sft, training=shorter(TINY.sft.training, 225, 75), data=short_rows(TINY.sft.data)),
    ppo=dataclasses.replace(TINY.ppo, training=shorter(TINY.ppo.training, ITERATIONS, ITERATIONS), eval_prompts=128),
    rejection=dataclasses.replace(TINY.rejection, rounds=ROUNDS, data=short_rows(TINY.rejection.data)),
    methods=("ppo", "rejection"),
    seeds=(0,),
)
LEAST_GAIN = 0.06  # of held-out tasks, of which there are 531: 2.8 standard errors of one share


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A start, and what two methods make of it."""
    folder = tmp_path_factory.mktemp("words")
    experiment.run(CONFIG, folder)
    return folder


def test_every_method_learns(done):
    found = json.loads((done / "report.json").read_text())
    begun = experiment.share(found["start"]["sampled"])
    assert 0.4 < begun < 0.65 and found["samples"] == 5120
    gains = {name: experiment.share(runs[0]["sampled"]) - begun for name, runs in found["methods"].items()}
    assert set(gains) == {"ppo", "rejection"} and min(gains.values()) > LEAST_GAIN, gains
    curve = found["methods"]["rejection"][0]["curve"]
    assert [point[0] for point in curve] == [0, 2560, 5120] and curve[-1][1] - curve[0][1] > LEAST_GAIN


def test_the_report(done):
    text = (done / "report.md").read_text()
    assert "| rejection sampling |" in text and "| the start |" in text and "5,120 samples each" in text
    assert (done / "words.png").stat().st_size > 1000


def test_what_is_done_is_not_done_again(done, capsys):
    experiment.run(CONFIG, done, stages=("start", "runs"))
    assert capsys.readouterr().out.count("done earlier") == 3


def test_mistakes(done, tmp_path):
    with pytest.raises(UserError, match="another words"):
        experiment.run(dataclasses.replace(CONFIG, words=1000), done)
    with pytest.raises(UserError, match="do the stage `start` first"):
        experiment.run(CONFIG, tmp_path, stages=("runs",))
    with pytest.raises(UserError, match="no finished run"):
        shutil.copytree(done / "start", tmp_path / "start")
        experiment.run(CONFIG, tmp_path, stages=("report",))
    with pytest.raises(UserError, match="--only"):
        experiment.run(CONFIG, tmp_path, only=("dpo/0",))
    with pytest.raises(UserError, match="different numbers of samples"):
        dataclasses.replace(TINY, rejection=dataclasses.replace(TINY.rejection, rounds=1))
    with pytest.raises(UserError, match="full or tiny"):
        small.get_config("large")


def test_held_out_tasks_hold_no_word_that_is_learned(done):
    sides = [
        {json.loads(line)["messages"][0]["content"] for line in (done / "tasks" / name).read_text().splitlines()}
        for name in ("train.jsonl", "sft_train.jsonl", "heldout.jsonl")
    ]
    assert sides[1] <= sides[0] and not sides[0] & sides[2] and len(sides[2]) == 531
    assert all(words.answer(request) for request in sides[2])


def test_pairs_are_the_right_answer_over_every_wrong_one():
    def scored(*texts):
        return [Scored(text, (), float(text == "ab"), True) for text in texts]

    prompts = [Prompt((Message("user", f"sort: {i}"),), (i,)) for i in range(3)]
    rows = [scored("ba", "ab", "ba", "", "b", "ab "), scored("ab", "ab"), scored("ba", "b")]
    pairs = experiment.pairs_of(Drawn(prompts, rows, None))
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (prompts[0].messages, "ab", "ba"),
        (prompts[0].messages, "ab", "b"),
    ]


def test_the_full_study_compares_equal_numbers_of_samples():
    full = config_lib.from_config_dict(WordsConfig, small.get_config())
    assert {full.samples(method) for method in full.methods} == {51_200} and full.seeds == (0, 1, 2)


def test_a_trained_model_starts_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "JUDGED_AT_ONCE", 2)
    base = base_models.make(tmp_path / "base", dataclasses.replace(base_models.MODEL, max_length=512))
    full = config_lib.from_config_dict(WordsConfig, smollm2.get_config())
    grpo = dataclasses.replace(
        full.grpo,
        training=dataclasses.replace(full.grpo.training, steps=1, microbatches=1),
        rollout=dataclasses.replace(full.grpo.rollout, prompts=2, max_prompt_tokens=400),
        minibatch_size=8,
        eval_prompts=2,
        prompts=dataclasses.replace(full.grpo.prompts, max_tokens=400),
    )
    tried = dataclasses.replace(full, template="llama2", base=str(base), words=200, grpo=grpo, ppo=grpo, judged=2)
    tried = dataclasses.replace(tried, methods=("grpo",), seeds=(0,))
    experiment.run(tried, tmp_path / "words")
    assert not (tmp_path / "words" / "sft").exists()
    found = json.loads((tmp_path / "words" / "report.json").read_text())
    assert found["start"]["sampled"] == {"place": [0, 2]} and found["methods"]["grpo"][0]["greedy"]["place"][1] == 2
    sides = {
        name: [json.loads(line)["messages"] for line in (tmp_path / "words" / "tasks" / name).read_text().splitlines()]
        for name in ("train.jsonl", "heldout.jsonl")
    }
    shown = {tuple(message["content"] for message in asked[:8]) for side in sides.values() for asked in side}
    assert len(shown) == 1  # the same four examples in front of everything, of which each asks for another place
    (examples,) = shown
    assert {words.read(request)[1] for request in examples[::2]} == set(words.PLACES)
    assert list(map(words.answer, examples[::2])) == list(examples[1::2])
    assert not {asked[8]["content"] for asked in sides["train.jsonl"]} & set(examples)
