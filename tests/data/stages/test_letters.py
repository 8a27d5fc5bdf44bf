"""Words and characters against counts by hand: what is judged of a text, and how likely it is."""

import math

import pytest

from llm_jax.data.stages import letters

COMMON = "一二三四五六七八九十"


@pytest.fixture(scope="module")
def known():
    return letters.learn(["一" * 60 + "abc " * 40 + COMMON * 10, "Grün α"])


def test_what_is_judged_of_a_text(known):
    words = known.words("| 一二一 | Ａbc grün αβγ | 15 % = 3_x |")
    assert words.characters == "一二"
    assert words.words == "Abc grün x"
    assert words.letters == 3 * 3 + 3 + len("grün".encode()) + len("αβγ".encode()) + 1
    assert words.signs == len("||15%=3_|") + 1


def test_characters_are_as_likely_as_the_sample_has_them(known):
    total = 60 + 100
    assert known.known and known.bits["一"] == pytest.approx(math.log2((total + 1) / 70))
    unseen = letters.IDEOGRAPHS[1] - letters.IDEOGRAPHS[0] - len(COMMON)
    assert known.bits[""] == pytest.approx(math.log2((total + 1) * unseen))
    assert known.place("鿀龥") > 0.99 and abs(known.place("一")) < 1
    usual = (70 * known.bits["一"] + 90 * known.bits["二"]) / total
    assert known.usual == pytest.approx(usual)
    assert known.place("一鿀") == pytest.approx(
        ((known.bits["一"] + known.bits[""]) / 2 - usual) / (known.random - usual)
    )


def test_both_kinds_of_script_count_by_their_bytes(known):
    words = [known.words("鿀 a bc"), known.words("abcdef"), known.words("...")]
    assert known.places(words, [0.2, 0.4, 0.9]) == pytest.approx([(3 * known.place("鿀") + 3 * 0.2) / 6, 0.4, 0.0])


def test_a_script_of_which_the_sample_has_little_is_not_judged():
    few = letters.learn(["some words and 一个词", "more of them"])
    assert not few.known and few.words("汉字 words") == letters.Words("", "words", 11, 0)
    assert letters.learn([]).words("汉字 abc").words == "abc"


@pytest.mark.parametrize(
    ("text", "enough"),
    [("|=" * 40 + "abc", False), ("1:2 | " * 10 + "some words that are just enough", True), ("some words", False),
     ("一二三四五六七", True), ("一二三四五六", False), ("1+2=3;" * 20 + "some words that are too few", False)],
)  # fmt: skip
def test_little_text_is_none(known, text, enough):
    assert letters.is_text(known.words(text)) == enough
