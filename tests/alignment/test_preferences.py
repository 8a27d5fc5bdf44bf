"""Pairs: what is read, what is left out and why, and that no prompt is on both sides."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.alignment import preferences
from llm_jax.alignment.config import PreferenceConfig
from llm_jax.alignment.conversations import BadRecordError
from llm_jax.alignment.preferences import Pair
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message

ASKED = (Message("user", "Hi?"),)


def parsed(record, **config):
    return preferences.parse_pair(record, PreferenceConfig(**config))


def lines(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_transcripts_have_the_prompt_that_both_begin_with():
    start = "\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: And then?\nPlease."
    pair = parsed({"chosen": f"{start}\n\nAssistant: Three.", "rejected": f"{start}\n\nAssistant: No idea. "})
    assert [(m.role, m.content) for m in pair.prompt] == [
        ("user", "One?"),
        ("assistant", "Two."),
        ("user", "And then?\nPlease."),
    ]
    assert (pair.chosen, pair.rejected, pair.strength) == ("Three.", "No idea.", 1)


def test_prompts_are_texts_or_messages_or_nothing():
    said = {"chosen": "Hello.", "rejected": "What?"}
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}]
    listed = [{"role": "assistant", "content": "Hello."}], [{"role": "assistant", "content": "What?"}]
    assert parsed(said | {"prompt": "Hi?"}) == Pair(ASKED, "Hello.", "What?")
    assert parsed(said | {"prompt": system}).prompt == (Message("system", "Be kind."), *ASKED)
    assert (
        parsed(said | {"prompt": None}) == parsed(said) == parsed(said | {"prompt": []}) == Pair((), "Hello.", "What?")
    )
    assert parsed({"prompt": system[1:], "chosen": listed[0], "rejected": listed[1]}) == Pair(ASKED, "Hello.", "What?")
    whole = {"chosen": [system[1], *listed[0]], "rejected": [system[1], *listed[1]]}
    assert parsed(whole) == Pair(ASKED, "Hello.", "What?")
    # A plain text may look like a dialogue if it says that it has no prompt.
    dialogue = "\n\nHuman: a\n\nAssistant: b"
    assert parsed({"prompt": [], "chosen": dialogue, "rejected": "c"}) == Pair((), dialogue, "c")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "not a JSON object"),
        ({"chosen": "a"}, "no field 'rejected'"),
        ({"prompt": "p", "rejected": "b"}, "no field 'chosen'"),
        ({"prompt": "p", "chosen": "a", "rejectd": "b"}, "unknown field 'rejectd'"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "score_margin": 1}, "unknown field 'score_margin'"),
        ({"prompt": "p", "chosen": "same", "rejected": " same\n"}, "equal responses"),
        ({"chosen": "a", "rejected": " "}, "empty response"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "empty reply"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "response that is no text"),
        ({"chosen": "a", "rejected": "\ud800"}, "response that is no text"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt that is neither text nor messages"),
        ({"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"}, "unknown role"),
        ({"prompt": [{"role": "system", "content": "x"}], "chosen": "a", "rejected": "b"},
         "the assistant speaks first"),
        ({"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: b"},
         "dialogues that differ before the last reply"),
        ({"chosen": "\n\nHuman: x\n\nAssistant: a\n\nHuman: z", "rejected": "\n\nHuman: x\n\nAssistant: b"},
         "dialogue that does not end with a reply"),
        ({"chosen": "a", "rejected": "b", "strength": 0}, "strength out of range"),
        ({"chosen": "a", "rejected": "b", "strength": 6}, "strength out of range"),
        ({"chosen": "a", "rejected": "b", "strength": "2"}, "field 'strength' that is no int"),
        ({"chosen": "a", "rejected": "b", "strength": True}, "field 'strength' that is no int"),
        ({"chosen": "a", "rejected": "b", "chosen_safe": 1}, "field 'chosen_safe' that is no bool"),
        ({"chosen": "a", "rejected": "b", "chosen_rating": 3}, "only one of two ratings"),
        ({"chosen": "a", "rejected": "b", "chosen_rating": 4.5, "rejected_rating": 0}, "rating out of range"),
        ({"chosen": "a", "rejected": "b", "chosen_rating": 4, "rejected_rating": -5}, "rating out of range"),
        ({"chosen": "a", "rejected": "b", "chosen_rating": float("nan"), "rejected_rating": 0}, "rating out of range"),
        ({"chosen": "a", "rejected": "b", "chosen_rating": 0, "rejected_rating": 3}, "chosen rated no higher"),
        ({"chosen": "a", "rejected": "b", "chosen_rating": 3, "rejected_rating": 1.5}, "ratings too close"),
        ({"chosen": "a", "rejected": "b", "chosen_rating": 3, "rejected_rating": 0, "strength": 1}, "both a strength"),
    ],
)  # fmt: skip
def test_what_is_no_pair(record, reason):
    with pytest.raises(BadRecordError) as error:
        parsed(record)
    assert error.value.reason.startswith(reason)


def test_strengths_and_ratings():
    said = {"chosen": "a", "rejected": "b"}
    assert parsed(said | {"strength": 5}).strength == 5
    assert [parsed(said | {"strength": k}, strength_scale=(1, 2, 2, 3, 4)).strength for k in range(1, 6)] == [
        1,
        2,
        2,
        3,
        4,
    ]
    with pytest.raises(BadRecordError, match="strength out of range"):
        parsed(said | {"strength": 5}, strength_scale=(1, 2, 3, 4))
    for gap, strength in ((2, 1), (2.99, 1), (3, 2), (4.5, 3), (5, 4), (8, 4)):
        rated = {"chosen_rating": 4, "rejected_rating": 4 - gap}
        assert parsed(said | rated).strength == strength
    five = PreferenceConfig(strength_gaps=(1, 2, 3, 4), minimum_gap=0.5)
    assert [preferences.strength_of(gap, five) for gap in (0.5, 1, 2.5, 3, 4)] == [1, 2, 3, 4, 5]
    assert parsed(said | {"extra": 1}, ignored_fields=("extra",)) == Pair((), "a", "b")


def test_files_are_read_and_the_bad_records_named(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    lines(tmp_path / "a.jsonl", [good, "", {"chosen": "a", "rejected": "a"}, "{", good | {"source": "mine"}])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"chosen": "x", "rejected": "x"}) + "\n" + json.dumps(good) + "\n")
    pairs, tally = preferences.read(tmp_path)
    assert [(pair.source, pair.record) for pair in pairs] == [
        ("a", "a.jsonl:1"),
        ("mine", "a.jsonl:5"),
        ("b", "b.jsonl.gz:2"),
    ]
    assert tally.counts == {"equal responses": 2, "not JSON": 1}
    assert tally.first["equal responses"] == "a.jsonl:3: 'a'" and tally.first["not JSON"].startswith("a.jsonl:4: ")
    lines(tmp_path / "a.jsonl", [{"chosen": "a", "rejected": "a"}])
    with pytest.raises(UserError, match=r"has no pair to learn from: 1 equal responses \(first a.jsonl:1: 'a'\)"):
        preferences.read(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="no file or folder at"):
        preferences.read(tmp_path / "none")


words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            Pair,
            prompt=st.sampled_from([(), ASKED, (Message("system", "s"), *ASKED, Message("assistant", "b"), *ASKED)]),
            chosen=words.map(lambda text: "good " + text),
            rejected=words.map(lambda text: "bad " + text),
            strength=st.integers(1, 5),
            chosen_safe=st.none() | st.booleans(),
            rejected_safe=st.none() | st.booleans(),
            category=st.text(st.characters(exclude_categories=("Cs",))),
            source=words,
        ),
        min_size=1,
    )
)
def test_what_is_written_is_read_back(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    preferences.write(path, pairs)
    read, tally = preferences.read(path)
    assert [(*vars(pair).values(),)[:-1] for pair in read] == [(*vars(pair).values(),)[:-1] for pair in pairs]
    assert not tally.counts and read[0].record == "pairs.jsonl:1"


def test_no_prompt_is_on_both_sides():
    def asked(i, turns=0):
        later = (Message("assistant", "ok"), Message("user", f"more {turns}")) * turns
        return Pair((Message("system", f"s{i % 3}"), Message("user", f"question {i}"), *later), f"a{i}", f"b{i}{turns}")

    pairs = [asked(i, turns) for i in range(400) for turns in (0, 1, 2)]
    train, heldout, dropped = preferences.split(pairs, 0.2)
    opening = [{pair.prompt[1].content for pair in side} for side in (train, heldout)]
    assert not opening[0] & opening[1] and dropped == 0
    assert sorted(map(repr, [*train, *heldout])) == sorted(map(repr, pairs))
    assert 0.13 < len(heldout) / len(pairs) < 0.27  # three standard errors
    # The side depends on nothing but the prompt.
    assert preferences.split(reversed(pairs[:30]), 0.2).heldout == [p for p in reversed(pairs[:30]) if p in heldout]
    assert preferences.split(pairs, 0.0).train == pairs


def test_no_plain_text_is_on_both_sides():
    pairs = [Pair((), f"text {i}", f"text {(i * 7 + 1) % 300}") for i in range(300)]
    train, heldout, dropped = preferences.split(pairs, 0.3)
    texts = [{text for pair in side for text in (pair.chosen, pair.rejected)} for side in (train, heldout)]
    assert not texts[0] & texts[1] and heldout and dropped
    assert len(train) + len(heldout) + dropped == len(pairs)
    with pytest.raises(UserError, match="held-out fraction"):
        preferences.split(pairs, 1.0)


def test_counts():
    pairs = [Pair(ASKED, "a", "b", 2, True, False, "code/tools", "x"), Pair((), "a", "b", 2, source="y")]
    assert preferences.counts(pairs) == {
        "source": {"x": 1, "y": 1},
        "category": {"code/tools": 1, "": 1},
        "strength": {"2": 2},
        "safety": {"safe over unsafe": 1, "unknown over unknown": 1},
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"minimum_gap": 0.0}, "minimum_gap=0.0 must be positive"),
        ({"strength_gaps": (3.0, 2.0)}, "each larger"),
        ({"strength_gaps": (1.0, 2.0, 3.0, 4.0, 5.0)}, "at most 4 gaps"),
        ({"strength_scale": (1, 6)}, "must be from 1 to 5"),
        ({"label_strength": 0}, "must be from 1 to 5"),
        ({"rating_range": (4.0, -4.0)}, "from a lower to a higher"),
        ({"holdout_fraction": 1.0}, "must be in"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(UserError, match=message):
        PreferenceConfig(**fields)
