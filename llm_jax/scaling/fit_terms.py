"""The laws as sums of exponentials, whose terms `llm_jax.scaling.fit_huber` fits.

Shapes: S draws or starts, K terms, N points, P parameters.
"""

import numpy as np

from llm_jax.scaling.fit_huber import Terms
from llm_jax.scaling.fit_noise import Array

MIN_R, MAX_R = 0.05, 1e3  # repetitions; an R_D beyond is not seen in the data


def linear_terms(matrix_KNP: Array) -> Terms:
    """Terms that are linear in the parameters: `matrix_KNP` times them."""

    def terms(theta_SP: Array) -> tuple[Array, Array]:
        terms_SKN = np.einsum("knp,sp->skn", matrix_KNP, theta_SP)
        return terms_SKN, np.broadcast_to(matrix_KNP, (theta_SP.shape[0], *matrix_KNP.shape))

    return terms


def power_terms(x_N: Array) -> Terms:
    """Terms of a*exp(b*x) + L_inf with the parameters (log a, b, log L_inf)."""
    one_N, zero_N = np.ones_like(x_N), np.zeros_like(x_N)
    return linear_terms(np.stack([np.stack([one_N, x_N, zero_N], -1), np.stack([zero_N, zero_N, one_N], -1)]))


def parametric_terms(n_N: Array, d_N: Array, unique_N: Array, centres: tuple[float, float], repeated: bool) -> Terms:
    """Log E, log A' - alpha (log N - centre) and log B' - beta (log D' - centre), with their derivatives."""
    log_n_N = np.log(n_N) - centres[0]

    def terms(theta_SP: Array) -> tuple[Array, Array]:
        e_S1, a_S1, alpha_S1, b_S1, beta_S1 = np.split(theta_SP[:, :5], 5, axis=1)
        log_d_SN = np.broadcast_to(np.log(d_N) - centres[1], (theta_SP.shape[0], d_N.size))
        if repeated:
            r_S1 = repetitions(theta_SP[:, 5:])
            worth_SN = effective_tokens(d_N, unique_N, r_S1)
            log_d_SN = np.log(worth_SN) - centres[1]
        zero_SN = np.zeros_like(log_d_SN)
        terms_SKN = np.stack([e_S1 + zero_SN, a_S1 - alpha_S1 * log_n_N, b_S1 - beta_S1 * log_d_SN], axis=1)
        derivative_SKNP = np.zeros((*terms_SKN.shape, theta_SP.shape[1]))
        derivative_SKNP[:, 0, :, 0] = derivative_SKNP[:, 1, :, 1] = derivative_SKNP[:, 2, :, 3] = 1
        derivative_SKNP[:, 1, :, 2] = -log_n_N
        derivative_SKNP[:, 2, :, 4] = -log_d_SN
        if repeated:
            decay_SN = np.exp(-(d_N / unique_N - 1) / r_S1)
            growth_SN = unique_N * (r_S1 * (1 - decay_SN) - (d_N / unique_N - 1) * decay_SN)
            derivative_SKNP[:, 2, :, 5] = -beta_S1 * growth_SN / worth_SN
        return terms_SKN, derivative_SKNP

    return terms


def repetitions(log_r: Array) -> Array:
    """R_D, kept within e^5 of what can be seen: far beyond, the loss does not depend on it."""
    result: Array = np.exp(np.clip(log_r, np.log(MIN_R) - 5, np.log(MAX_R) + 5))
    return result


def effective_tokens(tokens_N: Array, unique_N: Array, repetitions: Array | float) -> Array:
    """Tokens that repeated data is worth: U + U * R_D * (1 - exp(-R / R_D)), R = D / U - 1."""
    repeats = tokens_N / unique_N - 1
    result: Array = unique_N * (1 + repetitions * -np.expm1(-repeats / repetitions))
    return result
