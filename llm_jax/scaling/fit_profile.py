"""Exact profile intervals of L(C) = a*C^b + L_inf by least squares.

For a given exponent b the law is linear in a and L_inf, so that one line search over b finds the global least squares
(variable projection, Golub & Pereyra 1973), and the set of laws that the data allow is known exactly: those whose sum
of squares is at most the least one plus t^2 times the noise. An interval is the range of a quantity over that set.
Unlike a standard error times two it is as lopsided as the data are, and unlike a bootstrap of a few points it covers.

Shapes: B exponents, N points, 2 linear coefficients (the amplitude at the centre of the data, and L_inf).
"""

import dataclasses

import numpy as np
from scipy import stats

from llm_jax.scaling import fit_noise
from llm_jax.scaling.fit_noise import Array, Noise

PARAMETERS = 3
STEEPEST, FLATTEST = 30.0, 1e-2  # exponents tried, times the logarithm of the range of compute
SEARCHED = 400
ROUNDS = 6  # of searching, each between the ends that the last one found


@dataclasses.dataclass(frozen=True)
class Profile:
    """The least squares for every exponent, and the laws that the data allow."""

    b_B: Array
    linear_B2: Array
    covariance_B22: Array  # of `linear_B2`, over the variance within groups
    squares_B: Array  # summed, whitened
    limit: float  # of `squares_B` in the allowed set
    noise: Noise
    scale_N: Array  # the fitted losses: the noise is relative to them

    @property
    def best(self) -> int:
        """Index of the least squares."""
        return int(self.squares_B.argmin())

    @property
    def flat_allowed(self) -> bool:
        """Whether the data allow an exponent so small that the law is a straight line in log C: L_inf is unbounded."""
        return bool(self.squares_B[-1] <= self.limit)

    @property
    def steep_allowed(self) -> bool:
        """Whether the data allow an exponent so large that only the smallest compute lies above L_inf."""
        return bool(self.squares_B[0] <= self.limit)

    def interval(self, weight_B2: Array, new_run: bool = False) -> tuple[float, float]:
        """Range of weight(b) . (amplitude, L_inf) over the allowed laws; `new_run` adds the noise of one more run."""
        middle_B = np.sum(weight_B2 * self.linear_B2, axis=-1)
        variance_B = np.einsum("bi,bij,bj->b", weight_B2, self.covariance_B22, weight_B2)
        if new_run:
            variance_B = variance_B + (1 + self.noise.ratio) * middle_B[self.best] ** 2
        allowed_B = self.squares_B <= self.limit
        half_B = np.sqrt(variance_B * np.maximum(self.limit - self.squares_B, 0))
        return float((middle_B - half_B)[allowed_B].min()), float((middle_B + half_B)[allowed_B].max())

    def exponents(self) -> tuple[float, float]:
        """Range of b over the allowed laws."""
        allowed_B = self.b_B[self.squares_B <= self.limit]
        return float(allowed_B.min()), float(allowed_B.max())


def profile(x_N: Array, loss_N: Array, group_N: np.ndarray, confidence: float) -> Profile:
    """Profile the law over its exponent.

    Args:
        x_N: log compute less its mean.
        loss_N: losses.
        group_N: the group of each point, from `fit_noise.group_indices`; more than three groups.
        confidence: of the allowed set.
    """
    b_B = -np.geomspace(STEEPEST, FLATTEST, SEARCHED) / np.ptp(x_N)
    independent_NN = np.eye(x_N.size)
    # First with equal weights; then relative to the losses that this fits.
    scale_N = loss_N - _best(_solve(b_B, x_N, loss_N, np.ones_like(loss_N), independent_NN))
    residual_N = _best(_solve(b_B, x_N, loss_N, scale_N, independent_NN))
    noise = fit_noise.estimate(residual_N, group_N, PARAMETERS)
    whitener_NN = fit_noise.whitener(group_N, noise.ratio)
    for _ in range(ROUNDS):
        found = _allowed(b_B, x_N, loss_N, scale_N, whitener_NN, noise, confidence)
        index = np.flatnonzero(found.squares_B <= found.limit)
        if index.size > SEARCHED // 4:
            break
        b_B = np.linspace(b_B[max(index[0] - 1, 0)], b_B[min(index[-1] + 1, SEARCHED - 1)], SEARCHED)
    return found


def _allowed(
    b_B: Array, x_N: Array, loss_N: Array, scale_N: Array, whitener_NN: Array, noise: Noise, confidence: float
) -> Profile:
    linear_B2, covariance_B22, squares_B, residual_BN = _solve(b_B, x_N, loss_N, scale_N, whitener_NN)
    best = int(squares_B.argmin())
    t = float(stats.t.ppf(0.5 + confidence / 2, noise.degrees))
    limit = float(squares_B[best]) + t**2 * _variance(residual_BN[best], noise)
    return Profile(b_B, linear_B2, covariance_B22, squares_B, limit, noise, scale_N)


def _variance(residual_N: Array, noise: Noise) -> float:
    """Variance of a whitened residual: of all, or of the groups' means where these differ more than their runs."""
    pooled = float(np.sum(residual_N**2)) / (residual_N.size - PARAMETERS)
    if noise.between == 0:
        return pooled
    count_G = np.bincount(noise.group_N)
    sum_G = np.bincount(noise.group_N, residual_N)
    return max(pooled, float(np.sum(sum_G**2 / count_G)) / (count_G.size - PARAMETERS))


def _solve(
    b_B: Array, x_N: Array, loss_N: Array, scale_N: Array, whitener_NN: Array
) -> tuple[Array, Array, Array, Array]:
    """Linear least squares for every exponent: coefficients, (X^T X)^-1, sums of squares and whitened residuals."""
    weight_NN = whitener_NN / scale_N[None, :]
    design_BN2 = np.stack([np.exp(b_B[:, None] * x_N), np.ones((b_B.size, x_N.size))], axis=-1)
    white_BN2 = weight_NN @ design_BN2
    target_N = weight_NN @ loss_N
    normal_B22 = np.einsum("bni,bnj->bij", white_BN2, white_BN2)
    inverse_B22 = np.linalg.inv(normal_B22)
    linear_B2 = np.einsum("bij,bnj,n->bi", inverse_B22, white_BN2, target_N)
    residual_BN = target_N - np.einsum("bni,bi->bn", white_BN2, linear_B2)
    return linear_B2, inverse_B22, np.sum(residual_BN**2, axis=-1), residual_BN


def _best(solved: tuple[Array, Array, Array, Array]) -> Array:
    """Residuals of the best exponent, in the units of the losses if these were not scaled."""
    _, _, squares_B, residual_BN = solved
    residual_N: Array = residual_BN[squares_B.argmin()]
    return residual_N
