"""What changes from one iteration to the next beside the parameters: the KL coefficient, and the scores' moments.

Each is a small pytree with a pure update, so that it is checkpointed like everything else. Legend: B responses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.alignment.policy_config import KlConfig, RewardShapingConfig
from llm_jax.errors import require
from llm_jax.losses.policy import whiten

MAX_RELATIVE_ERROR = 0.2  # Ziegler et al. (2019), section 2.2
LEAST_VARIANCE = 1e-8  # scores that vary less are as good as equal: no scale is known yet
NEAREST = 2.0**-24  # between 1 and the float32 before it, so that the logits' limits are the same on both sides


class KlState(NamedTuple):
    """The coefficient of the coming iteration (float32), and how many iterations there were (int32)."""

    coefficient: jax.Array
    iteration: jax.Array


def init_kl(config: KlConfig) -> KlState:
    """The state before the first iteration."""
    return KlState(jnp.float32(config.coefficient), jnp.int32(0))


def update_kl(config: KlConfig, state: KlState, kl: jax.Array) -> KlState:
    """The state after an iteration whose responses had a mean KL (k1) of `kl` nats each, a float32 scalar.

    scheduled: on the line from `coefficient` to `end`. adaptive (Ziegler et al., 2019, section 2.2): multiplied by
    1 + gain * clip(kl / target - 1, -0.2, 0.2); by 1 if `kl` is NaN.
    """
    iteration, coefficient = state.iteration + 1, state.coefficient
    if config.kind == "scheduled":
        fraction = jnp.minimum(iteration / config.iterations, 1.0)
        coefficient = config.coefficient * (1.0 - fraction) + config.end * fraction
    elif config.kind == "adaptive":
        error = jnp.clip(kl / config.target - 1.0, -MAX_RELATIVE_ERROR, MAX_RELATIVE_ERROR)
        coefficient *= 1.0 + config.gain * jnp.where(jnp.isnan(error), 0.0, error)
    return KlState(jnp.asarray(coefficient, jnp.float32), iteration)


class Moments(NamedTuple):
    """Of all scores so far, float32 scalars: their number, their mean, their variance (the population's)."""

    number: jax.Array
    mean: jax.Array
    variance: jax.Array


def init_moments() -> Moments:
    """Of no scores."""
    return Moments(*(jnp.zeros((), jnp.float32) for _ in Moments._fields))


def update_moments(moments: Moments, scores_B: jax.Array) -> Moments:
    """With a batch's scores added (Chan et al., 1979).

    No sum of squares and no sum over the whole run is kept, so float32 is enough for any mean and any number of scores.
    """
    scores_B = scores_B.astype(jnp.float32)
    mean = jnp.mean(scores_B)
    variance = jnp.mean((scores_B - mean) ** 2)
    number = moments.number + scores_B.size
    share = scores_B.size / number
    difference = mean - moments.mean
    new_variance = moments.variance + share * (variance - moments.variance) + share * (1.0 - share) * difference**2
    return Moments(number, moments.mean + share * difference, new_variance)


def shape_scores(
    config: RewardShapingConfig, moments: Moments, scores_B: jax.Array, ended_B: jax.Array
) -> tuple[jax.Array, Moments]:
    """A batch's scores as rewards, float32 [B], and the moments with this batch in them.

    `ended_B` (bool) tells which responses have their end token. 0 and 1 have no logit: scores are kept 2^-24 away from
    them. Raises `UserError` for scores that are not floating point.
    """
    require(
        scores_B.ndim == 1 and jnp.issubdtype(scores_B.dtype, jnp.floating) and ended_B.shape == scores_B.shape,
        f"rewards: scores {scores_B.dtype}{list(scores_B.shape)} and ended {list(ended_B.shape)} must be floating "
        "point and one for each response",
    )
    scores_B = scores_B.astype(jnp.float32)
    if config.logit:
        scores_B = jax.scipy.special.logit(jnp.clip(scores_B, NEAREST, 1.0 - NEAREST))
    moments = update_moments(moments, scores_B)
    scores_B = _normalized(config.normalization, moments, scores_B)
    if config.limit:
        scores_B = jnp.clip(scores_B, -config.limit, config.limit)
    return scores_B - jnp.where(ended_B, 0.0, config.missing_end_penalty), moments


def _normalized(normalization: str, moments: Moments, scores_B: jax.Array) -> jax.Array:
    if normalization == "whiten":
        return whiten(scores_B, jnp.ones_like(scores_B))
    if normalization in ("running_mean", "running_both"):
        scores_B = scores_B - moments.mean
    if normalization in ("running_std", "running_both"):
        varies = moments.variance > LEAST_VARIANCE
        scores_B = scores_B * jnp.where(varies, jax.lax.rsqrt(jnp.maximum(moments.variance, LEAST_VARIANCE)), 1.0)
    return scores_B
