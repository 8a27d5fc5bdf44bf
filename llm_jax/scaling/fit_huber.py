"""Laws that are sums of power laws, fitted to log losses by the Huber loss (Hoffmann et al. 2022, section 3.3).

A law is the exponential of a log-sum-exp: log L = log(sum over K of exp(term_k)), each term a function of the
parameters, so that every coefficient is positive by construction. The Huber loss on log residuals, quadratic below
`delta` and linear above, keeps a few trials that went wrong from bending the law.

Hoffmann et al. minimise from a grid of starts by L-BFGS, one after the other. Here all starts, and all draws of a
bootstrap, are minimised at once: damped Gauss-Newton steps with the Huber weights min(1, delta / |residual|).

Shapes: S starts or draws, K terms, N points, P parameters.
"""

from collections.abc import Callable

import numpy as np
from scipy import special

from llm_jax.scaling.fit_noise import Array

# Parameters [S, P] to terms [S, K, N] and their derivatives [S, K, N, P].
Terms = Callable[[Array], tuple[Array, Array]]
ITERATIONS = 100
LEAST_DAMPING, MOST_DAMPING = 1e-9, 1e9


def log_loss(terms: Terms, theta_SP: Array) -> Array:
    """The laws' log losses, [S, N]."""
    result: Array = special.logsumexp(terms(theta_SP)[0], axis=1)
    return result


def huber(residual: Array, delta: float) -> Array:
    """The Huber loss, elementwise: r^2 / 2 up to `delta`, then linear."""
    size = np.abs(residual)
    result: Array = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    return result


def minimise(terms: Terms, target_SN: Array, start_SP: Array, delta: float) -> tuple[Array, Array]:
    """Minimise the summed Huber loss of log residuals from every start.

    Args:
        terms: the law.
        target_SN: log losses; a single row serves all starts.
        start_SP: starting points.
        delta: where the Huber loss turns linear.

    Returns:
        The parameters [S, P] and the objective [S].
    """
    theta_SP = np.array(start_SP, dtype=np.float64)
    target_SN = np.broadcast_to(target_SN, (theta_SP.shape[0], np.shape(target_SN)[-1]))
    damping_S = np.full(theta_SP.shape[0], 1e-2)
    residual_SN, jacobian_SNP = _linearise(terms, theta_SP, target_SN)
    value_S = huber(residual_SN, delta).sum(-1)
    for _ in range(ITERATIONS):
        proposal_SP = theta_SP + _step(residual_SN, jacobian_SNP, damping_S, delta)
        new_residual_SN, new_jacobian_SNP = _linearise(terms, proposal_SP, target_SN)
        new_value_S = huber(new_residual_SN, delta).sum(-1)
        better_S = new_value_S < value_S  # False for NaN, too
        theta_SP[better_S] = proposal_SP[better_S]
        residual_SN[better_S] = new_residual_SN[better_S]
        jacobian_SNP[better_S] = new_jacobian_SNP[better_S]
        value_S = np.where(better_S, new_value_S, value_S)
        damping_S = np.clip(np.where(better_S, damping_S / 5, damping_S * 4), LEAST_DAMPING, MOST_DAMPING)
    return theta_SP, value_S


def _linearise(terms: Terms, theta_SP: Array, target_SN: Array) -> tuple[Array, Array]:
    """Residuals, and the derivatives of the log loss: those of the terms, weighted by each term's share."""
    with np.errstate(over="ignore", invalid="ignore"):
        terms_SKN, derivative_SKNP = terms(theta_SP)
        log_SN = special.logsumexp(terms_SKN, axis=1)
        share_SKN = np.exp(terms_SKN - log_SN[:, None])
        return target_SN - log_SN, np.einsum("skn,sknp->snp", share_SKN, derivative_SKNP)


def _step(residual_SN: Array, jacobian_SNP: Array, damping_S: Array, delta: float) -> Array:
    weight_SN = np.minimum(1, delta / np.maximum(np.abs(residual_SN), 1e-12))
    weighted_SNP = weight_SN[..., None] * jacobian_SNP
    normal_SPP = np.einsum("snp,snq->spq", weighted_SNP, jacobian_SNP)
    diagonal_SP = np.einsum("spp->sp", normal_SPP)
    floor_S1 = 1e-12 * diagonal_SP.max(axis=-1, keepdims=True) + 1e-300
    normal_SPP = normal_SPP + np.einsum(
        "sp,pq->spq", damping_S[:, None] * diagonal_SP + floor_S1, np.eye(diagonal_SP.shape[-1])
    )
    gradient_SP = np.einsum("snp,sn->sp", weighted_SNP, residual_SN)
    step_SP: Array = np.linalg.solve(normal_SPP, gradient_SP[..., None])[..., 0]
    return step_SP
