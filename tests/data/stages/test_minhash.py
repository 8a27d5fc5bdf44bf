"""Signatures, bands and similarities against Python's sets and the theory."""

import random

import numpy as np
import pyarrow as pa
import pytest

from llm_jax.data.stages import minhash
from llm_jax.errors import UserError
from tests.data.stages import planted


def ngrams_of(text: str, width: int) -> set[tuple[str, ...]]:
    units = text.split()
    return {tuple(units[i : i + width]) for i in range(max(len(units) - width, 0) + 1)} if units else set()


def similarity(a: str, b: str, width: int = 5) -> float:
    left, right = ngrams_of(a, width), ngrams_of(b, width)
    return len(left & right) / max(len(left | right), 1)


def some_texts(count: int, seed: int) -> list[str]:
    """Made in pairs, of which the second is the first with 0 to 60 % of its words edited; some very short."""
    generator = random.Random(seed)
    texts = []
    for _ in range(count // 2):
        first = planted.words(generator.choice([1, 4, 30, 100, 300]), generator)
        texts += [" ".join(first), " ".join(planted.edited(first, generator.random() * 0.6, generator))]
    return texts


def test_jaccard_is_that_of_python_s_sets():
    texts = [*some_texts(60, 0), ""]
    sets = minhash.sets_of(pa.array(texts), words=3, characters=9)
    left, right = np.triu_indices(len(texts), 1)
    expected = [similarity(texts[a], texts[b], 3) for a, b in zip(left, right)]
    np.testing.assert_allclose(minhash.jaccard(sets, left, right), expected, atol=1e-12)
    assert 0 < np.mean(np.array(expected) > 0) < 1
    assert np.diff(sets.offsets_D).tolist() == [len(ngrams_of(text, 3)) for text in texts]


def test_scripts_without_spaces_have_ngrams_of_characters():
    texts = pa.array(["春眠不觉晓，处处闻啼鸟", "one two three four five six", "eins 二 三 四"])
    assert np.diff(minhash.shingles(texts, words=5, characters=2).offsets_D).tolist() == [9, 2, 3]


def test_signatures_agree_as_often_as_the_sets_are_similar():
    """The estimate's error is that of so many independent permutations, so multiplications are as good as those."""
    texts = some_texts(600, 1)
    sets = minhash.shingles(pa.array([t if t else "x" for t in texts]), 5, 5)
    signatures = minhash.signatures(sets, 256)
    exact = np.array([similarity(a or "x", b or "x") for a, b in zip(texts[::2], texts[1::2])])
    estimate = (signatures[::2] == signatures[1::2]).mean(axis=1)
    deviation = (estimate - exact)[exact < 1] / np.sqrt(np.maximum(exact * (1 - exact), 1e-9) / 256)[exact < 1]
    inside = deviation[(exact[exact < 1] > 0.05)]
    assert len(inside) > 50 and abs(inside.mean()) < 4 / np.sqrt(len(inside)) and 0.8 < inside.std() < 1.2


def test_signatures_are_the_least_products():
    draw = np.random.default_rng(minhash.SEED).integers(0, 1 << 31, 7, np.uint32).tolist()
    values = [[5, 2**32 - 1, 7], [2**31 + 1], [3] * 9]
    sets = minhash.Sets(np.concatenate(values).astype(np.uint32), np.array([0, 3, 4, 13]))
    expected = [[min(value * (2 * factor + 1) % 2**32 for value in row) for factor in draw] for row in values]
    assert minhash.signatures(sets, 7).tolist() == expected


def test_signatures_do_not_depend_on_the_neighbours():
    texts = some_texts(200, 2)
    texts = [text or "x" for text in texts]
    together = minhash.signatures(minhash.shingles(pa.array(texts), 5, 5), 16)
    for i in (0, 57, 199):
        alone = minhash.signatures(minhash.shingles(pa.array([texts[i]]), 5, 5), 16)
        assert (alone[0] == together[i]).all()


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("permutations", [16, 112, 128])
def test_bands_have_the_most_rows_that_find_enough(threshold, permutations):
    bands, rows = minhash.solve(threshold, permutations, 0.95)
    missed = [(1 - threshold**r) ** (permutations // r) for r in range(1, permutations + 1)]
    assert rows == max(r for r, miss in enumerate(missed, 1) if miss <= 0.05) and bands == permutations // rows
    assert minhash.found_share(threshold, bands, rows) == pytest.approx(1 - missed[rows - 1])


def test_too_few_permutations_are_refused():
    with pytest.raises(UserError, match=r"2 permutations find 0\.190 of pairs of similarity 0\.1, not 0\.9: use more"):
        minhash.solve(0.1, 2, 0.9)


def test_a_band_s_key_is_that_of_its_rows():
    rows = np.random.default_rng(0).integers(0, 2, (200, 7), np.uint32)
    keys = minhash.band_keys(rows, bands=2, rows=3)
    for band in range(2):
        part = [tuple(row) for row in rows[:, 3 * band : 3 * band + 3]]
        assert len(set(zip(part, keys[:, band]))) == len(set(part)) == len(set(keys[:, band])) == 8
    swapped = minhash.band_keys(np.array([[1, 2], [2, 1]], np.uint32), 1, 2)
    assert swapped[0, 0] != swapped[1, 0]
