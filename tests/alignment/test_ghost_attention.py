"""Ghost Attention's data: what the model sees while it is sampled, what stays, and what is learned of it."""

import dataclasses

import numpy as np
import pytest

from llm_jax.alignment import ghost_attention, sft
from llm_jax.alignment.config import ChatDataConfig
from llm_jax.alignment.ghost_attention import CAPITALS, CONSTRAINTS, Instruction, at_most, beginning, ending
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Llama2, Message
from tests.tokenization.chat_tokenizers import Bytes

SHOUT = Instruction((CAPITALS,), "Shout.")


def shouts_when_told(dialogues):
    """A model that obeys only the message before it, as one without Ghost Attention does."""
    return ["YES" if dialogue[-1].content.startswith("Shout.") else "yes" for dialogue in dialogues]


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (CAPITALS, ["YES, 2!"], ["Yes", "22", ""]),
        (beginning("Well"), ["Well, no", " well"], ["Unwell", ""]),
        (ending("over"), ["Done. Over.", "over"], ["over there", ""]),
        (at_most(2), ["one two", "one"], ["one two three", "", "  "]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_constraints_know_who_obeys(constraint, good, bad):
    assert all(map(constraint.obeys, good)) and not any(map(constraint.obeys, bad))


def test_the_instruction_stands_in_every_message_or_in_the_first():
    dialogue = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    every, first = (ghost_attention.attach(dialogue, "Shout.", first_only=only) for only in (False, True))
    assert [message.content for message in every] == ["Shout.\na", "b", "Shout.\nc"]
    assert [message.content for message in first] == ["Shout.\na", "b", "c"]


def test_replies_are_sampled_with_the_instruction_in_every_message():
    """All dialogues of a turn at once; a shorter one ends earlier; what comes back has no instruction."""
    seen = []

    def reply(dialogues):
        seen.append([[message.content for message in dialogue] for dialogue in dialogues])
        return [f"r{len(dialogue)}" for dialogue in dialogues]

    first, second = ghost_attention.converse([["a", "b"], ["c"]], ["X", "Y"], reply)
    assert seen == [[["X\na"], ["Y\nc"]], [["X\na", "r1", "X\nb"]]]
    assert [message.content for message in first] == ["a", "r1", "b", "r3"]
    assert [(message.role, message.content) for message in second] == [("user", "c"), ("assistant", "r1")]


def test_what_is_built_keeps_the_first_instruction_and_teaches_the_last_reply():
    def reply(dialogues):
        return [f"turn {len(dialogue) // 2}" if dialogue[-1].content.count("x") % 2 else "no" for dialogue in dialogues]

    constraint = dataclasses.replace(CAPITALS, instruction="I", short="I", obeys=lambda said: said.startswith("turn"))
    found, tally = ghost_attention.build([["x", "x", "x"], ["x", "xx"]], reply, constraints=[constraint])
    (conversation,) = found
    assert tally.counts == {"last reply disobeys": 1}
    assert [message.content for message in conversation.messages[::2]] == ["I\nx", "x", "x"]
    config = ChatDataConfig(supervise=ghost_attention.SUPERVISE)
    sample = sft.tokenize(conversation, Llama2(Bytes()), config)
    learned = sample.tokens[sample.weights > 0].tolist()
    assert Bytes().decode(learned).strip() == "turn 2"


def test_instructions_are_drawn_from_all_constraints_and_half_are_short():
    generator = np.random.default_rng(0)
    drawn = [ghost_attention.draw(CONSTRAINTS, 2, generator) for _ in range(2000)]
    counts = np.bincount([len(instruction.constraints) for instruction in drawn])
    assert counts[0] == 0 and abs(counts[1] / 2000 - 0.5) < 0.05 and len(counts) == 3
    short = [instruction.text == "; ".join(c.short for c in instruction.constraints) for instruction in drawn]
    assert abs(np.mean(short) - 0.5) < 0.05
    names = {constraint.name for instruction in drawn for constraint in instruction.constraints}
    assert names == {constraint.name for constraint in CONSTRAINTS}


def test_the_same_questions_and_seed_draw_the_same():
    questions = [["a", "b"], ["c", "d"], ["e", "f"]]

    def build(seed, order=1):
        found, _ = ghost_attention.build(
            questions[::order],
            lambda dialogues: ["WELL INDEED"] * len(dialogues),
            constraints=[CAPITALS, at_most(3)],
            seed=seed,
        )
        return [conversation.messages[0].content for conversation in found][::order]

    assert build(0) == build(0, order=-1)
    assert any(build(0) != build(seed) for seed in (1, 2, 3))


def test_obedience_is_asked_for_in_the_first_message_alone():
    assert ghost_attention.obedience(SHOUT, ["a", "b", "c"], shouts_when_told) == [True, False, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ghost_attention.converse([["a"]], [], shouts_when_told), "1 dialogues for 0 instructions"),
        (lambda: ghost_attention.converse([["a"]], ["X"], lambda _: []), "0 replies to 1 dialogues"),
        (lambda: ghost_attention.draw([], 1, np.random.default_rng(0)), "at least one constraint"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
