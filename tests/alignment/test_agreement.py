"""Agreement between raters: against sums over pairs of ratings, and against a published example."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.alignment.agreement import bootstrap_error, count_ratings, gwet, krippendorff, weights_between
from llm_jax.errors import UserError

_ = None
# Krippendorff 2011, part C: 4 observers, 12 units, 7 ratings missing. One unit has a single rating.
PUBLISHED = [
    (1, 1, _, 1),
    (2, 2, 3, 2),
    (3, 3, 3, 3),
    (3, 3, 3, 3),
    (2, 2, 2, 2),
    (1, 2, 3, 4),
    (4, 4, 4, 4),
    (1, 1, 2, 1),
    (2, 2, 2, 2),
    (_, 5, 5, 5),
    (_, _, 1, 1),
    (_, 3, _, _),
]
SCALE = (1, 2, 3, 4, 5)


def known(item):
    return [value for value in item if value is not None]


def agreement_by_pairs(ratings, weight, categories):
    """AC2 as a mean over items of a mean over ordered pairs of different raters."""
    shared = [known(item) for item in ratings if len(known(item)) >= 2]
    observed = Fraction(0)
    for item in shared:
        pairs = list(itertools.permutations(item, 2))
        observed += sum(weight(a, b) for a, b in pairs) / len(pairs) / len(shared)
    rated = [known(item) for item in ratings if known(item)]
    share = {c: sum(Fraction(item.count(c), len(item)) for item in rated) / len(rated) for c in categories}
    size = len(categories)
    total = sum(weight(a, b) for a in categories for b in categories)
    chance = total / Fraction(size * (size - 1)) * sum(p * (1 - p) for p in share.values())
    return (observed - chance) / (1 - chance)


def alpha_by_pairs(ratings, difference):
    """Alpha as one minus the mean difference within items over that between any two pairable ratings."""
    shared = [known(item) for item in ratings if len(known(item)) >= 2]
    everything = [value for item in shared for value in item]
    within = sum(
        Fraction(difference(a, b), len(item) - 1) for item in shared for a, b in itertools.permutations(item, 2)
    )
    between = sum(Fraction(difference(a, b)) for a, b in itertools.permutations(everything, 2))
    return 1 - (within / len(everything)) / (between / (len(everything) * (len(everything) - 1)))


def ordinal(ratings):
    """Krippendorff's ordinal difference: ratings from one rank to the other, half of the two ends' own."""
    everything = [v for item in ratings if len(known(item)) >= 2 for v in known(item)]

    def difference(a, b):
        low, high = min(a, b), max(a, b)
        between = sum(low <= value <= high for value in everything)
        return (between - Fraction(everything.count(a) + everything.count(b), 2)) ** 2 if a != b else Fraction(0)

    return difference


def test_alpha_of_the_published_example():
    counts = count_ratings(PUBLISHED, SCALE)
    for metric, published in (("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)):
        assert krippendorff(counts, SCALE, metric) == pytest.approx(published, abs=5e-4)


def test_ac1_of_the_published_example_by_hand():
    # Pairs that agree: 8 units wholly, unit 2 and unit 8 in 3 of 6 pairs, unit 6 in none: 9 / 11 of agreement.
    # Shares over 12 units: 1: (1 + 1/4 + 3/4 + 1) / 12 = 3/12; 2: (3/4 + 1 + 1/4 + 1/4 + 1) / 12 = 3.25/12;
    # 3: (1/4 + 1 + 1 + 1/4 + 1) / 12 = 3.5/12; 4: 1.25/12; 5: 1/12. Chance: (1 - sum of squares) / 4.
    chance = (1 - (3**2 + 3.25**2 + 3.5**2 + 1.25**2 + 1) / 144) / 4
    counts = count_ratings(PUBLISHED, SCALE)
    assert gwet(counts, SCALE) == pytest.approx((9 / 11 - chance) / (1 - chance), abs=1e-12)
    assert gwet(counts, SCALE) == pytest.approx(0.77544, abs=5e-6)  # as the R package irrCAC gives it


@st.composite
def rating_sets(draw):
    size = draw(st.integers(2, 5))
    item = st.lists(st.none() | st.integers(0, size - 1), min_size=0, max_size=6)
    ratings = draw(st.lists(item, min_size=2, max_size=8))
    categories = sorted(draw(st.sets(st.integers(-4, 9), min_size=size, max_size=size)))
    return [[None if c is None else categories[c] for c in given] for given in ratings], categories


@settings(max_examples=60, deadline=None)
@given(rating_sets())
def test_both_agree_with_sums_over_pairs(drawn):
    ratings, categories = drawn
    counts = count_ratings(ratings, categories)
    shared = [known(item) for item in ratings if len(known(item)) >= 2]
    if not shared:
        with pytest.raises(UserError, match="no item has two ratings"):
            gwet(counts, categories)
        return
    width = categories[-1] - categories[0]
    for kind, weight in (
        ("identity", lambda a, b: Fraction(a == b)),
        ("linear", lambda a, b: 1 - Fraction(abs(a - b), width)),
        ("quadratic", lambda a, b: 1 - Fraction(abs(a - b), width) ** 2),
    ):
        expected = agreement_by_pairs(ratings, weight, categories)
        assert gwet(counts, categories, kind) == pytest.approx(float(expected), abs=1e-12)
    if len({value for item in shared for value in item}) == 1:
        with pytest.raises(UserError, match="all ratings are equal"):
            krippendorff(counts, categories)
        return
    for metric, difference in (
        ("nominal", lambda a, b: a != b),
        ("ordinal", ordinal(ratings)),
        ("interval", lambda a, b: (a - b) ** 2),
    ):
        expected = alpha_by_pairs(ratings, difference)
        assert krippendorff(counts, categories, metric) == pytest.approx(float(expected), abs=1e-9)


def test_raters_who_always_agree_and_raters_who_guess():
    generator = np.random.default_rng(0)
    same = [[int(value)] * 5 for value in generator.integers(0, 3, 50)]
    guessed = generator.integers(0, 3, (4000, 5)).tolist()
    for ratings, expected, tolerance in ((same, 1.0, 1e-12), (guessed, 0.0, 0.03)):
        counts = count_ratings(ratings, (0, 1, 2))
        for value in (gwet(counts, (0, 1, 2)), gwet(counts, (0, 1, 2), "linear"), krippendorff(counts, (0, 1, 2))):
            assert value == pytest.approx(expected, abs=tolerance)


def test_a_missing_rating_is_none_or_nan():
    counts = count_ratings([[1, None, 3], [float("nan"), 3]], (1, 2, 3))
    assert counts.tolist() == [[1, 0, 1], [0, 0, 1]]


def test_weights():
    assert weights_between((0, 1, 4), "linear").tolist() == [[1, 0.75, 0], [0.75, 1, 0.25], [0, 0.25, 1]]
    assert weights_between((0, 1, 4), "quadratic")[0].tolist() == [1, 15 / 16, 0]


def test_the_bootstrap_gives_the_error_of_a_mean():
    counts = np.random.default_rng(0).normal(size=(400, 1))
    error = bootstrap_error(lambda drawn: float(drawn.mean()), counts, samples=2000)
    assert error == pytest.approx(counts.std() / 20, rel=0.1)
    assert error == bootstrap_error(lambda drawn: float(drawn.mean()), counts, samples=2000)


def test_what_is_no_rating_is_refused():
    with pytest.raises(UserError, match=r"item 1: the rating \[7\.\] is none of"):
        count_ratings([[1, 2], [7, 2]], SCALE)
    with pytest.raises(UserError, match="two or more values in ascending order"):
        count_ratings([[1]], (2, 1))
    with pytest.raises(UserError, match=r"have the shape \[items, 3\], got \[1, 2\]"):
        gwet([[1, 2]], (1, 2, 3))
    with pytest.raises(UserError, match="must not be negative"):
        gwet([[-1, 3]], (1, 2))
    with pytest.raises(UserError, match="did you mean 'linear'"):
        weights_between(SCALE, "lineal")
    with pytest.raises(UserError, match="metric='ratio'"):
        krippendorff([[1, 1]], (1, 2), "ratio")
