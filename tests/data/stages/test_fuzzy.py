"""Fuzzy deduplication against all pairs, on planted near-duplicates."""

import random

import daft
import numpy as np
import pyarrow as pa
import pytest
from daft import DataType

from llm_jax.data.stages import fuzzy, marks, minhash
from llm_jax.data.stages.fuzzy import Fuzzy, FuzzyConfig
from llm_jax.errors import UserError
from tests.data.stages import planted
from tests.data.stages.test_minhash import similarity


def edited_corpus(pairs: int, seed: int, most: float, length: int = 120) -> list[str]:
    """Texts in pairs, of which the second is the first with up to `most` of its words edited."""
    generator = random.Random(seed)
    texts = []
    for _ in range(pairs):
        first = planted.words(length, generator)
        texts += [" ".join(first), " ".join(planted.edited(first, generator.random() * most, generator))]
    return texts


def pair_of(found: dict[str, str]) -> set[int]:
    """Which of the pairs of `edited_corpus` have lost one, having checked that each lost it to the other."""
    numbers = {int(name[-8:]): int(because[-8:]) for name, because in found.items()}
    assert all(name // 2 == because // 2 for name, because in numbers.items())
    return {name // 2 for name in numbers}


def test_planted_duplicates_are_found_and_nothing_else(tmp_path):
    texts = edited_corpus(300, 0, 0.3)
    found = pair_of(planted.dropped(planted.apply(Fuzzy(), planted.documents(texts), tmp_path)[0]))
    exact = {i: similarity(texts[2 * i], texts[2 * i + 1]) for i in range(300)}
    alike = {i for i, value in exact.items() if value >= 0.8}
    assert found <= alike and 30 < len(alike) < 270
    assert {i for i, value in exact.items() if value >= 0.9} <= found and len(found) >= 0.95 * len(alike)


def test_candidates_follow_the_s_curve(tmp_path):
    """The share of pairs with a band in common, by similarity, is what the theory says, within four deviations."""
    texts = edited_corpus(1200, 1, 0.25, 60)
    stage = Fuzzy(FuzzyConfig(threshold=0.7))
    bands, rows = stage.bands_and_rows()
    sets = minhash.shingles(pa.array(texts), 5, 5)
    keys = minhash.band_keys(minhash.signatures(sets, 112), bands, rows)
    met = (keys[::2] == keys[1::2]).any(axis=1)
    exact = np.array([similarity(a, b) for a, b in zip(texts[::2], texts[1::2])])
    theory = np.array([minhash.found_share(value, bands, rows) for value in exact])
    for low in np.arange(0.2, 1, 0.1):
        inside = (exact >= low) & (exact < low + 0.1)
        deviation = np.sqrt((theory * (1 - theory))[inside].sum())
        assert abs(met[inside].sum() - theory[inside].sum()) <= 4 * deviation + 1e-6
        assert inside.sum() > 40


def test_pairs_are_those_with_a_band_in_common(tmp_path):
    texts = edited_corpus(100, 2, 0.3)
    stage = Fuzzy()
    table = pa.table({"id": [f"{i}" for i in range(200)], "key": pa.array(range(200), pa.uint64()), "text": texts})
    names = [f"bands_{first}" for first in range(0, 16, fuzzy.BANDS_AT_ONCE)]
    fields = dict.fromkeys(names, DataType.list(fuzzy.NUMBER))
    marked = marks.mark(daft.from_arrow(table), stage.banded, fields, tmp_path, "key")
    rows = marked.sort("key").to_pydict()
    keys = np.concatenate([np.array(rows[name]).T for name in names])
    assert keys.shape == (16, 200)
    expected = {(a, b) for a in range(200) for b in range(a + 1, 200) if (keys[:, a] == keys[:, b]).any()}
    found = fuzzy.candidates(marked, names)
    assert set(zip(found.left.tolist(), found.right.tolist())) == expected and len(found.left) == len(expected) > 20


@pytest.mark.parametrize("score", [False, True])
def test_the_best_of_a_cluster_stays(tmp_path, score):
    generator = random.Random(3)
    base = planted.words(200, generator)
    texts = [" ".join(base), " ".join([*base, "and", "more"]), " ".join(["so", *base, "even"]), "else"]
    columns = {"quality": [0.2, 0.5, None, 0.9]} if score else {}
    found, facts = planted.apply(Fuzzy(), planted.documents(texts, **columns), tmp_path)
    best = 1 if score else 1 if len(texts[1]) >= len(texts[2]) else 2
    assert planted.dropped(found) == {f"here/{i:08d}": f"here/{best:08d}" for i in range(3) if i != best}
    assert facts["clusters"] == 1 and facts["clusters by size"] == {"3": 1}
    assert facts["largest clusters"][0]["documents"] == 3


def test_ties_are_broken_by_id(tmp_path):
    text = " ".join(planted.words(50, random.Random(4)))
    found, _ = planted.apply(Fuzzy(), planted.documents([text] * 3, ["b/1", "a/2", "a/1"]), tmp_path)
    assert planted.dropped(found) == {"a/2": "a/1", "b/1": "a/1"}


def test_chinese_reflowed_and_edited(tmp_path):
    generator = random.Random(5)
    first = [generator.choice(planted.CHARACTERS) for _ in range(400)]
    second = [*first[:200], "新", *first[200:]]
    other = [generator.choice(planted.CHARACTERS) for _ in range(400)]
    texts = ["".join(first), "，\n".join("".join(second[i : i + 20]) for i in range(0, 401, 20)), "".join(other)]
    found, _ = planted.apply(Fuzzy(), planted.documents(texts), tmp_path)
    assert planted.dropped(found) == {"here/00000000": "here/00000001"}


def test_short_and_empty_texts(tmp_path):
    texts = ["two words", "two, words!", "two other", "", "", "...", "one"]
    found, facts = planted.apply(Fuzzy(), planted.documents(texts), tmp_path)
    assert planted.dropped(found) == {"here/00000000": "here/00000001"} and facts["duplicates"] == 1


def test_nothing_to_find(tmp_path):
    found, facts = planted.apply(Fuzzy(), planted.documents(edited_corpus(1, 6, 0)[:1]), tmp_path)
    assert not planted.dropped(found) and facts["clusters"] == 0 and facts["candidate pairs"] == 0


def test_the_order_and_files_of_documents_do_not_matter(tmp_path):
    texts = edited_corpus(100, 7, 0.1)
    given = planted.documents(texts, [f"s{i % 3}/{i:08d}" for i in range(200)])
    expected, facts = planted.apply(Fuzzy(), given, tmp_path / "a")
    found, other = planted.apply(Fuzzy(), planted.shuffled(given, 4, tmp_path / "files"), tmp_path / "b")
    assert planted.dropped(found) == planted.dropped(expected) and len(planted.dropped(found)) > 30
    assert other == facts


def test_a_large_cluster_makes_few_pairs_and_is_one(tmp_path, monkeypatch):
    """Also with its documents compared in several calls, of which each has whole clusters."""
    monkeypatch.setattr(fuzzy, "BIN_BYTES", 1000)
    generator = random.Random(8)
    bases = [planted.words(150, generator) for _ in range(3)]
    texts = [" ".join(planted.edited(bases[i % 3], 0.005, generator)) for i in range(240)]
    found, facts = planted.apply(Fuzzy(), planted.documents(texts), tmp_path)
    assert len(planted.dropped(found)) == 237 and facts["clusters by size"] == {"80": 3}
    assert facts["candidate pairs"] < 240 * 79 / 2


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"FuzzyConfig.threshold=1.5 must be in \(0, 1\)"):
        FuzzyConfig(threshold=1.5)
    with pytest.raises(UserError, match="use more"):
        FuzzyConfig(threshold=0.05, permutations=4)
