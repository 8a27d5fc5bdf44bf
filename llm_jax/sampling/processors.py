"""What is done to logits before a token is drawn, in Hugging Face's order: penalty, temperature, top-k, top-p.

Pure functions on float32 [B, V]; a token that may not be drawn gets -inf. B batch, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.config import SamplingConfig


class Processors(NamedTuple):
    """The processors that are on, each with its number as an array; None = off.

    A pytree, so that a compiled program serves any numbers and changes only with what is on.
    """

    repetition_penalty: jax.Array | None
    temperature: jax.Array | None  # None = greedy
    top_k: jax.Array | None
    top_p_rest: jax.Array | None  # 1 - p

    @classmethod
    def of(cls, sampling: SamplingConfig) -> "Processors":
        """Those that `sampling` turns on; at temperature 0 only the penalty, which can change the argmax."""
        greedy = sampling.temperature == 0
        return cls(
            jnp.float32(sampling.repetition_penalty) if sampling.repetition_penalty != 1 else None,
            None if greedy else jnp.float32(sampling.temperature),
            None if greedy or sampling.top_k == 0 else jnp.int32(sampling.top_k),
            None if greedy or sampling.top_p == 1 else jnp.float32(1 - sampling.top_p),  # rounded once, at the end
        )

    def names(self) -> list[str]:
        """What is on, for people."""
        return [name for name, value in self._asdict().items() if value is not None] or ["greedy"]


def process(logits_BV: jax.Array, seen_BV: jax.Array, processors: Processors) -> jax.Array:
    """Every processor that is on, in order."""
    if processors.repetition_penalty is not None:
        logits_BV = repetition_penalty(logits_BV, seen_BV, processors.repetition_penalty)
    if processors.temperature is not None:
        logits_BV = logits_BV / processors.temperature
    if processors.top_k is not None:
        logits_BV = top_k(logits_BV, processors.top_k)
    if processors.top_p_rest is not None:
        logits_BV = top_p(logits_BV, processors.top_p_rest)
    return logits_BV


def repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Divide the positive and multiply the other logits of tokens seen before (CTRL, Keskar et al. 2019, section 4.1).

    Args:
        logits_BV: float32.
        seen_BV: bool, which tokens the prompt and the continuation so far hold.
        penalty: above 1 discourages repetition.
    """
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def top_k(logits_BV: jax.Array, k: jax.Array | int) -> jax.Array:
    """Keep the k largest logits, and whatever ties with the smallest of them."""
    kept_BV = _largest(logits_BV, lambda kept_BV: jnp.sum(kept_BV, axis=-1) >= k)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def top_p(logits_BV: jax.Array, rest: jax.Array | float) -> jax.Array:
    """Keep the fewest most likely tokens whose probability reaches p, and at least one (Holtzman et al. 2020, eq. 2).

    As Hugging Face counts it: the least likely tokens go as long as what goes has at most probability `rest` = 1 - p,
    a float32. Of equally likely tokens at the border those of the lowest ids go, as many as that allows.
    """
    probabilities_BV = jax.nn.softmax(logits_BV, axis=-1)
    allowed = jnp.asarray(rest, jnp.float32)

    def removed(kept_BV: jax.Array) -> jax.Array:
        return jnp.sum(probabilities_BV, axis=-1, where=~kept_BV)

    kept_BV = _largest(logits_BV, lambda kept_BV: (removed(kept_BV) <= allowed) & jnp.any(kept_BV, axis=-1))
    border_B1 = jnp.min(logits_BV, axis=-1, where=kept_BV, initial=jnp.inf, keepdims=True)
    tied_BV = kept_BV & (logits_BV == border_B1)
    probability_B = jnp.max(probabilities_BV, axis=-1, where=tied_BV, initial=0.0)
    count_B = jnp.floor((allowed - removed(kept_BV)) / jnp.where(probability_B > 0, probability_B, jnp.inf))
    count_B = jnp.minimum(count_B, jnp.sum(kept_BV, axis=-1) - 1)

    def remove(kept_BV: jax.Array) -> jax.Array:
        return kept_BV & ~(tied_BV & (jnp.cumsum(tied_BV, axis=-1) <= count_B[:, None]))

    kept_BV = jax.lax.cond(jnp.any(count_B > 0), remove, lambda kept_BV: kept_BV, kept_BV)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _largest(logits_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Bool [B, V], the logits from the highest threshold up at which `enough` (bool [B] of bool [B, V]) holds.

    `enough` must never turn false as more is kept; where it is never true, everything is kept. The threshold's bits
    are found one by one, in 32 passes over the logits: for 125,696 of them, a sort on CPU takes fifty times as long.
    """
    ordered_BV = _ordered_bits(logits_BV)

    def set_bit(i: jax.Array, threshold_B: jax.Array) -> jax.Array:
        higher_B = threshold_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(ordered_BV >= higher_B[:, None]), higher_B, threshold_B)

    threshold_B = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(logits_BV.shape[0], jnp.uint32))
    return ordered_BV >= threshold_B[:, None]


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 numbers; both zeros are the same."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
