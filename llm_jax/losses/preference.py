"""Losses over pairs of responses of which people preferred one.

Legend: B rows, P pairs of a row; the last axis, 2, is (chosen, rejected).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from llm_jax.errors import require
from llm_jax.losses.weighted import LossOutput, WeightedSum


def margin(strengths: jax.Array, margins: Sequence[float]) -> jax.Array:
    """The margin of each strength of preference, float32: `margins[0]` is that of strength 1; NaN outside the scale."""
    table = jnp.asarray(margins, jnp.float32)
    known = (strengths >= 1) & (strengths <= len(margins))
    return jnp.where(known, table[jnp.clip(strengths - 1, 0, len(margins) - 1)], jnp.nan)


def reward_loss(
    rewards_BP2: jax.Array,
    strengths_BP: jax.Array,
    weights_BP: jax.Array,
    safety_labels_BP2: jax.Array,
    safety_weights_BP2: jax.Array,
    *,
    margins: Sequence[float],
    safety_coefficient: float = 0.0,
) -> LossOutput:
    """The sum over pairs of weight * (ranking loss + safety_coefficient * safety loss), and the sum of weights.

    Ranking (LLaMA-2, equation 2; without margins InstructGPT's, which Baichuan-2 uses):
    -log sigmoid(r_chosen - r_rejected - margin(strength)).

    Safety: LLaMA-2 has such an auxiliary loss but does not give it, so this one is ours. sigmoid(reward) is read as the
    probability that a response is safe, and the loss is the binary cross-entropy with its label: the mean over the two
    responses of a pair, of which one without a label adds 0.

    Args:
      rewards_BP2: float32.
      strengths_BP: int32, from 1 to len(margins) wherever there is a pair; another one there makes the loss NaN.
      weights_BP: float32, 0 where there is no pair: nothing at such a place matters, NaN included.
      safety_labels_BP2: float32, 1 = unsafe.
      safety_weights_BP2: float32, 0 = the response has no label.
      margins: of strength 1, 2, ...
      safety_coefficient: of the safety loss; 0 = none.

    Metrics: "ranking_loss", "accuracy" (equal rewards are half right), "reward_gap", "chosen_reward",
    "rejected_reward", "margin" and, with a coefficient, "safety_loss" and "safety_accuracy", which weigh responses.
    """
    _check_shapes(rewards_BP2, strengths_BP, weights_BP, safety_labels_BP2, safety_weights_BP2)
    is_pair_BP = weights_BP > 0
    weights_BP = weights_BP.astype(jnp.float32)
    rewards_BP2 = jnp.where(is_pair_BP[..., None], rewards_BP2.astype(jnp.float32), 0.0)
    margin_BP = jnp.where(is_pair_BP, margin(strengths_BP, margins), 0.0)
    chosen_BP, rejected_BP = rewards_BP2[..., 0], rewards_BP2[..., 1]
    gap_BP = chosen_BP - rejected_BP
    values = {
        "ranking_loss": jax.nn.softplus(margin_BP - gap_BP),
        "accuracy": jnp.heaviside(gap_BP, 0.5),
        "reward_gap": gap_BP,
        "chosen_reward": chosen_BP,
        "rejected_reward": rejected_BP,
        "margin": margin_BP,
    }
    weight = jnp.sum(weights_BP)
    metrics = {name: WeightedSum(jnp.sum(weights_BP * value_BP), weight) for name, value_BP in values.items()}
    total = metrics["ranking_loss"].total
    if safety_coefficient:
        label_weights_BP2 = weights_BP[..., None] * safety_weights_BP2
        metrics |= _safety(rewards_BP2, safety_labels_BP2, label_weights_BP2)
        total += 0.5 * safety_coefficient * metrics["safety_loss"].total
    return LossOutput(total, weight, metrics)


def _safety(rewards_BP2: jax.Array, labels_BP2: jax.Array, weights_BP2: jax.Array) -> dict[str, WeightedSum]:
    """Binary cross-entropy of -reward as the logit of "unsafe", and how often its sign is the label's."""
    cross_entropy_BP2 = jax.nn.softplus(-rewards_BP2) + labels_BP2 * rewards_BP2
    right_BP2 = (rewards_BP2 < 0) == (labels_BP2 > 0.5)
    weight = jnp.sum(weights_BP2)
    return {
        "safety_loss": WeightedSum(jnp.sum(weights_BP2 * cross_entropy_BP2), weight),
        "safety_accuracy": WeightedSum(jnp.sum(weights_BP2 * right_BP2), weight),
    }


def _check_shapes(
    rewards_BP2: jax.Array,
    strengths_BP: jax.Array,
    weights_BP: jax.Array,
    safety_labels_BP2: jax.Array,
    safety_weights_BP2: jax.Array,
) -> None:
    rewards, pairs = rewards_BP2.shape, strengths_BP.shape
    require(
        rewards == (*pairs, 2) == safety_labels_BP2.shape == safety_weights_BP2.shape and weights_BP.shape == pairs,
        f"reward loss: rewards {rewards} and safety labels {safety_labels_BP2.shape}, {safety_weights_BP2.shape} must "
        f"be [batch, pairs, 2], strengths {pairs} and weights {weights_BP.shape} [batch, pairs]",
    )


def dpo_loss(
    logprobs_BP2: jax.Array,
    references_BP2: jax.Array,
    lengths_BP2: jax.Array,
    weights_BP: jax.Array,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Direct preference optimisation: the sum over pairs of weight * loss, and the sum of weights.

    With h = log(policy / reference) of the chosen response minus that of the rejected one:

    - "sigmoid": -log sigmoid(beta * h) (Rafailov et al., 2023, equation 7).
    - "ipo": (h - 1 / (2 * beta))^2 (Azar et al., 2023, equation 17, where beta is called tau), over whole responses as
      there, not over their mean token.
    - "normalised": as "sigmoid", but with each response's log-ratio divided by its number of tokens (Lambert et al.,
      2024, Tulu 3). It keeps the reference, unlike SimPO. A token's log-ratio is small, so its beta is larger.

    Label smoothing is the probability that a preference is the wrong way round: (1 - e) * loss(h) + e * loss(-h)
    (Mitchell, 2023, for "sigmoid").

    Args:
      logprobs_BP2: float32, the policy's, summed over a response's tokens.
      references_BP2: float32, the reference's, likewise.
      lengths_BP2: the responses' tokens.
      weights_BP: float32, 0 where there is no pair: nothing at such a place matters, NaN included.
      kind: "sigmoid", "ipo" or "normalised".
      beta: how much the reference holds.
      label_smoothing: in [0, 0.5).

    Metrics: "accuracy" (equal log-ratios are half right); "margin", "chosen_reward" and "rejected_reward", where a
    reward is beta * log-ratio (of "normalised", over the length); "chosen_logprob", "rejected_logprob" and
    "chosen_length", "rejected_length" of a response; and "chosen_drift" and "rejected_drift", the mean log-ratio of a
    token, which are 0 where the policy is still the reference.
    """
    _check_dpo(logprobs_BP2, references_BP2, lengths_BP2, weights_BP, kind)
    is_pair_BP2 = (weights_BP > 0)[..., None]
    weights_BP = weights_BP.astype(jnp.float32)
    logprobs_BP2 = jnp.where(is_pair_BP2, logprobs_BP2.astype(jnp.float32), 0.0)
    lengths_BP2 = jnp.where(is_pair_BP2, lengths_BP2.astype(jnp.float32), 1.0)
    ratios_BP2 = logprobs_BP2 - jnp.where(is_pair_BP2, references_BP2, 0.0)
    compared_BP2 = ratios_BP2 / lengths_BP2 if kind == "normalised" else ratios_BP2
    gap_BP = compared_BP2[..., 0] - compared_BP2[..., 1]
    losses_BP = _dpo_of_gap(gap_BP, kind, beta)
    if label_smoothing:
        losses_BP = (1.0 - label_smoothing) * losses_BP + label_smoothing * _dpo_of_gap(-gap_BP, kind, beta)
    values = {"accuracy": jnp.heaviside(gap_BP, 0.5), "margin": beta * gap_BP}
    weight = jnp.sum(weights_BP)
    metrics = {}
    for i, side in enumerate(("chosen", "rejected")):
        values[f"{side}_reward"] = beta * compared_BP2[..., i]
        values[f"{side}_logprob"] = logprobs_BP2[..., i]
        values[f"{side}_length"] = lengths_BP2[..., i]
        tokens = jnp.sum(weights_BP * lengths_BP2[..., i])
        metrics[f"{side}_drift"] = WeightedSum(jnp.sum(weights_BP * ratios_BP2[..., i]), tokens)
    metrics |= {name: WeightedSum(jnp.sum(weights_BP * value_BP), weight) for name, value_BP in values.items()}
    return LossOutput(jnp.sum(weights_BP * losses_BP), weight, metrics)


def _dpo_of_gap(gap_BP: jax.Array, kind: str, beta: float) -> jax.Array:
    """The loss of each pair, whose log-ratios are so far apart."""
    if kind == "ipo":
        return jnp.square(gap_BP - 0.5 / beta)
    return jax.nn.softplus(-beta * gap_BP)


def _check_dpo(
    logprobs_BP2: jax.Array, references_BP2: jax.Array, lengths_BP2: jax.Array, weights_BP: jax.Array, kind: str
) -> None:
    require(kind in ("sigmoid", "ipo", "normalised"), f"DPO: there is no loss {kind!r}: sigmoid, ipo or normalised")
    logprobs, references, lengths = logprobs_BP2.shape, references_BP2.shape, lengths_BP2.shape
    require(
        logprobs == references == lengths == (*weights_BP.shape, 2),
        f"DPO: logprobs {logprobs}, references {references} and lengths {lengths} must be [batch, pairs, 2], weights "
        f"{weights_BP.shape} [batch, pairs]",
    )
