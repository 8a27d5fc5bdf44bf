"""How far raters agree beyond chance: Gwet's AC1 and AC2 and Krippendorff's alpha, with ratings missing at will.

Both are functions of a table that counts, for every item, how many raters chose each category, so raters need no
names and items may have different numbers of them.

Shape suffixes: I items, R raters, C categories.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from llm_jax.config import one_of
from llm_jax.errors import UserError, require

WEIGHTS = ("identity", "linear", "quadratic")
METRICS = ("nominal", "ordinal", "interval")


def count_ratings(ratings: Sequence[Sequence[float | None]], categories: ArrayLike) -> np.ndarray:
    """How many raters put each item into each category.

    Args:
        ratings: of every item, as many as it has; None and NaN are missing ratings.
        categories: [C] every value that a rating may have, in ascending order.

    Returns:
        float64 [I, C].

    Raises:
        UserError: a rating is none of the categories, or these are not two or more in ascending order.
    """
    values_C = _categories(categories)
    counts_IC = np.zeros((len(ratings), len(values_C)))
    for item, given in enumerate(ratings):
        known = np.array([value for value in given if value is not None and not np.isnan(value)], float)
        places = np.searchsorted(values_C, known).clip(max=len(values_C) - 1)
        wrong = known[values_C[places] != known]
        require(not wrong.size, f"item {item}: the rating {wrong[:1]} is none of {values_C.tolist()}")
        counts_IC[item] = np.bincount(places, minlength=len(values_C))
    return counts_IC


def weights_between(categories: ArrayLike, kind: str = "identity") -> np.ndarray:
    """How much two ratings agree: 1 where they are equal, else less by their distance (Gwet 2014, chapter 3).

    Args:
        categories: [C] the values of the ratings in ascending order.
        kind: "identity" gives 0 to all that differ; "linear" and "quadratic" 1 - (distance / range)^1 or ^2.

    Returns:
        float64 [C, C].
    """
    one_of("weights", kind, WEIGHTS)
    values_C = _categories(categories)
    if kind == "identity":
        return np.eye(len(values_C))
    distance_CC = np.abs(values_C[:, None] - values_C) / (values_C[-1] - values_C[0])
    return 1 - distance_CC ** {"linear": 1, "quadratic": 2}[kind]


def gwet(counts_IC: ArrayLike, categories: ArrayLike, weights: str = "identity") -> float:
    """Gwet's AC1, and with weights other than "identity" AC2 (Gwet 2008; Gwet 2014, sections 2.4 and 4.5).

    Every category counts, also one that nobody chose: how many there are says what agreement chance would bring.

    Args:
        counts_IC: of `count_ratings`; items of one rating say what raters choose, not whether they agree.
        categories: [C] the values of the ratings in ascending order.
        weights: one of WEIGHTS.

    Raises:
        UserError: no item has two ratings.
    """
    counts = _counts(counts_IC, categories)
    weights_CC = weights_between(categories, weights)
    raters_I = counts.sum(1)
    shared = raters_I >= 2
    # Of the ratings that each rating of an item meets, itself left out, which share agrees with it.
    agreeing_I = (counts * (counts @ weights_CC - 1)).sum(1)[shared]
    observed = np.mean(agreeing_I / (raters_I * (raters_I - 1))[shared])
    rated = raters_I > 0
    share_C = np.mean(counts[rated] / raters_I[rated, None], axis=0)
    size = len(share_C)
    chance = weights_CC.sum() / (size * (size - 1)) * np.sum(share_C * (1 - share_C))
    return float((observed - chance) / (1 - chance))


def krippendorff(counts_IC: ArrayLike, categories: ArrayLike, metric: str = "nominal") -> float:
    """Krippendorff's alpha (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", part E).

    Args:
        counts_IC: of `count_ratings`; items of one rating are left out.
        categories: [C] the values of the ratings in ascending order.
        metric: what two ratings' difference is; one of METRICS.

    Raises:
        UserError: no item has two ratings, or all ratings are equal, for which alpha is not defined.
    """
    one_of("metric", metric, METRICS)
    counts = _counts(counts_IC, categories)
    counts = counts[counts.sum(1) >= 2]
    total_C = counts.sum(0)
    difference_CC = _difference(total_C, _categories(categories), metric)
    # Pairs of ratings of one item, a rating with itself among them: their difference is 0.
    pairs_ICC_sum = (counts / (counts.sum(1, keepdims=True) - 1)).T @ counts
    expected = total_C @ difference_CC @ total_C / (total_C.sum() - 1)
    require(expected > 0, "all ratings are equal, so Krippendorff's alpha is not defined: use Gwet's AC1")
    return float(1 - np.sum(pairs_ICC_sum * difference_CC) / expected)


def _difference(total_C: np.ndarray, values_C: np.ndarray, metric: str) -> np.ndarray:
    """The square of how far apart two categories are."""
    if metric == "nominal":
        return 1 - np.eye(len(values_C))
    # Ordinal: how many ratings lie between, which the ranks' middles say.
    scale_C = values_C if metric == "interval" else np.cumsum(total_C) - total_C / 2
    return (scale_C[:, None] - scale_C) ** 2


def bootstrap_error(
    statistic: Callable[[np.ndarray], float], counts_IC: np.ndarray, samples: int = 200, seed: int = 0
) -> float:
    """The standard error of an agreement over items: its deviation over `samples` redrawings of the items."""
    require(samples > 1, f"a bootstrap needs 2 samples or more, got {samples}")
    generator = np.random.default_rng(seed)
    items = len(counts_IC)
    return float(np.std([statistic(counts_IC[generator.integers(items, size=items)]) for _ in range(samples)], ddof=1))


def _categories(categories: ArrayLike) -> np.ndarray:
    values_C = np.asarray(categories, float)
    if values_C.ndim != 1 or len(values_C) < 2 or not np.all(np.diff(values_C) > 0):
        raise UserError(f"categories must be two or more values in ascending order, got {values_C.tolist()}")
    return values_C


def _counts(counts_IC: ArrayLike, categories: ArrayLike) -> np.ndarray:
    counts, width = np.asarray(counts_IC, float), len(_categories(categories))
    require(
        counts.ndim == 2 and counts.shape[1] == width,
        f"counts of {width} categories have the shape [items, {width}], got {list(counts.shape)}",
    )
    require(bool(np.all(counts >= 0)), "counts of ratings must not be negative")
    require(bool(np.any(counts.sum(1) >= 2)), "no item has two ratings, so there is nothing to agree on")
    return counts
