"""What PPO, GRPO and RLOO compute of rewards, values and log-probabilities: pure, masked functions.

Every [B,T] array is aligned as a `data.batch.Batch` is: position t is the state before the token `targets[t]` is drawn.
So `logprobs[t]` is that token's, `values[t]` is that state's value (the critic's output at position t, one before the
token's own), `rewards[t]` is what drawing the token earned. `mask[t]` is 1 where the token belongs to a response. A
stretch of ones is one trajectory: several may share a row, with zeros between them. Nothing under a 0 of the mask
matters, NaN included, and every result is 0 there.

Legend: B rows, T tokens, Q prompts, G responses to each of them. Everything is float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.errors import require
from llm_jax.losses.weighted import LossOutput, WeightedSum

GROUP_KINDS = ("grpo", "rloo")
WHITEN_EPS = 1e-8  # added to the variance
GROUP_EPS = 1e-6  # added to the standard deviation of a group


class KL(NamedTuple):
    """Three estimates of KL(policy || reference) from tokens drawn from the policy, per token [B,T] (Schulman, 2020).

    k1 and k3 have it as their expectation; k3 is never negative, and varies less where the two are close. k2's
    expectation is another divergence, but its gradient's expectation is the gradient of the KL.
    """

    k1: jax.Array  # log(policy / reference)
    k2: jax.Array  # k1^2 / 2
    k3: jax.Array  # reference / policy - 1 + k1


def kl_estimates(logprobs: jax.Array, reference: jax.Array) -> KL:
    """The estimates from the log-probabilities that policy and reference give to the same tokens."""
    _check_shapes("kl", logprobs, reference)
    k1 = logprobs.astype(jnp.float32) - reference.astype(jnp.float32)
    return KL(k1, 0.5 * k1**2, jnp.expm1(-k1) + k1)


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns [B,T] by generalised advantage estimation (Schulman et al., 2016, equation 16).

    delta[t] = rewards[t] + gamma values[t+1] - values[t], advantage[t] = delta[t] + gamma lam advantage[t+1], both with
    0 for what comes after a trajectory's last token; returns = advantages + values, which are lambda-returns.
    """
    _check_shapes("gae", rewards, values, mask)
    inside = mask > 0
    rewards, values = (jnp.where(inside, x, 0.0).astype(jnp.float32) for x in (rewards, values))

    def step(later: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        value_after, advantage_after = later
        reward, value, here = now
        advantage = jnp.where(here, reward + gamma * value_after - value + gamma * lam * advantage_after, 0.0)
        return (value, advantage), advantage

    start = (jnp.zeros_like(values[:, 0]),) * 2
    _, advantages = jax.lax.scan(step, start, (rewards.T, values.T, inside.T), reverse=True)
    return advantages.T, jnp.where(inside, advantages.T + values, 0.0)


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
    """`x` with standard deviation 1 over all that the mask keeps, and mean 0 or, without `shift_mean`, its own mean.

    Over the whole array: under `jit` on a mesh that is the global batch. Arrays of any shape; the variance is the
    population's; equal values become 0.
    """
    _check_shapes("whiten", x, mask)
    weights = (mask > 0).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weights), 1.0)
    x = jnp.where(mask > 0, x.astype(jnp.float32), 0.0)
    mean = jnp.sum(x) / count
    centred = (x - mean) * weights
    # Of equal values the mean can miss by a rounding, which must not be blown up to order 1.
    centred -= jnp.sum(centred) / count * weights
    whitened = centred * jax.lax.rsqrt(jnp.sum(centred**2) / count + WHITEN_EPS)
    return whitened if shift_mean else whitened + mean * weights


def token_rewards(scores_B: jax.Array, kl_BT: jax.Array, mask_BT: jax.Array, beta: jax.Array | float) -> jax.Array:
    """-beta * kl for every token of a response, plus the response's score at its last one (Ziegler et al., 2019).

    `kl_BT` is k1 of `kl_estimates`. A row holds one response; a row without any loses its score. Raises `UserError`
    for scores that are not floating point: integers would round what is added to them.
    """
    _check_shapes("token rewards", kl_BT, mask_BT)
    require(
        scores_B.shape == mask_BT.shape[:1] and jnp.issubdtype(scores_B.dtype, jnp.floating),
        f"token rewards: scores {scores_B.dtype}{list(scores_B.shape)} must be floating point, one for each of the "
        f"{mask_BT.shape[0]} rows",
    )
    inside_BT = mask_BT > 0
    index_T = jnp.arange(mask_BT.shape[1])
    last_B1 = jnp.max(jnp.where(inside_BT, index_T, -1), axis=1, keepdims=True)
    scores_BT = jnp.where(index_T == last_B1, scores_B.astype(jnp.float32)[:, None], 0.0)
    return scores_BT + jnp.where(inside_BT, -beta * kl_BT.astype(jnp.float32), 0.0)


def mean_per_sequence(mask_BT: jax.Array) -> jax.Array:
    """Weights, instead of a mask, with which a loss is the mean over rows of each row's mean over its tokens (GRPO)."""
    mask_BT = (mask_BT > 0).astype(jnp.float32)
    return mask_BT / jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1.0)


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: float,
    max_log_ratio: float,
    entropies: jax.Array | None = None,
    entropy_coefficient: float = 0.0,
    reference: jax.Array | None = None,
    kl_coefficient: float = 0.0,
) -> LossOutput:
    """PPO's clipped surrogate (Schulman et al., 2017, equation 7), to be minimised: its sum, and the sum of weights.

    Of a token: -min(ratio * advantage, clip(ratio, 1 - clip, 1 + clip) * advantage), with ratio = exp(logprob - old
    logprob). The log-ratio is kept within +-`max_log_ratio`, where the ratio is still finite; beyond that the token
    has no gradient, and so is it with the one to the reference. Gradients flow to `logprobs` and `entropies` only.

    Args:
      logprobs, old_logprobs: [B,T], of the policy now and when it drew the tokens.
      advantages: [B,T].
      mask: [B,T]; may be weights, such as `mean_per_sequence`'s.
      clip: of the ratio; 0 = none.
      max_log_ratio: above 0.
      entropies: [B,T], of the policy now; entropy_coefficient times it is subtracted.
      reference: [B,T], log-probabilities of the reference; kl_coefficient times k3 is added (DeepSeekMath, equation 3).

    Metrics, weighted by `mask`: "policy_loss" (the surrogate alone), "ratio", "clip_fraction" (of tokens whose gradient
    the clip takes away), "log_ratio_clamped" (of tokens beyond max_log_ratio), "approximate_kl" (k3 of the old policy
    from the new one) and, where they are given, "entropy" and "reference_kl" (k3).
    """
    _check_shapes("policy loss", logprobs, old_logprobs, advantages, mask)
    require(clip >= 0 and max_log_ratio > 0, f"policy loss: clip={clip} or max_log_ratio={max_log_ratio} is too small")
    logprobs, old_logprobs, advantages = (_kept(x, mask) for x in (logprobs, old_logprobs, advantages))
    old_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, advantages))
    difference = logprobs - old_logprobs
    log_ratio = jnp.clip(difference, -max_log_ratio, max_log_ratio)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip) if clip else ratio
    losses = -jnp.minimum(ratio * advantages, clipped * advantages)
    values = {
        "policy_loss": losses,
        "ratio": ratio,
        "clip_fraction": clipped * advantages < ratio * advantages,
        "log_ratio_clamped": jnp.abs(difference) > max_log_ratio,
        "approximate_kl": jnp.expm1(log_ratio) - log_ratio,
    }
    if entropies is not None:
        _check_shapes("policy loss", entropies, mask)
        values["entropy"] = _kept(entropies, mask)
        losses -= entropy_coefficient * values["entropy"]
    if reference is not None:
        from_reference = logprobs - jax.lax.stop_gradient(_kept(reference, mask))
        from_reference = jnp.clip(from_reference, -max_log_ratio, max_log_ratio)
        values["reference_kl"] = jnp.expm1(-from_reference) + from_reference
        losses += kl_coefficient * values["reference_kl"]
    return _output(losses, values, mask)


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, clip: float
) -> LossOutput:
    """Half the squared error of the critic, with its change clipped as PPO's is: the sum, and the sum of weights.

    Of a token: max((value - return)^2, (old + clip(value - old, +-clip) - return)^2) / 2; with clip = 0 the first
    square alone. All arguments are [B,T]; gradients flow to `values` only.

    Metrics, weighted by `mask`: "value_loss", "value_clip_fraction" (of tokens whose gradient the clip takes away),
    "value" and, for `explained_variance`, "return", "return_squared", "value_error" and "value_error_squared".
    """
    _check_shapes("value loss", values, old_values, returns, mask)
    require(clip >= 0, f"value loss: clip={clip} must not be negative")
    values, old_values, returns = (_kept(x, mask) for x in (values, old_values, returns))
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    squares = (values - returns) ** 2
    clipped = (old_values + jnp.clip(values - old_values, -clip, clip) - returns) ** 2 if clip else squares
    losses = 0.5 * jnp.maximum(squares, clipped)
    metrics = {
        "value_loss": losses,
        "value_clip_fraction": clipped > squares,
        "value": values,
        "return": returns,
        "return_squared": returns**2,
        "value_error": returns - values,
        "value_error_squared": squares,
    }
    return _output(losses, metrics, mask)


def explained_variance(
    returns: jax.Array, returns_squared: jax.Array, errors: jax.Array, errors_squared: jax.Array
) -> jax.Array:
    """1 - Var(return - value) / Var(return), of the means that `value_loss` reports; 0 where returns do not vary."""
    variance = returns_squared - returns**2
    unexplained = errors_squared - errors**2
    varies = variance > 0
    return jnp.where(varies, 1.0 - unexplained / jnp.where(varies, variance, 1.0), 0.0)


def group_advantages(scores_QG: jax.Array, kind: str) -> jax.Array:
    """An advantage for each of G responses to the same prompt, float32 [Q,G], without a critic.

    grpo: (score - mean) / (standard deviation of the population + 1e-6) of its group (DeepSeekMath, section 4.1.2).
    rloo: score - mean of the other responses' scores (Kool et al., 2019; Ahmadian et al., 2024). Equal scores give 0.
    """
    require(kind in GROUP_KINDS, f"group advantages: kind={kind!r} is not one of {', '.join(GROUP_KINDS)}")
    require(
        scores_QG.ndim == 2 and scores_QG.shape[1] > 1,
        f"group advantages: scores {scores_QG.shape} must be [prompts, responses], at least 2 responses to a prompt",
    )
    # The first score is subtracted so that equal scores are exactly 0, not a rounding that is then divided by itself.
    scores_QG = (scores_QG - scores_QG[:, :1]).astype(jnp.float32)
    centred_QG = scores_QG - jnp.mean(scores_QG, axis=1, keepdims=True)
    if kind == "rloo":
        responses = scores_QG.shape[1]
        return centred_QG * (responses / (responses - 1))
    deviations_Q1 = jnp.sqrt(jnp.mean(centred_QG**2, axis=1, keepdims=True))
    return centred_QG / (deviations_Q1 + GROUP_EPS)


def _kept(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask > 0, x.astype(jnp.float32), 0.0)


def _output(losses: jax.Array, values: dict[str, jax.Array], mask: jax.Array) -> LossOutput:
    """The weighted sums of a loss and of its metrics."""
    weights = mask.astype(jnp.float32)
    weight = jnp.sum(weights)
    metrics = {name: WeightedSum(jnp.sum(weights * value), weight) for name, value in values.items()}
    return LossOutput(jnp.sum(weights * losses), weight, metrics)


def _check_shapes(name: str, *arrays: jax.Array) -> None:
    shapes = [array.shape for array in arrays]
    require(len(set(shapes)) == 1, f"{name}: arrays of shapes {', '.join(map(str, shapes))} must have the same shape")
