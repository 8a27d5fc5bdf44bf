"""Classes of prompts, and choices that are balanced over them."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.alignment import taxonomy
from llm_jax.errors import UserError


def test_the_tree_has_three_tiers_of_different_classes():
    names = taxonomy.classes()
    assert len(set(names)) == len(names) and all(name.count("/") == 2 for name in names)
    assert len({name.split("/")[0] for name in names}) == len(taxonomy.TREE) >= 6
    assert len(names) > 60
    assert taxonomy.tier("code/tools/library use", 1) == "code"
    assert taxonomy.tier("code/tools/library use", 2) == "code/tools"


def test_an_unknown_class_is_refused_with_the_nearest():
    taxonomy.check_category("code/tools/library use")
    with pytest.raises(UserError, match="unknown class 'code/tool/library use'; did you mean 'code/tools/library use'"):
        taxonomy.check_category("code/tool/library use")


def test_coverage_counts_what_is_missing_too():
    tree = {"a": {"x": ["1", "2"], "y": ["3"]}, "b": {"z": ["4"]}}
    categories = ["a/x/1", "a/x/2", "a/y/3"]
    assert taxonomy.coverage(categories, 1, tree) == {"a": 3, "b": 0}
    assert taxonomy.coverage(categories, 2, tree) == {"a/x": 2, "a/y": 1, "b/z": 0}
    with pytest.raises(UserError, match="unknown class"):
        taxonomy.coverage(["a/x/3"], 1, tree)


def test_a_tree_of_ones_own(tmp_path):
    path = tmp_path / "tree.json"
    tree = {"a": {"x": ["1", "2"]}, "b": {"z": ["4"]}}
    path.write_text(json.dumps(tree))
    assert taxonomy.read_tree(path) == tree and taxonomy.classes(tree) == ("a/x/1", "a/x/2", "b/z/4")
    for bad, message in (
        ("{", "not valid JSON"),
        ("[]", "object of objects of lists"),
        ('{"a": ["x"]}', "object of objects of lists"),
        ('{"a": {"x": "y"}}', "object of objects of lists"),
        ('{"a": {"x": ["y/z"]}}', "'y/z' is empty or holds '/'"),
        ('{"a": {"x": ["y", "y"]}}', "'a/x/y' is there twice"),
        ("{}", "no classes"),
    ):
        path.write_text(bad)
        with pytest.raises(UserError, match=message):
            taxonomy.read_tree(path)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=40), st.integers(0, 3))
def test_every_beginning_is_as_even_as_can_be(keys, seed):
    order = taxonomy.balanced_order(keys, seed)
    assert sorted(order) == list(range(len(keys)))
    for depth in (1, 2):
        whole = Counter(key[:depth] for key in keys)
        for count in range(1, len(keys) + 1):
            taken = Counter(keys[i][:depth] for i in order[:count])
            for one in whole:
                for other in whole:
                    same_parent = one[:-1] == other[:-1]
                    # A class may be two behind its sibling only when it has no more to give.
                    assert not same_parent or taken[one] + 1 >= taken[other] or taken[one] == whole[one]


@pytest.mark.filterwarnings("error")
def test_k_means_finds_what_lies_apart():
    generator = np.random.default_rng(0)
    centres = np.eye(5) * 10
    group = generator.permutation(np.arange(100) % 5)
    points = (centres[group] + generator.normal(size=(100, 5)) * 0.3).astype(np.float32)
    found = taxonomy.k_means(points, 5, seed=1)
    assert len({(a, b) for a, b in zip(group, found)}) == 5  # the same groups by other names
    assert np.array_equal(found, taxonomy.k_means(points, 5, seed=1))
    assert taxonomy.k_means(np.ones((6, 4), np.float32), 3).tolist() == [0] * 6


def test_ngrams_are_near_for_texts_that_share_them():
    texts = ["the cat sat on the mat", "The cat  sat on a mat", "多喝热水对身体好", "", "the cat sat on the mat"]
    found = taxonomy.hashed_ngrams(texts)
    assert found.dtype == np.float32 and found.shape == (5, 512)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 0, 1], atol=1e-6)
    near, far = found[0] @ found[1], found[0] @ found[2]
    assert near > 0.7 and abs(far) < 0.3 and np.array_equal(found[0], found[4])
    # With as many places as hashes have, the product is the sum over shared n-grams of the roots of their counts.
    one, other = taxonomy.hashed_ngrams(["aab", "ab"], 1 << 16, (1,))
    assert one @ other == pytest.approx((2**0.5 + 1) / (3**0.5 * 2**0.5), abs=1e-6)


def test_long_texts_of_rare_words_are_difficult():
    texts = ["say hi", "say hi again", "say hi", "derive the eigenvalues of a tridiagonal operator"]
    found = taxonomy.difficulty(texts)
    assert found.argmax() == 3 and found[0] == found[2] and found.max() <= 1 and found.min() > 0
    # Equal in length: "hi" is in three of four texts, the others' words in one; "我们" is two words.
    found = taxonomy.difficulty(["hi", "yo", "我们", "hi"])
    assert found[1] == found[2] > found[0] == found[3]
    assert np.isfinite(taxonomy.difficulty(["", "?!", "a"])).all()


def test_the_choice_is_balanced_over_classes_clusters_and_difficulty():
    generator = np.random.default_rng(0)
    big, small = "code/tools/library use", "safety/privacy/personal data"
    categories = [big] * 180 + [small] * 20
    embeddings = np.eye(2)[np.array([0] * 170 + [1] * 10 + [0] * 10 + [1] * 10)] + generator.normal(size=(200, 2)) / 50
    hardness = generator.permutation(200).astype(float)
    given = {"categories": categories, "embeddings_ID": embeddings, "difficulties_I": hardness}
    options = given | {"clusters": 2, "levels": 2}
    texts = [f"text {i}" for i in range(200)]
    chosen = taxonomy.choose(texts, 16, **options)
    assert len(set(chosen)) == 16 and chosen == taxonomy.choose(texts, 16, **options)
    assert Counter(categories[i] for i in chosen) == {big: 8, small: 8}
    assert Counter((categories[i], embeddings[i, 0] > 0.5) for i in chosen) == dict.fromkeys(
        [(big, True), (big, False), (small, True), (small, False)], 4
    )
    hard = Counter((categories[i], embeddings[i, 0] > 0.5, hardness[i] >= 100) for i in chosen)
    assert set(hard.values()) == {2}
    assert chosen[:8] == taxonomy.choose(texts, 8, **options)
    assert chosen != taxonomy.choose(texts, 16, **options, seed=1)


def test_a_choice_without_classes_or_embeddings():
    texts = ["what is love"] * 50 + ["多少钱", "到哪里去"]
    chosen = taxonomy.choose(texts, 4, clusters=2, levels=1)
    assert len({texts[i] for i in chosen} - {"what is love"}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 4}, "4 prompts are wanted of 3"),
        ({"count": 0}, "0 prompts are wanted"),
        ({"categories": ["a/b/c"]}, "1 categories for 3 prompts"),
        ({"embeddings_ID": np.zeros((2, 2))}, "2 embeddings for 3 prompts"),
        ({"difficulties_I": np.array([1.0, np.nan, 0.0])}, "difficulties are not all finite"),
        ({"clusters": 0}, "must be positive"),
    ],
)
def test_impossible_choices(change, message):
    with pytest.raises(UserError, match=message):
        taxonomy.choose(["a", "b", "c"], **{"count": 2} | change)
