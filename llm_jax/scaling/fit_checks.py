"""What data must be for a law to be fitted, and what the fits share in stating their intervals.

Shapes: N points, S draws.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from llm_jax.errors import UserError, require
from llm_jax.scaling import fit_noise
from llm_jax.scaling.fit_budgets import budget_numbers
from llm_jax.scaling.fit_noise import Array
from llm_jax.scaling.trial import TrialResult

MIN_POINTS = 5  # budgets of compute: three parameters, and two points left to show the noise
MIN_RANGE = 10.0  # largest over smallest compute
STUCK = 1e-3  # L_inf below this share of the smallest loss is at its bound, 0


def check_points(
    compute: Sequence[float], loss: Sequence[float], groups: Sequence[Hashable] | None = None
) -> tuple[Array, Array, np.ndarray]:
    """Points that may identify a law, as arrays with their groups' indices; `UserError` says why they cannot."""
    compute_N, loss_N = _numbers("compute", compute), _numbers("loss", loss)
    require(
        compute_N.size == loss_N.size,
        f"compute and loss must be lists of one length, not of {compute_N.size} and {loss_N.size}",
    )
    for name, values in (("compute", compute_N), ("loss", loss_N)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        require(
            bad.size == 0,
            f"the {name} of point {bad[0] if bad.size else 0} is {values[bad[0]] if bad.size else 0}: leave out "
            "points that are not positive and finite",
        )
    budgets = len(set(budget_numbers(compute_N.tolist())))
    require(
        budgets >= MIN_POINTS,
        f"{budgets} distinct budgets of compute (5 % apart) cannot tell a, b and L_inf: train at {MIN_POINTS} or more",
    )
    ratio = float(compute_N.max() / compute_N.min())
    require(
        ratio >= MIN_RANGE,
        f"compute spans a factor of {ratio:.3g}, too little to tell a, b and L_inf: span {MIN_RANGE:g} or more",
    )
    slope = float(np.polyfit(np.log(compute_N), np.log(loss_N), 1)[0])
    require(slope < 0, "losses do not fall with compute: there is no law to fit; look for runs that diverged")
    labels = compute_N.tolist() if groups is None else list(groups)
    require(len(labels) == loss_N.size, f"{len(labels)} groups name {loss_N.size} points: give one to each")
    return compute_N, loss_N, fit_noise.group_indices(labels)


def check_confidence(confidence: float) -> None:
    """`UserError` unless it is a share."""
    require(0 < confidence < 1, f"the fit's confidence {confidence} must be in (0, 1)")


def check_losses(results: Sequence[TrialResult]) -> None:
    """`UserError` that names the first trial whose loss is not positive and finite."""
    for result in results:
        require(
            bool(np.isfinite(result.loss) and result.loss > 0),
            f"trial {result.name} has the loss {result.loss}, which is not positive and finite: leave it out",
        )


def _numbers(name: str, values: Sequence[float]) -> Array:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a list of numbers, not {' '.join(str(values).split())[:60]}") from None
    require(numbers.ndim == 1, f"{name} must be a list of numbers, not of shape {numbers.shape}")
    return numbers


def percentiles(value_S: Array, confidence: float) -> tuple[float, float]:
    """The central interval of draws."""
    low, high = np.quantile(value_S, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
