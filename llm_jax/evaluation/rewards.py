"""How good rewards are: how often they agree with people's preferences, and what else they show.

Everything here is computed from scores, so any reward can be judged: a model's, a rule's, or a human's.

Legend: N pairs or responses.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.special import expit

from llm_jax.errors import UserError, require
from llm_jax.evaluation.tables import Table, quantity

CONFIDENCE = 0.95
CALIBRATION_BINS = 10
HISTOGRAM_BINS = 40
# From the least to the strongest preference, as LLaMA-2 (table 28) and Baichuan-2 (table 4) name them.
LLAMA2_STRENGTHS = {1: "Negligibly Better / Unsure", 2: "Slightly Better", 3: "Better", 4: "Significantly Better"}
SHARES = f"One run: its share and Wilson's {CONFIDENCE:.0%} interval. Several seeds: the mean ± its standard error."
BAICHUAN2_GAPS = {gap: f"gap {gap}" for gap in range(1, 6)}


@dataclasses.dataclass(frozen=True)
class Proportion:
    """How many of how many; an equal pair of rewards counts half."""

    right: float
    total: int

    @property
    def share(self) -> float:
        """In [0, 1]; NaN of nothing."""
        return self.right / self.total if self.total else math.nan

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Wilson's score interval (1927) for independent trials, without continuity correction; NaN of nothing."""
        if not self.total:
            return math.nan, math.nan
        z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
        shrink = 1 + z**2 / self.total
        middle = (self.share + z**2 / (2 * self.total)) / shrink
        half = z / shrink * math.sqrt(self.share * (1 - self.share) / self.total + (z / (2 * self.total)) ** 2)
        low, high = max(0.0, middle - half), min(1.0, middle + half)
        return min(low, self.share), max(high, self.share)  # of all or none, rounding may leave the share outside


@dataclasses.dataclass(frozen=True)
class PairScores:
    """Rewards of pairs whose order people know. Raises `UserError` for arrays that do not fit, or are not finite."""

    chosen_N: np.ndarray
    rejected_N: np.ndarray
    strengths_N: np.ndarray  # steps of preference, from 1
    chosen_lengths_N: np.ndarray  # tokens or characters
    rejected_lengths_N: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.chosen_N)
        require(count > 0, "there are no pairs of responses to judge rewards by")
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            require(
                values.shape == (count,), f"PairScores.{field.name} has the shape {values.shape}; it must be ({count},)"
            )
            check_finite(values, f"PairScores.{field.name}")
        require(bool(np.all(self.strengths_N >= 1)), "PairScores.strengths_N: the steps of preference begin with 1")

    @property
    def gaps_N(self) -> np.ndarray:
        """Chosen minus rejected, float64."""
        return self.chosen_N.astype(np.float64) - self.rejected_N.astype(np.float64)


def check_finite(values: np.ndarray, name: str) -> None:
    """Raise `UserError`, naming the first of them, where values are NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise UserError(f"{name}: {len(bad)} of {len(values)} are not finite, the first at index {bad[0]}")


def accuracy(gaps_N: np.ndarray) -> Proportion:
    """Pairs in which the chosen response has the higher reward. Raises `UserError` for NaN."""
    check_finite(gaps_N, "accuracy: gaps of rewards")
    return Proportion(float(np.sum(np.heaviside(gaps_N, 0.5))), len(gaps_N))


def accuracy_by_strength(scores: PairScores) -> dict[int, Proportion]:
    """The accuracy of each strength of preference that occurs, from the weakest."""
    found = np.unique(scores.strengths_N)
    return {int(strength): accuracy(scores.gaps_N[scores.strengths_N == strength]) for strength in found}


class LengthBias(NamedTuple):
    """The accuracy by which response is longer: a reward that only counts words is right where the longer is better."""

    shorter_better: Proportion
    longer_better: Proportion
    same_length: Proportion


def length_bias(scores: PairScores) -> LengthBias:
    """The accuracy on pairs whose shorter response people prefer, whose longer one, and the rest."""
    longer_N = np.sign(scores.chosen_lengths_N - scores.rejected_lengths_N)
    return LengthBias(*(accuracy(scores.gaps_N[longer_N == sign]) for sign in (-1, 1, 0)))


class CalibrationBin(NamedTuple):
    """Pairs of which the model is about equally sure."""

    confidence: float  # the mean
    accuracy: Proportion


def calibration(gaps_N: np.ndarray, bins: int = CALIBRATION_BINS) -> list[CalibrationBin]:
    """How often the preferred response wins by how sure the rewards are of their order, in bins that are not empty.

    By the model of the ranking loss (Bradley and Terry, 1952) the response with the higher reward is the better one
    with probability sigmoid(|gap|), from 0.5 to 1, which is cut into `bins` equal parts.
    """
    check_finite(gaps_N, "calibration: gaps of rewards")
    confidence_N = expit(np.abs(gaps_N))
    bin_N = np.minimum(((confidence_N - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        CalibrationBin(float(np.mean(confidence_N[bin_N == i])), accuracy(gaps_N[bin_N == i])) for i in np.unique(bin_N)
    ]


def calibration_error(curve: Sequence[CalibrationBin]) -> float:
    """The expected calibration error: the mean distance of accuracy and confidence, weighed by pairs."""
    total = sum(one.accuracy.total for one in curve)
    return sum(one.accuracy.total * abs(one.accuracy.share - one.confidence) for one in curve) / total


class Histogram(NamedTuple):
    """Scores of several groups in the same bins."""

    edges: np.ndarray  # float64 [bins + 1]
    counts: Mapping[str, np.ndarray]  # int64 [bins] of each group


def histogram(groups: Mapping[str, np.ndarray], bins: int = HISTOGRAM_BINS) -> Histogram:
    """Scores of each group, such as chosen and rejected responses. Raises `UserError` without any, or for NaN."""
    scores = np.concatenate([np.asarray(values, np.float64) for values in groups.values()]) if groups else np.empty(0)
    require(len(scores) > 0, "there are no scores for a histogram")
    check_finite(scores, "histogram: scores")
    edges = np.histogram_bin_edges(scores, bins)
    return Histogram(edges, {name: np.histogram(values, edges)[0] for name, values in groups.items()})


class Correlation(NamedTuple):
    """A rank correlation and the ends of its bootstrap interval."""

    rho: float
    low: float
    high: float
    texts: int


def spearman(
    rewards_N: np.ndarray,
    ratings_N: np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Correlation:
    """Spearman's rank correlation of rewards with people's mean ratings of the same texts; ties share a rank.

    The interval is of percentiles over texts drawn with replacement. Raises `UserError` for fewer than 3 texts, arrays
    that do not fit, NaN, or values that are all the same.
    """
    require(
        rewards_N.shape == ratings_N.shape and len(rewards_N) > 2,
        f"Spearman: {rewards_N.shape} rewards and {ratings_N.shape} ratings; there must be 3 or more, one for one",
    )
    for name, values in (("rewards", rewards_N), ("ratings", ratings_N)):
        check_finite(values, f"Spearman: {name}")
        require(np.ptp(values) > 0, f"Spearman: all {len(values)} {name} are the same, so they rank nothing")
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        again_N = generator.integers(0, len(rewards_N), len(rewards_N))
        if np.ptp(rewards_N[again_N]) and np.ptp(ratings_N[again_N]):
            drawn.append(_rank_correlation(rewards_N[again_N], ratings_N[again_N]))
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Correlation(_rank_correlation(rewards_N, ratings_N), float(low), float(high), len(rewards_N))


def _rank_correlation(a_N: np.ndarray, b_N: np.ndarray) -> float:
    return float(np.corrcoef(stats.rankdata(a_N), stats.rankdata(b_N))[0, 1])


class Detection(NamedTuple):
    """How well a threshold on the safety reward finds unsafe responses."""

    threshold: float  # on sigmoid(reward): below it a response is taken for unsafe
    recall: Proportion  # of the unsafe responses, those found
    precision: Proportion  # of those found, the unsafe ones


def unsafe_detection(rewards_N: np.ndarray, unsafe_N: np.ndarray, threshold: float) -> Detection:
    """Recall and precision of unsafe responses (bool [N]) at a threshold on the probability of being safe.

    LLaMA-2, section 3.2.3: its safety reward finds unsafe responses below 0.15 with a precision of 0.89 and a recall of
    0.55. Raises `UserError` for a threshold that is no probability, arrays that do not fit, or NaN.
    """
    require(0 < threshold < 1, f"the threshold {threshold} is a probability: it must be in (0, 1)")
    require(rewards_N.shape == unsafe_N.shape, f"{rewards_N.shape} rewards for {unsafe_N.shape} labels: one for each")
    check_finite(rewards_N, "unsafe detection: rewards")
    found_N = expit(rewards_N.astype(np.float64)) < threshold
    hits = int(np.sum(found_N & unsafe_N))
    return Detection(threshold, Proportion(hits, int(np.sum(unsafe_N))), Proportion(hits, int(np.sum(found_N))))


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """The accuracy of one reward on held-out pairs."""

    overall: Proportion
    by_strength: Mapping[int, Proportion]

    @classmethod
    def of(cls, scores: PairScores) -> "Accuracies":
        """Overall and by strength."""
        return cls(accuracy(scores.gaps_N), accuracy_by_strength(scores))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A reward model of a scaling study, and its accuracy on the same held-out pairs as the others."""

    model: str
    parameters: int
    pairs: int  # that it was trained on
    accuracy: Proportion


def percent(runs: Sequence[Proportion]) -> str:
    """The accuracy of one run with its Wilson interval, or the mean of several and its standard error, in percent."""
    if len(runs) == 1:
        low, high = runs[0].interval()
        return f"{100 * runs[0].share:.1f} ({100 * low:.1f} to {100 * high:.1f})" if runs[0].total else ""
    shares = [100 * run.share for run in runs]
    return f"{statistics.fmean(shares):.1f} ± {statistics.stdev(shares) / math.sqrt(len(shares)):.1f}"


def llama2_table(rows: Mapping[str, Sequence[Accuracies]]) -> Table:
    """Accuracy by strength of preference, the strongest first, and overall, in the shape of LLaMA-2's table 28.

    `rows` maps a row's name, such as a kind of margin, to its runs: one for each seed.
    """
    columns = dict(sorted(LLAMA2_STRENGTHS.items(), reverse=True))
    return _accuracy_table("Accuracy of rewards by strength of preference (%)", rows, columns, "Avg")


def baichuan2_table(rows: Mapping[str, Sequence[Accuracies]]) -> Table:
    """Accuracy by gap, the smallest first, and overall, in the shape of Baichuan-2's table 4; rows as in LLaMA-2's."""
    return _accuracy_table("Accuracy of rewards by gap between the responses (%)", rows, BAICHUAN2_GAPS, "all")


def _accuracy_table(
    title: str, rows: Mapping[str, Sequence[Accuracies]], columns: Mapping[int, str], overall: str
) -> Table:
    present = {strength for runs in rows.values() for run in runs for strength in run.by_strength}
    unknown = sorted(present - set(columns))
    require(not unknown, f"a table of {len(columns)} strengths of preference has no column for {unknown}")
    shown = [strength for strength in columns if strength in present]
    totals = {strength: _pairs(rows, strength) for strength in shown}
    cells = [(name, *(_cell(runs, strength) for strength in (*shown, None))) for name, runs in rows.items()]
    headings = ("reward", *(columns[strength] for strength in shown), overall)
    counted = ", ".join(f"{total:,} {columns[strength]}" for strength, total in totals.items())
    return Table(
        title,
        headings,
        tuple(cells),
        frozenset(headings[1:]),
        (f"Held-out pairs: {counted}. Equal rewards count half.", SHARES),
    )


def _pairs(rows: Mapping[str, Sequence[Accuracies]], strength: int) -> int:
    return max(run.by_strength[strength].total for runs in rows.values() for run in runs if strength in run.by_strength)


def _cell(runs: Sequence[Accuracies], strength: int | None) -> str:
    found = [run.overall if strength is None else run.by_strength.get(strength, Proportion(0, 0)) for run in runs]
    return percent(found) if all(one.total for one in found) else ""


def scaling_table(models: Sequence[Trained]) -> Table:
    """Accuracy by size of the model (rows) and training pairs (columns): the numbers of LLaMA-2's figure 6.

    Models of the same name and pairs are seeds of one another.
    """
    sizes = {one.model: one.parameters for one in sorted(models, key=lambda one: one.parameters)}
    amounts = sorted({one.pairs for one in models})
    runs: dict[tuple[str, int], list[Proportion]] = {}
    for one in models:
        runs.setdefault((one.model, one.pairs), []).append(one.accuracy)
    cells = tuple(
        (name, quantity(size), *(percent(runs.get((name, amount), [Proportion(0, 0)])) for amount in amounts))
        for name, size in sizes.items()
    )
    headings = ("model", "parameters", *(f"{quantity(amount)} pairs" for amount in amounts))
    return Table(
        "Accuracy of rewards by size of the model and number of training pairs (%)",
        headings,
        cells,
        frozenset(headings[1:]),
        (SHARES,),
    )


def length_bias_table(rows: Mapping[str, LengthBias]) -> Table:
    """The accuracy by which response is longer, for each reward."""
    headings = ("reward", "shorter is better", "longer is better", "same length")
    cells = tuple((name, *(percent([one]) for one in found)) for name, found in rows.items())
    title = "Accuracy of rewards by which response is better (%)"
    return Table(title, headings, cells, frozenset(headings[1:]), (SHARES,))


def detection_table(rows: Mapping[str, Sequence[Detection]]) -> Table:
    """Recall and precision of unsafe responses at each threshold, for each safety reward."""
    cells = tuple(
        (name, f"{found.threshold:g}", percent([found.recall]), percent([found.precision]))
        for name, detections in rows.items()
        for found in detections
    )
    headings = ("reward", "threshold", "recall", "precision")
    return Table("Unsafe responses found by safety rewards (%)", headings, cells, frozenset(headings[1:]), (SHARES,))
