"""All pairs against a loop over them, and shares of pairs against sums by hand."""

import random

import numpy as np
import pyarrow as pa
import pytest

from llm_jax.data.stages import minhash
from llm_jax.data.stages.fuzzy import FuzzyConfig
from llm_jax.evaluation import near_duplicates
from llm_jax.evaluation.near_duplicates import Pairs
from tests.data.stages import planted


@pytest.fixture(scope="module")
def texts():
    generator = random.Random(0)
    made = []
    for _ in range(60):
        first = planted.words(60, generator)
        made += [" ".join(first), ", ".join(planted.edited(first, 0.3 * generator.random(), generator)).upper()]
    characters = [generator.choice(planted.CHARACTERS) for _ in range(90)]
    return [*made, "".join(characters), "，".join(characters[3:]), "", "one two"]


def test_all_pairs_are_those_that_a_loop_finds(texts):
    found = near_duplicates.all_pairs(texts, 5, 5)
    grams = [near_duplicates.ngrams(text, 5, 5) for text in texts]
    expected = {
        (i, j): len(grams[i] & grams[j]) / len(grams[i] | grams[j])
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if grams[i] & grams[j]
    }
    pairs = dict(zip(zip(found.left_P.tolist(), found.right_P.tolist()), found.similarity_P))
    assert pairs == pytest.approx(expected) and len(pairs) > 55
    left, right = texts[0], texts[1]
    assert near_duplicates.similarity(left, right, 5, 5) == pytest.approx(expected[0, 1])
    assert near_duplicates.similarity("", "", 5, 5) == 0


def test_ngrams_are_of_words_or_of_characters():
    assert near_duplicates.ngrams("One, two three!", 2, 3) == {("one", "two"), ("two", "three")}
    assert near_duplicates.ngrams("春眠不觉晓", 2, 3) == {tuple("春眠不"), tuple("眠不觉"), tuple("不觉晓")}
    assert near_duplicates.ngrams("one two", 5, 5) == {("one", "two")} and near_duplicates.ngrams("!", 5, 5) == set()


def test_the_similarity_is_the_one_that_the_stage_verifies(texts):
    found = near_duplicates.all_pairs(texts, 5, 5)
    sets = minhash.sets_of(pa.array(texts), 5, 5)
    np.testing.assert_allclose(minhash.jaccard(sets, found.left_P, found.right_P), found.similarity_P, atol=1e-12)


def test_pairs_with_a_band_in_common_are_compared_in_parts(texts, monkeypatch):
    found = near_duplicates.all_pairs(texts, 5, 5)
    whole = near_duplicates.banded(texts, FuzzyConfig(), 22, 5, found)
    keys = minhash.band_keys(minhash.signatures(minhash.shingles(pa.array(texts[:120]), 5, 5), 112), 22, 5)
    expected = [i < 120 and j < 120 and bool((keys[i] == keys[j]).any()) for i, j in zip(found.left_P, found.right_P)]
    assert whole.tolist()[: len(expected) - 1] == expected[:-1] and 10 < sum(expected) < len(expected)
    monkeypatch.setattr(near_duplicates, "COMPARED", 7)
    assert (near_duplicates.banded(texts, FuzzyConfig(), 22, 5, found) == whole).all()


def test_the_s_curve_counts_found_and_expected_pairs():
    similarity = np.array([0.3, 0.5, 0.55, 0.6, 1.0])
    pairs = Pairs(np.arange(5), np.arange(5) + 1, similarity)
    found = np.array([True, False, True, True, True])
    low, high = near_duplicates.s_curve(pairs, found, 2, 3, (0.45, 0.6, 0.9, 1.0))
    theory = 1 - (1 - similarity**3) ** 2
    assert (low.pairs, low.found) == (3, pytest.approx(2 / 3)) and (high.pairs, high.found) == (1, 1)
    assert low.expected == pytest.approx(theory[1:4].mean()) and high.expected == 1 and high.deviation == 0
    assert low.deviation == pytest.approx(np.sqrt((theory * (1 - theory))[1:4].sum()) / 3)
