"""Spoiled copies of texts: what quality models learn from, and by which filters are judged."""

import re
from collections.abc import Callable

import numpy as np

KINDS = ("characters", "words", "mojibake", "noise", "repeated")


def corrupt(text: str, kind: str, generator: np.random.Generator) -> str:
    """A copy of a text spoiled in one of the ways of `KINDS`."""
    ways: dict[str, Callable[[str, np.random.Generator], str]] = {
        "characters": random_characters,
        "words": shuffled_words,
        "mojibake": lambda text, _: mojibake(text),
        "noise": noise,
        "repeated": repeated,
    }
    return ways[kind](text, generator)


def random_characters(text: str, generator: np.random.Generator) -> str:
    """As many characters, drawn from all the different ones of the text."""
    return "".join(generator.choice(sorted(set(text)), len(text))) if text else ""


def shuffled_words(text: str, generator: np.random.Generator) -> str:
    """Its words, or single characters where no spaces separate words, in another order."""
    units = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+\s*", text)
    return "".join(generator.permutation(units)) if units else ""


def mojibake(text: str) -> str:
    """Its UTF-8 bytes read as Latin-1; for text in ASCII alone, as what two bytes a character look like."""
    if text.isascii():
        return text.encode("utf-16-be").decode("latin-1").replace("\0", "\ufffd")
    return text.encode().decode("latin-1").replace("\x80", "\u20ac")


def noise(text: str, generator: np.random.Generator) -> str:
    """Every third character replaced by a digit or symbol."""
    symbols = list("0123456789#$%&*+=|<>/\\^~_;")
    drawn = generator.choice(symbols, len(text))
    hit = generator.random(len(text)) < 1 / 3
    return "".join(new if is_hit else old for old, new, is_hit in zip(text, drawn, hit, strict=True))


def repeated(text: str, generator: np.random.Generator) -> str:
    """A short piece of it over and over."""
    size = min(len(text), 24)
    start = int(generator.integers(0, len(text) - size + 1))
    return (text[start : start + size] * (len(text) // max(size, 1) + 1))[: len(text)]
