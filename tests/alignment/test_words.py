"""Word tasks: right answers by other means, sides without a word in common, and the reward."""

import collections

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llm_jax.alignment import words
from llm_jax.alignment.rewards import Response
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message

TEXTS = ["station banana banana x_station", "banana 'quoted' called( station2", "planet station at.planet Planet"]


def test_words_are_the_most_widespread_ones():
    assert words.read_words(3, TEXTS) == ["banana", "station", "planet"]  # by documents, then by alphabet
    with pytest.raises(UserError, match="3 words of 4 to 8 letters; 4 are asked for"):
        words.read_words(4, TEXTS)


def test_the_standard_library_has_enough():
    found = words.read_words(4000)
    assert len(set(found)) == 4000 and {"station", "return", "number"} & set(found)
    assert all(word.isascii() and word.islower() and 4 <= len(word) <= 8 for word in found)


@pytest.mark.parametrize(
    ("request_text", "answer"),
    [
        ("backwards: station", "noitats"),
        ("sort: banana", "aaabnn"),
        ("count a: banana station", "4"),
        ("count z: banana station", "0"),
        ("continue: 3 7 11", "15"),
        ("continue: 12 10 8", "6"),
        ("What is the third word here? banana station apple pear", "apple"),
        ("What is the last word here? banana station apple", "apple"),
    ],
)
def test_answers(request_text, answer):
    assert words.answer(request_text) == answer


@hypothesis.given(st.text("abcdefg", min_size=4, max_size=8), st.sampled_from("abcdefg"))
def test_answers_by_other_means(word, letter):
    assert list(words.answer(f"backwards: {word}")) == list(reversed(word))
    left = list(word)
    said = words.answer(f"sort: {word}")
    for one in said:
        assert one == min(left)
        left.remove(one)
    assert not left
    assert int(words.answer(f"count {letter}: {word} {word}")) == 2 * collections.Counter(word)[letter]


def test_sides_share_no_word_and_no_sequence():
    drawn = [f"{first}{second}{third}e" for first in "abcdefgh" for second in "klmnopqr" for third in "aeiou"]
    train, heldout = words.make(drawn, list(words.KINDS), 0.2)
    learned, asked = (
        {word for task in side for word in words.read(task.request)[2].split()} for side in (train, heldout)
    )
    of_words = {word for word in asked if word.isalpha()}
    assert of_words and not of_words & learned
    sequences = {task.request for task in heldout if task.kind == "continue"}
    assert sequences and not sequences & {task.request for task in train}
    counts = collections.Counter(task.kind for task in [*train, *heldout])
    assert counts == {
        **dict.fromkeys(("backwards", "sort", "count", "place"), 320),
        "continue": len(words.FIRSTS) * len(words.STEPS),
    }
    assert 0.1 < len([t for t in heldout if t.kind == "sort"]) / 320 < 0.3
    assert words.make(drawn, list(words.KINDS), 0.2) == (train, heldout)
    counted = [int(task.answer) for task in train if task.kind == "count"]
    assert min(counted) >= 1 and max(counted) > 1
    asked_for = collections.Counter(words.read(task.request)[1] for task in train if task.kind == "place")
    assert set(asked_for) == {"first", "second", "third", "last"} and min(asked_for.values()) > 40


def test_mistakes():
    with pytest.raises(UserError, match="sort"):
        words.make(["banana"], ["srot"], 0.5)
    with pytest.raises(UserError, match="too few to hold 50% of them out"):
        words.make(["banana"], ["sort"], 0.5)
    for text in ("reverse: a", "no task", "sort banana", "What is the word here? banana"):
        with pytest.raises(UserError, match="no task about words"):
            words.answer(text)


def test_the_reward_is_an_exact_match_that_ended():
    said = [("15", True), ("15", False), ("16", True), (" 15", True), ("15 ", True), ("", True)]
    asked = [(Message("user", "continue: 3 7 11"),)] * len(said)
    found = words.exact_match(asked, [Response(text, ended, 3) for text, ended in said])
    assert found.dtype == np.float32
    assert found.tolist() == [1, 0, 0, 0, 0, 0]
    assert words.exact_match([], []).shape == (0,)


def test_a_conversation_is_the_task_and_its_answer():
    made = words.conversation(words.Task("sort", "sort: banana", "aaabnn"))
    assert [(message.role, message.content) for message in made.messages] == [
        ("user", "sort: banana"),
        ("assistant", "aaabnn"),
    ]
