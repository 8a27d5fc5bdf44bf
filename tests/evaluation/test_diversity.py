"""Self-BLEU against a case counted by hand, and against its definition sample by sample."""

import math
from collections import Counter

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.evaluation import diversity


def grams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def bleu(hypothesis, references, longest):
    """As it is defined."""
    if not hypothesis:
        return 0.0
    logs = []
    for n in range(1, longest + 1):
        said = Counter(grams(hypothesis, n))
        if said:
            clipped = sum(min(k, max(grams(other, n).count(gram) for other in references)) for gram, k in said.items())
            logs.append(math.log((clipped or 0.1) / sum(said.values())))
    closest = sorted((abs(len(other) - len(hypothesis)), len(other)) for other in references)[0][1]
    shortness = 1 if len(hypothesis) >= closest else math.exp(1 - closest / len(hypothesis))
    return shortness * math.exp(sum(logs) / len(logs))


def test_a_case_counted_by_hand():
    # "a b c" with "a b d" and "b": 2 of 3 words, 1 of 2 pairs. "a b d" likewise. "b" of 1 word: 1 of 1, and exp(1 - 3).
    found = diversity.self_bleu(["abc", "abd", "b"], longest=2)
    assert found == pytest.approx((2 * math.sqrt(2 / 3 * 1 / 2) + math.exp(-2)) / 3)


def test_the_definition():
    generator = np.random.default_rng(0)
    for _ in range(20):
        samples = [generator.integers(0, 4, generator.integers(0, 9)).tolist() for _ in range(5)]
        expected = [bleu(one, samples[:i] + samples[i + 1 :], 4) for i, one in enumerate(samples)]
        assert diversity.self_bleu(samples) == pytest.approx(np.mean(expected))


def test_the_same_and_different_ones():
    assert diversity.self_bleu([["one", "two", "three", "four", "five"]] * 3) == pytest.approx(1)
    assert diversity.self_bleu(["abcd", "efgh"]) == pytest.approx(0.1 / (4 * 3 * 2) ** 0.25)
    with pytest.raises(UserError, match="compares samples with each other, and there are 1"):
        diversity.self_bleu(["one"])
