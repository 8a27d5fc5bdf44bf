"""Making conversations and exercises, and a model that answers them, without a download."""

import dataclasses
import json

import pytest

from experiments import exercises, prepare_instructions, runner
from llm_jax.alignment import conversations, instructions
from llm_jax.alignment.config import ExercisesConfig, InstructionsConfig
from llm_jax.alignment.conversations import Conversation, Tally
from llm_jax.config import SamplingConfig
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message
from tests.alignment import base_models

TALK = [
    Conversation((Message("user", f"Say {i % 30}"), Message("assistant", f"{i}")), "small_talk_english")
    for i in range(60)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instructions, "small_talk", lambda language, cache: (TALK, Tally()))
        config = InstructionsConfig(exercises=("skills",), limit=100, small_talk=("en",), holdout_fraction=0.2)
        prepare_instructions.run(config, folder)
    return folder


def test_both_sides_are_written_and_share_no_request(made):
    train, heldout = (conversations.read(made / side)[0] for side in ("train", "heldout"))
    assert len(train) + len(heldout) == 160
    for source in ("skills", "small_talk_english"):
        asked = [{each.messages[0].content for each in side if each.source == source} for side in (train, heldout)]
        assert len(asked[1]) > 2 and not asked[0] & asked[1]


def test_the_held_out_exercises_are_a_file(made):
    found = instructions.read_exercises(made / "exercises.jsonl")
    heldout, _ = conversations.read(made / "heldout" / "skills.jsonl")
    assert [exercise.conversation.messages for exercise in found] == [each.messages for each in heldout]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_models.make(tmp_path_factory.mktemp("base") / "model")


def settings(base, made, **changes):
    config = ExercisesConfig(
        model=str(base),
        path=str(made / "exercises.jsonl"),
        template="llama2",
        batch_size=8,
        sampling=SamplingConfig(max_new_tokens=4, temperature=0.0),
    )
    return dataclasses.replace(config, **changes)


def test_answers_are_counted_by_kind(base, made, tmp_path, monkeypatch):
    """A model that knows the sums alone; what does not fit is not asked, and wrong."""
    asked = instructions.read_exercises(made / "exercises.jsonl")
    sums = sum(exercise.kind == "sum" for exercise in asked)
    right = {exercise.conversation.messages[0].content: exercise.answer for exercise in asked if exercise.kind == "sum"}
    monkeypatch.setattr(
        exercises, "answer", lambda config, model, template, asked: [
            right.get(exercise.conversation.messages[0].content, "") for exercise in asked
        ],
    )  # fmt: skip
    exercises.run(settings(base, made), tmp_path)
    found = json.loads((tmp_path / "exercises.json").read_text())
    assert (found["sum"]["right"], found["sum"]["total"]) == (sums, sums) and found["all"]["right"] == sums > 0
    assert found["all"]["total"] == len(asked) == sum(each["total"] for each in found.values()) / 2
    replies = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert [reply["right"] for reply in replies] == [exercise.kind == "sum" for exercise in asked]


def test_replies_are_those_of_each_request_alone(base, made, tmp_path, capsys):
    """Whatever their order and batch: the small model's context holds only some of the requests, which is said."""
    exercises.run(settings(base, made), tmp_path / "together")
    assert "in the model's context of 64: they are not asked" in capsys.readouterr().out
    exercises.run(settings(base, made, batch_size=1, limit=6), tmp_path / "alone")
    together, alone = (
        [json.loads(line) for line in (tmp_path / name / "replies.jsonl").read_text().splitlines()]
        for name in ("together", "alone")
    )
    assert together[:6] == alone and len(alone) == 6 and any(each["reply"] for each in together)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "set --config.model"),
        ({"path": ""}, "set --config.path"),
        ({"path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"template": "auto"}, "name a chat template"),
        ({"sampling": SamplingConfig(max_new_tokens=64)}, "no exercise fits"),
    ],
)
def test_mistakes_are_one_line(base, made, tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        exercises.run(settings(base, made, **changes), tmp_path)
    assert message in str(error.value) and "\n" not in runner.describe(error.value)
