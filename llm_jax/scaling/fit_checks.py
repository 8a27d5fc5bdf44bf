"""What data must be for a law to be fitted, and what the fits share in stating their intervals.

Shapes: N points, S draws.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from llm_jax.errors import require
from llm_jax.scaling import fit_noise
from llm_jax.scaling.fit_noise import Array

MIN_POINTS = 5  # of distinct compute: three parameters, and two points left to show the noise
MIN_RANGE = 10.0  # largest over smallest compute
STUCK = 1e-3  # L_inf below this share of the smallest loss is at its bound, 0


def check_points(
    compute: Sequence[float], loss: Sequence[float], groups: Sequence[Hashable] | None = None
) -> tuple[Array, Array, np.ndarray]:
    """Points that may identify a law, as arrays with their groups' indices; `UserError` says why they cannot."""
    compute_N, loss_N = np.asarray(compute, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    require(
        compute_N.ndim == 1 and compute_N.shape == loss_N.shape,
        f"compute and loss must be lists of one length, not of shapes {compute_N.shape} and {loss_N.shape}",
    )
    for name, values in (("compute", compute_N), ("loss", loss_N)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        require(
            bad.size == 0,
            f"the {name} of point {bad[0] if bad.size else 0} is {values[bad[0]] if bad.size else 0}: leave out "
            "points that are not positive and finite",
        )
    distinct = np.unique(compute_N)
    require(
        distinct.size >= MIN_POINTS,
        f"{distinct.size} distinct compute points cannot tell a, b and L_inf: train {MIN_POINTS} sizes or more",
    )
    ratio = float(distinct[-1] / distinct[0])
    require(
        ratio >= MIN_RANGE,
        f"compute spans a factor of {ratio:.3g}, too little to tell a, b and L_inf: span {MIN_RANGE:g} or more",
    )
    slope = float(np.polyfit(np.log(compute_N), np.log(loss_N), 1)[0])
    require(slope < 0, "losses do not fall with compute: there is no law to fit; look for runs that diverged")
    labels = compute_N.tolist() if groups is None else list(groups)
    require(len(labels) == loss_N.size, f"{len(labels)} groups name {loss_N.size} points: give one to each")
    return compute_N, loss_N, fit_noise.group_indices(labels)


def percentiles(value_S: Array, confidence: float) -> tuple[float, float]:
    """The central interval of draws."""
    low, high = np.quantile(value_S, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
