"""What is done to logits before a token is drawn, in Hugging Face's order: penalty, temperature, top-k, top-p.

Pure functions on float32 [B, V]; a token that may not be drawn gets -inf. B batch, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.config import SamplingConfig


def process(logits_BV: jax.Array, seen_BV: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Every processor that `sampling` turns on; at temperature 0 only the penalty, which can change the argmax."""
    if sampling.repetition_penalty != 1:
        logits_BV = repetition_penalty(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k > 0:
        logits_BV = top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = top_p(logits_BV, sampling.top_p)
    return logits_BV


def repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Divide the positive and multiply the other logits of tokens seen before (CTRL, Keskar et al. 2019, section 4.1).

    Args:
        logits_BV: float32.
        seen_BV: bool, which tokens the prompt and the continuation so far hold.
        penalty: above 1 discourages repetition.
    """
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Keep the k largest logits, and whatever ties with the smallest of them."""
    return _keep_largest(logits_BV, lambda kept_BV: jnp.sum(kept_BV, axis=-1) >= k)


def top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Keep the fewest most likely tokens whose probability reaches p, and at least one (Holtzman et al. 2020, eq. 2).

    Tokens of equal probability are kept or removed together, so that nothing hangs on the order of the vocabulary.
    """
    probabilities_BV = jax.nn.softmax(logits_BV, axis=-1)
    return _keep_largest(logits_BV, lambda kept_BV: jnp.sum(probabilities_BV, axis=-1, where=kept_BV) >= p)


def _keep_largest(logits_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Keep the logits from the highest threshold up at which `enough` (bool [B] of bool [B, V]) holds.

    `enough` must never turn false as more is kept; where it is never true, everything is kept. The threshold's bits
    are found one by one, in 32 passes over the logits: for 125,696 of them, a sort on CPU takes fifty times as long.
    """
    ordered_BV = _ordered_bits(logits_BV)

    def set_bit(i: jax.Array, threshold_B: jax.Array) -> jax.Array:
        higher_B = threshold_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(ordered_BV >= higher_B[:, None]), higher_B, threshold_B)

    threshold_B = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(logits_BV.shape[0], jnp.uint32))
    return jnp.where(ordered_BV >= threshold_B[:, None], logits_BV, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 numbers; both zeros are the same."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
