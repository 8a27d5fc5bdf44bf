"""What the best of several samples is worth: its reward by how many there are, and by temperature.

Of K samples' sorted rewards, the expectation of any order statistic of n of them, drawn without replacement, is a
weighted sum of all K; it is what n fresh samples would have in expectation.

P prompts, K samples of each.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from llm_jax.errors import require
from llm_jax.evaluation.figures import SERIES, figure, legend_beside
from llm_jax.evaluation.tables import Table


class Estimate(NamedTuple):
    """A mean over prompts and its standard error."""

    mean: float
    error: float


def estimate(values_P: np.ndarray) -> Estimate:
    """The mean of values and its standard error; NaN of one value."""
    error = float(np.std(values_P, ddof=1)) / math.sqrt(len(values_P)) if len(values_P) > 1 else math.nan
    return Estimate(float(np.mean(values_P)), error)


class Curve(NamedTuple):
    """Rewards by number of samples n."""

    counts: tuple[int, ...]
    best: tuple[Estimate, ...]  # of n samples
    median: tuple[Estimate, ...]


def order_weights(samples: int, drawn: int, place: int) -> np.ndarray:
    """The probability of each of the sorted samples to be the `place`-th smallest, from 1, of `drawn` of them: [K].

    The i-th of K is with probability C(i-1, place-1) C(K-i, drawn-place) / C(K, drawn).
    """
    total = math.comb(samples, drawn)
    return np.array(
        [math.comb(i, place - 1) * math.comb(samples - 1 - i, drawn - place) / total for i in range(samples)]
    )


def best(rewards_PK: np.ndarray, drawn: int) -> np.ndarray:
    """The expected largest reward among `drawn` samples of each prompt, float64 [P]."""
    return _expected(rewards_PK, drawn, (drawn,))


def median(rewards_PK: np.ndarray, drawn: int) -> np.ndarray:
    """The expected median reward among `drawn` samples of each prompt, float64 [P]."""
    return _expected(rewards_PK, drawn, ((drawn + 1) // 2, drawn // 2 + 1))


def _expected(rewards_PK: np.ndarray, drawn: int, places: Sequence[int]) -> np.ndarray:
    samples = rewards_PK.shape[1]
    require(1 <= drawn <= samples, f"the best of {drawn} cannot be told from {samples} samples")
    weights_K = np.mean([order_weights(samples, drawn, place) for place in places], axis=0)
    return np.asarray(np.sort(rewards_PK.astype(np.float64), axis=1) @ weights_K)


def curve(rewards_PK: np.ndarray) -> Curve:
    """Best and median by the number of samples: 1, 2, 4, ... and K."""
    samples = rewards_PK.shape[1]
    counts = tuple(sorted({samples, *(2**power for power in range(samples.bit_length()))}))
    return Curve(
        counts,
        tuple(estimate(best(rewards_PK, count)) for count in counts),
        tuple(estimate(median(rewards_PK, count)) for count in counts),
    )


def table(title: str, curves: Mapping[str, Curve]) -> Table:
    """Best and median of n samples, a row for each curve and number."""
    rows = tuple(
        (name, str(count), f"{top.mean:.3f} ± {top.error:.3f}", f"{middle.mean:.3f} ± {middle.error:.3f}")
        for name, found in curves.items()
        for count, top, middle in zip(*found)
    )
    headings = ("samples of", "n", "best of n", "median of n")
    notes = ("Mean reward over prompts ± standard error. In expectation, from all samples of a prompt.",)
    return Table(title, headings, rows, frozenset(headings[1:]), notes)


def draw_best_and_median(curves: Mapping[str, Curve], path: Path) -> None:
    """LLaMA-2's figure 7: what there is to gain from more samples, between the median and the best of them."""
    with figure(path, 7.5, 4.2, "Reward of the best and of the median of n samples") as axes:
        for number, (name, found) in enumerate(curves.items()):
            colour = SERIES[number % len(SERIES)]
            for estimates, line, what in ((found.best, "o-", "best"), (found.median, "s--", "median")):
                _plot(axes, found.counts, estimates, line, colour, f"{name}, {what}")
        _samples_axis(axes)


def draw_by_temperature(curves: Mapping[str, Mapping[float, Curve]], path: Path) -> None:
    """LLaMA-2's figure 8: the best of n by temperature; of `curves`, a name's are by temperature, as lines of n."""
    with figure(path, 7.5, 4.2, "Reward of the best of n samples by temperature") as axes:
        for (name, found), line in zip(curves.items(), ("o-", "s--", "^:", "D-.")):
            temperatures = sorted(found)
            for number, count in enumerate(found[temperatures[0]].counts):
                estimates = [found[temperature].best[number] for temperature in temperatures]
                _plot(axes, temperatures, estimates, line, SERIES[number % len(SERIES)], f"{name}, n = {count}")
        axes.set_xlabel("temperature")
        axes.set_ylabel("reward")
        legend_beside(axes)


def _plot(
    axes: Axes, places: Sequence[float], estimates: Sequence[Estimate], line: str, colour: str, label: str
) -> None:
    means, errors = ([getattr(each, field) for each in estimates] for field in ("mean", "error"))
    axes.errorbar(places, means, yerr=errors, fmt=line, color=colour, capsize=3, markersize=4, label=label)


def _samples_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("samples n")
    axes.set_ylabel("reward")
    legend_beside(axes)
