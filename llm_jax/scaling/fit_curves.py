"""The compute-efficient frontier of training curves: their lower envelope.

Shapes: N points.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jax.errors import require
from llm_jax.scaling.fit_budgets import SAME_BUDGET, seeds
from llm_jax.scaling.trial import TrialResult

ROUNDING = 1e-9  # by which an interpolated curve must lie lower to count
CURVES_BIAS = (
    "points before a run's end were taken at a learning rate that had not decayed: they lie above the loss of a run "
    "planned to end there"
)


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """A loss that no other trial reaches with this compute; seeds are averaged."""

    compute: float
    loss: float
    tokens: int
    parameters: int
    size: str
    name: str  # of the first seed's trial
    at_end: bool


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The lower envelope of training curves, by compute. `bias` says what is wrong with its points; "" = nothing."""

    points: tuple[FrontierPoint, ...]
    ends_only: bool
    bias: str

    @property
    def compute(self) -> tuple[float, ...]:
        """Of the points; for `fit_power_law`."""
        return tuple(point.compute for point in self.points)

    @property
    def loss(self) -> tuple[float, ...]:
        """Of the points; for `fit_power_law`."""
        return tuple(point.loss for point in self.points)

    @property
    def groups(self) -> tuple[str, ...]:
        """The run of each point: points of one curve share its error; for `fit_power_law`."""
        return tuple(point.name for point in self.points)


def frontier(results: Sequence[TrialResult], *, ends_only: bool = False) -> Frontier:
    """The (compute, loss) points of all curves that lie on their lower envelope, as one run gives many points.

    A point is on it if no curve, interpolated in log compute, lies below it there or had reached its loss with less
    compute. Seeds of a trial are averaged first, or the envelope would pick the lucky ones. Points before a run's end
    are biased upwards, since the learning rate had not decayed; `ends_only` leaves them out, and then each end is
    compared with ends alone, those of the same budget (within 5 %) included.

    Where a budget has one seed, the luckiest of several near-equal sizes is still picked, and a law of such ends lies
    too low: measured on synthetic sweeps of 11 sizes, its prediction at 10 times the largest compute by 0.1 % of the
    loss where seeds differ by 0.4 %, and by 0.8 % where they differ by 1 %; of 21 sizes and 0.4 %, by 0.4 %. How much
    depends on how flat the budgets' best sizes are: `recovery.EFFICIENT` has 0.4 % with five sizes.
    """
    require(bool(results), "there are no trials to draw a frontier of")
    curves = [_curve(members, ends_only) for members in seeds(results)]
    points = [point for curve in curves for point in curve]
    # Trials of one budget differ in compute by the rounding to whole steps: that makes none of them the cheaper one.
    slack = SAME_BUDGET if ends_only else 0.0
    lowest = [point for point in points if not any(_below(curve, point, slack) for curve in curves)]
    lowest.sort(key=lambda point: (point.compute, point.loss))
    return Frontier(tuple(lowest), ends_only, "" if ends_only else CURVES_BIAS)


def _curve(members: Sequence[TrialResult], ends_only: bool) -> list[FrontierPoint]:
    first = members[0]
    loss_N = np.mean([[loss for _, loss in member.curve] for member in members], axis=0)
    tokens_N = [tokens for tokens, _ in first.curve]
    points = [
        FrontierPoint(
            first.compute * tokens / first.tokens,
            float(loss),
            tokens,
            first.parameters,
            first.size,
            first.name,
            at_end=tokens == first.tokens,
        )
        for tokens, loss in zip(tokens_N[:-1], loss_N[:-1])
        if tokens > 0 and not ends_only
    ]
    end = float(np.mean([member.loss for member in members]))
    points.append(
        FrontierPoint(first.compute, end, first.tokens, first.parameters, first.size, first.name, at_end=True)
    )
    return points


def _below(curve: Sequence[FrontierPoint], point: FrontierPoint, slack: float) -> bool:
    """Whether a curve reaches a lower loss than a point's with no more compute, or with a share of `slack` more."""
    most = point.compute * (1 + slack)
    earlier = [other.loss for other in curve if other.compute <= most and other is not point]
    if earlier and min(earlier) <= point.loss - ROUNDING:
        return True
    if point in curve or not curve[0].compute <= point.compute <= curve[-1].compute:
        return False
    compute_N, loss_N = np.array([(other.compute, other.loss) for other in curve]).T
    return bool(np.interp(np.log(point.compute), np.log(compute_N), loss_N) < point.loss - ROUNDING)
