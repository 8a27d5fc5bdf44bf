"""How different samples are from each other."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from llm_jax.errors import require

Words = Sequence[object]  # whatever counts as a word: texts, or token ids
Gram = tuple[object, ...]
SMOOTHED_MATCHES = 0.1  # of an n-gram order without any (Chen and Cherry, 2014, method 1)


def self_bleu(samples: Sequence[Words], longest: int = 4) -> float:
    """The mean BLEU of each sample with all others as its references: 1 = all the same (Zhu et al., 2018).

    BLEU is that of one sentence (Papineni et al., 2002), of n-grams of 1 to `longest` words, equally weighed. An order
    of which nothing matches counts as if 0.1 did; orders that a sample is too short for are left out, and a sample
    without words has a BLEU of 0. Raises `UserError` for fewer than two samples.
    """
    require(len(samples) > 1, f"Self-BLEU compares samples with each other, and there are {len(samples)}")
    logs: list[list[float]] = [[] for _ in samples]
    for n in range(1, longest + 1):
        counts = [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in samples]
        tops = _two_most(counts)
        for found, own in zip(logs, counts):
            if own:
                matches = sum(min(count, _of_others(tops[gram], count)) for gram, count in own.items())
                found.append(math.log((matches or SMOOTHED_MATCHES) / own.total()))
    lengths = [len(words) for words in samples]
    penalties = [_brevity(length, lengths[:i] + lengths[i + 1 :]) for i, length in enumerate(lengths)]
    scores = [math.exp(less + sum(found) / len(found)) if found else 0.0 for less, found in zip(penalties, logs)]
    return sum(scores) / len(scores)


def _two_most(counts: Iterable[Counter[Gram]]) -> dict[Gram, tuple[int, int]]:
    """How often the two samples that hold an n-gram most often do."""
    tops: dict[Gram, tuple[int, int]] = {}
    for own in counts:
        for gram, count in own.items():
            most, second = tops.get(gram, (0, 0))
            tops[gram] = (max(most, count), max(min(most, count), second))
    return tops


def _of_others(top: tuple[int, int], count: int) -> int:
    """The most in any sample but one that holds the n-gram so often."""
    most, second = top
    return second if count == most else most


def _brevity(length: int, others: Sequence[int]) -> float:
    """The logarithm of the penalty for being shorter than the reference of the nearest length."""
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return min(0.0, 1 - nearest / max(1, length))
