"""Exercises that anybody can check and a small model can learn: sums, numbers in Chinese, and what to do with words.

Each is a matter of a rule, not of something to be known, so that held-out ones tell whether the rule was learned. They
are drawn at random, always the same ones, and need no package.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COUNT = 4000  # exercises of each kind
DIGITS, UNITS = "零一二三四五六七八九", ("", "十", "百", "千")
WORDS = (
    "apple", "bread", "candle", "desk", "eagle", "flower", "garden", "hammer", "island", "jacket", "kitchen", "lemon",
    "mirror", "needle", "orange", "pencil", "queen", "river", "silver", "table", "umbrella", "village", "window",
    "yellow", "zebra", "autumn", "bridge", "copper", "dinner", "engine", "forest", "guitar", "honey", "insect",
    "journey", "kettle", "ladder", "morning", "number", "office", "pillow", "quarter", "rabbit", "sugar", "ticket",
    "uncle", "valley", "winter", "youth", "zone", "animal", "bottle", "coffee", "doctor", "evening", "finger",
    "glass", "horse", "iron", "jungle", "king", "letter", "mountain", "night",
)  # fmt: skip
# Of each kind of exercise, how it is asked; see `instructions.REQUESTS`.
REQUESTS = {
    "sum": ("What is {first} + {second}?", "{first}加{second}等于多少？"),
    "chinese_number": ("用汉字写出数字{number}。", "Write {number} in Chinese characters."),
    "last_word": ("What is the last word here? {words}", "下面的最后一个词是什么？{words}"),
    "capitals": ("Write in capital letters: {words}", "请改成大写字母：{words}"),
    "alphabetical_order": ("Put these words in alphabetical order: {words}", "请按字母顺序排列：{words}"),
}


class Skill(NamedTuple):
    """What an exercise is made of."""

    kind: str  # a key of REQUESTS
    subject: str  # what no other exercise is about
    answer: str
    fields: dict[str, str]  # that fill its request


def draw() -> Iterator[Skill]:
    """`COUNT` skills of each kind; sums of numbers below 100, numbers below 10,000, and three to five words."""
    generator = np.random.default_rng(0)
    pairs = [(first, second) for first in range(1, 100) for second in range(first, 100)]
    for i in generator.permutation(len(pairs))[:COUNT]:
        first, second = generator.permutation(pairs[i]).tolist()
        fields = {"first": str(first), "second": str(second)}
        yield Skill("sum", f"sum of {pairs[i]}", str(first + second), fields)
    for number in (1 + generator.permutation(9999)[:COUNT]).tolist():
        yield Skill("chinese_number", f"number {number}", chinese_number(number), {"number": str(number)})
    for kind in ("last_word", "capitals", "alphabetical_order"):
        for words in _lists(generator):
            fields = {"words": " ".join(words)}
            yield Skill(kind, f"{kind} of {fields['words']}", _answer(kind, words), fields)


def chinese_number(number: int) -> str:
    """A number from 1 to 9,999 as one writes it out: 1,015 is 一千零一十五, and 15 is 十五."""
    places = [(int(digit), UNITS[place]) for place, digit in enumerate(reversed(str(number)))]
    text = "".join(DIGITS[digit] + unit * (digit > 0) for digit, unit in reversed(places))
    text = re.sub("零+", "零", text).rstrip("零")
    return text.removeprefix("一") if text.startswith("一十") else text


def _lists(generator: np.random.Generator) -> Iterator[tuple[str, ...]]:
    """`COUNT` lists of words, no two of the same words."""
    found: set[frozenset[str]] = set()
    while len(found) < COUNT:
        words = tuple(generator.permutation(WORDS)[: generator.integers(3, 6)].tolist())
        if frozenset(words) not in found:
            found.add(frozenset(words))
            yield words


def _answer(kind: str, words: tuple[str, ...]) -> str:
    if kind == "last_word":
        return words[-1]
    return " ".join(words).upper() if kind == "capitals" else " ".join(sorted(words))
