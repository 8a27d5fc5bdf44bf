"""The noise about a fitted law: what runs of one group share, what each run has of its own, and how to draw both.

A group is a set of runs with a common error: the seeds of one compute point, or the points of one training curve.
What keeps a whole size off the law (its learning rate, its shape) moves all its seeds together, so that seeds alone
would make a law look surer than it is. Losses are compared as logarithms: noise is a fraction of the loss.

Shapes: N points, G groups, S draws.
"""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LARGEST_RATIO = 1e4  # of the variances between and within groups; above, seeds add nothing that can be told


def group_indices(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    """Number the labels of N points 0, 1, ... in the order of their first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in groups], dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Variances of the noise about a law, relative to the loss, and how well they are known."""

    between: float  # variance shared by a group
    within: float  # variance of one run
    degrees: float  # of freedom of Student's t
    group_N: NDArray[np.int64]

    @property
    def ratio(self) -> float:
        """Variance between groups over variance within."""
        return self.between / self.within if self.within > 0 else 0.0

    @property
    def total(self) -> float:
        """Variance of a new run in a group of its own."""
        return self.between + self.within

    def draw(self, generator: np.random.Generator, draws: int, others: int = 0) -> Array:
        """Draw noise, [S, N + others], each of the `others` in a group of its own.

        A draw's scale is drawn first (a scaled inverse chi-square), so that quantiles over the draws are Student's:
        with few points the noise itself is uncertain.
        """
        groups = int(self.group_N.max()) + 1
        group = np.concatenate([self.group_N, groups + np.arange(others)])
        scale_S1 = np.sqrt(self.degrees / generator.chisquare(self.degrees, (draws, 1)))
        shared = generator.normal(size=(draws, groups + others)) * np.sqrt(self.between)
        own = generator.normal(size=(draws, group.size)) * np.sqrt(self.within)
        noise: Array = scale_S1 * (shared[:, group] + own)
        return noise


def estimate(residual_N: Array, group_N: NDArray[np.int64], parameters: int) -> Noise:
    """Split residuals of a law with so many parameters into noise between and within groups, by their mean squares.

    Needs more groups than parameters. When groups differ no more than their runs do, there are between G - P
    (whole groups went wrong, unseen) and N - P degrees of freedom (only seeds differ); the mean of the two keeps the
    intervals honest in either case, as `llm_jax.scaling.recovery` measures.
    """
    count_G = np.bincount(group_N)
    mean_G = np.bincount(group_N, residual_N) / count_G
    points, groups = residual_N.size, count_G.size
    of_groups = float(np.sum(count_G * mean_G**2)) / (groups - parameters)
    if points == groups:
        return Noise(0.0, of_groups, groups - parameters, group_N)
    of_runs = float(np.sum((residual_N - mean_G[group_N]) ** 2)) / (points - groups)
    if of_groups <= of_runs:
        pooled = float(np.sum(residual_N**2)) / (points - parameters)
        return Noise(0.0, pooled, (groups + points) / 2 - parameters, group_N)
    runs_per_group = (points - float(np.sum(count_G**2)) / points) / (groups - 1)
    within = max(of_runs, of_groups / (1 + LARGEST_RATIO * runs_per_group))
    return Noise((of_groups - within) / runs_per_group, within, groups - parameters, group_N)


def whitener(group_N: NDArray[np.int64], ratio: float) -> Array:
    """The [N, N] matrix that turns noise with this ratio of variances into independent noise of the variance within.

    The inverse square root of 1 + ratio * (same group), in closed form: group means shrink, deviations stay.
    """
    same_NN = (group_N[:, None] == group_N[None, :]).astype(np.float64)
    count_N = same_NN.sum(axis=1)
    shrink_N = (1 - 1 / np.sqrt(1 + ratio * count_N)) / count_N
    matrix: Array = np.eye(group_N.size) - shrink_N[:, None] * same_NN
    return matrix
