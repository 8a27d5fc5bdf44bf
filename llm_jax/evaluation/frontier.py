"""How much reward a policy has for how far it went: methods and settings by KL divergence from the start.

The more is paid for the distance, the higher a reward; that what is not paid rises with it is the question (Gao et al.,
2022). Choosing the best of n samples of the start, which trains nothing, is what methods are compared with.

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
from llm_jax.evaluation.best_of import Estimate, estimate, order_weights
from llm_jax.evaluation.figures import SERIES, panels
from llm_jax.evaluation.tables import Table

Columns = Mapping[str, np.ndarray]  # numbers of a run by name, [P,K] or [P]; NaN = a prompt that it does not judge
BEST_OF_N = "best of n"
KL = "kl"
MARKS = ("s--", "o-", "^-", "D-", "v-", "P-")


class Point(NamedTuple):
    """A method with one setting."""

    method: str
    setting: str  # such as its beta
    kl: Estimate
    scores: Mapping[str, Estimate]  # of each referee, and whatever else is known


def point(method: str, setting: str, runs: Sequence[Columns]) -> Point:
    """Means over prompts and samples of runs that differ in their seed.

    Errors are those of the mean over seeds or, where there is one run, over prompts.
    """
    require(bool(runs), f"{method} {setting}: there is no run")
    found = {}
    for name in runs[0]:
        means = [_by_prompt(run[name]) for run in runs]
        found[name] = estimate(means[0] if len(means) == 1 else np.array([values_P.mean() for values_P in means]))
    return Point(method, setting, found.pop(KL), found)


def best_of_n(start: Columns, paid: str, counts: Sequence[int]) -> list[Point]:
    """What the best of n of the start's samples has, chosen by the paid reward, in expectation over n of the K samples.

    The KL divergence is at most log n - (n - 1) / n (Stiennon et al., 2020), which is what stands there. Columns [P]
    are left out, and prompts whose paid reward is NaN. Raises `UserError` for an n above K.
    """
    paid_PK = start[paid]
    samples = paid_PK.shape[1]
    require(max(counts) <= samples, f"the best of {max(counts)} cannot be told from {samples} samples")
    order_PK = np.argsort(paid_PK, axis=1, kind="stable")
    ranked = {
        name: np.take_along_axis(np.where(np.isnan(paid_PK), np.nan, values), order_PK, axis=1)
        for name, values in start.items()
        if values.ndim == 2 and name != KL
    }
    found = []
    for n in counts:
        weights_K = order_weights(samples, n, n)
        scores = {name: estimate(_by_prompt(values_PK @ weights_K)) for name, values_PK in ranked.items()}
        found.append(Point(BEST_OF_N, f"n = {n}", Estimate(best_of_n_kl(n), 0.0), scores))
    return found


def best_of_n_kl(n: int) -> float:
    """The bound on the KL divergence of the best of n samples from one, nats."""
    return math.log(n) - (n - 1) / n


def best_within(points: Sequence[Point], name: str, kl: float) -> Point | None:
    """Of the points that are no further away than `kl`, the one with the most of `name`; None where there are none."""
    near = [each for each in points if each.kl.mean <= kl]
    return max(near, key=lambda each: each.scores[name].mean, default=None)


def turn(points: Sequence[Point], paid: str, unpaid: str) -> tuple[Point, Point] | None:
    """Where over-optimisation starts: the point with the most of `unpaid`, and the one behind it with the least.

    None where no point further away has more of `paid` but less of `unpaid`, by more than two standard errors.
    """
    peak = max(points, key=lambda each: each.scores[unpaid].mean)
    behind = [
        each
        for each in points
        if each.kl.mean > peak.kl.mean
        and each.scores[paid].mean > peak.scores[paid].mean
        and peak.scores[unpaid].mean - each.scores[unpaid].mean
        > 2 * math.hypot(*(end.scores[unpaid].error for end in (peak, each)))
    ]
    return (peak, min(behind, key=lambda each: each.scores[unpaid].mean)) if behind else None


def _by_prompt(values: np.ndarray) -> np.ndarray:
    """The mean over samples of each prompt that is judged."""
    means_P = values.reshape(len(values), -1).mean(axis=1)
    return means_P[~np.isnan(means_P)]


def table(title: str, points: Sequence[Point], names: Mapping[str, str], notes: Sequence[str] = ()) -> Table:
    """A row for each point; `names` maps what is shown to its heading."""
    settings = any(each.setting for each in points)  # where there are none, there is no column for them
    headings = ("method", *(["setting"] if settings else []), "KL (nats)", *names.values())
    rows = tuple(
        (
            each.method,
            *([each.setting] if settings else []),
            *map(_written, (each.kl, *(each.scores.get(name) for name in names))),
        )
        for each in points
    )
    return Table(title, headings, rows, frozenset(headings) - {"method", "setting"}, tuple(notes))


def _written(found: Estimate | None) -> str:
    if found is None:
        return ""
    error = f" ± {found.error:.2f}" if found.error > 0 else ""
    return f"{found.mean:.2f}{error}"


def draw(points: Sequence[Point], names: Mapping[str, str], path: Path) -> None:
    """Each of `names` over the KL divergence, whose axis is by its square root: a panel for each, a line a method."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    methods = list(dict.fromkeys(each.method for each in points))
    with panels(path, 4.4 * columns, 0.6 + 3.4 * rows, list(names.values()), columns) as grid:
        for axes, name in zip(grid, names):
            for number, method in enumerate(methods):
                line = [each for each in points if each.method == method and name in each.scores]
                if line:
                    _draw_line(axes, line, name, number)
            axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.set_xlim(left=0)
            axes.set_xlabel("KL divergence from the start (nats)")
        grid[0].figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)


def _draw_line(axes: Axes, line: Sequence[Point], name: str, number: int) -> None:
    line = sorted(line, key=lambda each: each.kl.mean)
    axes.errorbar(
        [each.kl.mean for each in line],
        [each.scores[name].mean for each in line],
        xerr=[each.kl.error for each in line],
        yerr=[each.scores[name].error for each in line],
        fmt=MARKS[(number + number // len(SERIES)) % len(MARKS)],  # no two of 36 have both colour and mark in common
        color=SERIES[number % len(SERIES)],
        markersize=4,
        linewidth=1,
        label=line[0].method,
    )
