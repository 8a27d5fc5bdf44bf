"""Ghost Attention's data: what the model sees while it is sampled, what stays, and what is learned of it."""

import dataclasses

import pytest

from llm_jax.alignment import ghost_attention, sft
from llm_jax.alignment.config import ChatDataConfig
from llm_jax.alignment.constraints import CAPITALS, CONSTRAINTS, Instruction, at_most
from llm_jax.alignment.conversations import Conversation
from llm_jax.alignment.ghost_attention import VARIANTS, Told
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Llama2, Message
from tests.tokenization.chat_tokenizers import Bytes

SHOUT = Instruction((CAPITALS,), "Shout.")


def shouts_when_told(dialogues):
    """A model that obeys only the message before it, as one without Ghost Attention does."""
    return ["YES" if dialogue[-1].content.startswith("Shout.") else "yes" for dialogue in dialogues]


def contents(dialogue):
    return [message.content for message in dialogue]


def test_the_instruction_stands_in_every_message_or_in_the_first_or_nowhere():
    dialogue = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    every, first = (ghost_attention.attach(dialogue, "Shout.", first_only=only) for only in (False, True))
    assert contents(every) == ["Shout.\na", "b", "Shout.\nc"]
    assert contents(first) == ["Shout.\na", "b", "c"]
    assert ghost_attention.attach(dialogue, "") == dialogue


@pytest.mark.parametrize("first_only", [False, True])
def test_replies_are_sampled_with_the_instruction_and_all_dialogues_of_a_turn_at_once(first_only):
    """A shorter one ends earlier; what comes back has no instruction."""
    seen = []

    def reply(dialogues):
        seen.append([contents(dialogue) for dialogue in dialogues])
        return [f"r{len(dialogue)}" for dialogue in dialogues]

    first, second = ghost_attention.converse([["a", "b"], ["c"]], ["X", "Y"], reply, first_only=first_only)
    assert seen == [[["X\na"], ["Y\nc"]], [["X\na", "r1", "b" if first_only else "X\nb"]]]
    assert contents(first) == ["a", "r1", "b", "r3"]
    assert [(message.role, message.content) for message in second] == [("user", "c"), ("assistant", "r1")]


def test_what_is_changed_is_what_the_next_turn_sees():
    found = ghost_attention.converse(
        [["a", "b"]], ["X"], lambda dialogues: [contents(d)[-2] if d[1:] else "r" for d in dialogues],
        change=lambda i, said: f"{said}{i}!",
    )  # fmt: skip
    assert contents(found[0]) == ["a", "r0!", "b", "r0!0!"]


def obeys_at(*turns):
    """A model that shouts at some turns, from 1 on."""
    return lambda dialogues: [f"{'YES' if (len(d) + 1) // 2 in turns else 'no'} {len(d)}" for d in dialogues]


def build(questions, reply, **changes):
    return ghost_attention.build(questions, reply, **({"constraints": [CAPITALS]} | changes))


def test_dialogues_end_with_a_reply_that_obeys():
    questions = [[f"{number}{place}" for place in "abcd"] for number in range(60)]
    kept, found = build(questions, obeys_at(1, 2, 4))
    lengths = [len(told.questions) for told in kept]
    assert len(kept) == 60 and set(lengths) == {2, 4} and 15 < lengths.count(2) < 45
    assert all(told.dialogue[-1].content.startswith("YES") for told in kept)
    assert all(told.questions == asked[: len(told.questions)] for told, asked in zip(kept, questions))
    assert (found.sampled, found.kept, found.shares()) == (60, 60, {"capitals": 0.75})


def test_dialogues_that_never_obey_after_the_first_turn_are_left_out():
    kept, found = build([["a", "b", "c"]], obeys_at(1))
    assert not kept and (found.sampled, found.kept, found.replies, found.obeyed) == (
        1,
        0,
        {"capitals": 3},
        {"capitals": 1},
    )
    (told,), _ = build([["a"]], obeys_at(1))
    assert told.questions == ["a"]
    kept, _ = build([["a", "b", "c"]], lambda dialogues: ["" if len(d) == 1 else f"YES {len(d)}" for d in dialogues])
    assert not kept  # nobody learns from an empty reply
    kept, _ = build([["a", "b", "c"]], lambda dialogues: ["YES"] * len(dialogues))
    assert not kept  # nor from one that was said before


def test_mended_replies_obey_and_are_what_the_model_sees():
    seen = []

    def reply(dialogues):
        seen.extend(contents(dialogue)[1::2] for dialogue in dialogues)
        return [f"yes {len(dialogue)}" for dialogue in dialogues]

    ((told,), found) = build([["a", "b"]], reply, mended=True)
    assert (
        contents(told.dialogue)[1::2] == ["YES 1", "YES 3"]
        and seen == [[], ["YES 1"]]
        and found.shares()["capitals"] == 1
    )


def test_what_was_said_before_is_counted_from_the_second_time_on():
    assert ghost_attention.said_before(["a", "b", "a", "a", "c"]) == [False, False, True, True, False]


def test_yields_add_up():
    one, other = (build([["a", "b"]], obeys_at(*turns))[1] for turns in ((1, 2), (1,)))
    both = one + other
    assert (both.sampled, both.kept, both.shares()) == (2, 1, {"capitals": 0.75})


DIALOGUE = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(["q1", "R1", "q2", "R2"]))
UNTOLD = tuple(dataclasses.replace(m, content=m.content.lower()) for m in DIALOGUE)


@pytest.mark.parametrize(
    ("name", "read", "learned"),
    [
        ("baseline", ["q1", "r1", "q2", "r2"], "r1 r2"),
        ("ghost", ["Shout.\nq1", "R1", "q2", "R2"], "R2"),
        ("all_replies", ["Shout.\nq1", "R1", "q2", "R2"], "R1 R2"),
        ("every_message", ["Shout.\nq1", "R1", "Shout.\nq2", "R2"], "R2"),
        ("one_turn", ["Shout.\nq2", "R2"], "R2"),
    ],
)
def test_variants_read_and_learn_what_they_say(name, read, learned):
    """The loss's own weights, by a tokenizer whose ids are bytes."""
    (conversation,) = ghost_attention.training_data(name, [Told(SHOUT, DIALOGUE)], [UNTOLD])
    assert contents(conversation.messages) == read
    sample = sft.tokenize(conversation, Llama2(Bytes()), ChatDataConfig(supervise=VARIANTS[name].supervise))
    assert Bytes().decode(sample.tokens[sample.weights > 0].tolist()).split() == learned.split()
    assert isinstance(conversation, Conversation) and conversation.source == name


def test_the_same_questions_and_seed_draw_the_same():
    questions = [["a", "b"], ["c", "d"], ["e", "f"]]

    def texts(seed, order=1):
        kept, _ = ghost_attention.build(
            questions[::order],
            lambda dialogues: [f"WELL {len(dialogue)}" for dialogue in dialogues],
            constraints=[CAPITALS, at_most(4), CONSTRAINTS["begin_well"]],
            seed=seed,
        )
        return [told.instruction.text for told in kept][::order]

    assert texts(0) == texts(0, order=-1)
    assert any(texts(0) != texts(seed) for seed in (1, 2, 3))


def test_obedience_is_that_of_every_reply_of_every_dialogue():
    dialogues = ghost_attention.converse([["a", "b"], ["c", "d"]], ["Shout.", "x"], shouts_when_told, first_only=True)
    found = ghost_attention.obedience([SHOUT, Instruction((at_most(4),), "x")], dialogues)
    assert found == [[True, False], [True, True]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ghost_attention.converse([["a"]], [], shouts_when_told), "1 dialogues for 0 instructions"),
        (lambda: ghost_attention.converse([["a"]], ["X"], lambda _: []), "0 replies to 1 dialogues"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
