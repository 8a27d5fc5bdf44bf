"""What an iteration of PPO finds out about its responses before it learns from them: scores, KL, values, advantages.

B responses, T tokens of a row (prompt, response, padding), V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.alignment import controllers, rewards
from llm_jax.alignment import critic as critic_lib
from llm_jax.alignment.controllers import Moments
from llm_jax.alignment.policy_config import AdvantageConfig, RewardShapingConfig
from llm_jax.alignment.rewards import Prompt, Response, Reward
from llm_jax.config import ModelConfig
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError, require
from llm_jax.losses import policy as policy_losses
from llm_jax.losses.logprobs import TokenLogprobs
from llm_jax.training import language_model
from llm_jax.training.step import split_microbatches


class Shaping(NamedTuple):
    """What turns scores into advantages."""

    rewards: RewardShapingConfig
    advantage: AdvantageConfig
    responses: int  # to each prompt; they stand next to each other


class Judged(NamedTuple):
    """What three models say about every token of the responses, float32 [B,T]."""

    logprobs: jax.Array  # the policy's, before it learns
    entropies: jax.Array
    reference: jax.Array  # log-probabilities
    values: jax.Array  # 0 without a critic


class Learnable(NamedTuple):
    """What the updates need beside that, float32 [B,T], and the moments of the scores with these in them."""

    advantages: jax.Array
    returns: jax.Array  # 0 without a critic
    moments: Moments


def score(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
    """The rewards of responses, float32 [B], each to the prompt of the same index.

    Raises `UserError` for what `rewards.score` and `checked` refuse.
    """
    return rewards.score(checked(reward), prompts, responses)


def checked(reward: Reward) -> Reward:
    """The same, which raises `UserError` for integers, whose fractions are lost already, and for what it raises."""
    name = getattr(reward, "__name__", type(reward).__name__)

    def returned(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        try:
            values = np.asarray(reward(prompts, responses))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"the reward {name!r} raised {type(error).__name__}: {error}") from error
        require(
            values.dtype.kind not in "iub",
            f"the reward {name!r} returned {values.dtype}, in which fractions would be lost: return float32",
        )
        return values

    returned.__name__ = name
    return returned


def check_scale(config: RewardShapingConfig, scores_B: np.ndarray) -> None:
    """Raise `UserError` where the logit is asked for of scores that are no probabilities."""
    bad = scores_B[(scores_B < 0) | (scores_B > 1)] if config.logit else scores_B[:0]
    require(
        not len(bad),
        f"RewardShapingConfig.logit=True is of probabilities, and the reward returned {bad[:1].tolist()}: set it to "
        "False for rewards of reward models, which are logits already",
    )


def in_groups(function: Callable[[Any], Any], batch: Any, groups: int) -> Any:
    """`function` of a batch's rows, so many groups of them one after the other, so that it holds one group's arrays."""
    if groups == 1:
        return function(batch)
    results = jax.lax.map(function, split_microbatches(batch, groups))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)


@functools.lru_cache
def logprobs_of(
    model: ModelConfig, temperature: float, chunk_size: int, groups: int
) -> Callable[[Any, Batch], TokenLogprobs]:
    """`(params, batch) -> TokenLogprobs` with entropies, compiled once; the batch's rows go in `groups` groups.

    Policy and reference go through the same program, so that equal parameters have a KL of exactly 0.
    """
    function = language_model.logprobs_function(model, temperature=temperature, chunk_size=chunk_size, entropies=True)
    return jax.jit(lambda params, batch: in_groups(functools.partial(function, params), batch, groups))


@functools.lru_cache
def values_of(model: ModelConfig, groups: int) -> Callable[[Any, Batch], jax.Array]:
    """`(params, batch) -> values` [B,T] of a critic, compiled once, likewise."""

    def values(params: Any, batch: Batch) -> jax.Array:
        found: jax.Array = in_groups(lambda rows: critic_lib.values(params, model, rows), batch, groups)
        return found

    return jax.jit(values)


@functools.partial(jax.jit, static_argnums=0)
def learnable(
    shaping: Shaping,
    moments: Moments,
    beta: jax.Array,
    scores_B: jax.Array,
    ended_B: jax.Array,
    mask_BT: jax.Array,
    judged: Judged,
) -> tuple[Learnable, dict[str, jax.Array]]:
    """Advantages and returns of responses, with the numbers that describe them, float32 scalars.

    With a critic: -beta * k1 for every token, the shaped score at the last one, then GAE. With groups: the shaped score
    minus beta times the response's KL, compared with those of the other responses to the same prompt, is the advantage
    of each of its tokens (Ahmadian et al., 2024).
    """
    kind = shaping.advantage
    kl = policy_losses.kl_estimates(judged.logprobs, judged.reference)
    rewards_B, moments = controllers.shape_scores(shaping.rewards, moments, scores_B, ended_B)
    if kind.kind == "gae":
        rewards_BT = policy_losses.token_rewards(rewards_B, kl.k1, mask_BT, beta)
        advantages_BT, returns_BT = policy_losses.gae(rewards_BT, judged.values, mask_BT, kind.gamma, kind.lam)
    else:
        totals_B = rewards_B - beta * jnp.sum(kl.k1 * mask_BT, axis=1)
        groups_QG = totals_B.reshape(-1, shaping.responses)
        advantages_B = policy_losses.group_advantages(groups_QG, kind.kind).reshape(-1)
        advantages_BT, returns_BT = advantages_B[:, None] * mask_BT, jnp.zeros_like(mask_BT)
    metrics = {
        **describe(scores_B, mask_BT, judged),
        "reward": jnp.mean(rewards_B),
        "reward_std": jnp.std(rewards_B),
        "kl_coefficient": beta,
        "advantage": _mean(advantages_BT, mask_BT),
        "advantage_std": jnp.sqrt(_mean(advantages_BT**2, mask_BT) - _mean(advantages_BT, mask_BT) ** 2),
    }
    if kind.kind == "gae":
        errors_BT = returns_BT - judged.values
        metrics |= {
            "value": _mean(judged.values, mask_BT),
            "return": _mean(returns_BT, mask_BT),
            "explained_variance": policy_losses.explained_variance(
                *(_mean(x_BT, mask_BT) for x_BT in (returns_BT, returns_BT**2, errors_BT, errors_BT**2))
            ),
        }
        if kind.whiten:
            advantages_BT = policy_losses.whiten(advantages_BT, mask_BT)
    return Learnable(advantages_BT, returns_BT, moments), metrics


def describe(scores_B: jax.Array, mask_BT: jax.Array, judged: Judged) -> dict[str, jax.Array]:
    """What responses scored, and how far they are from the reference: "kl" is a response's k1, the rest a token's."""
    kl = policy_losses.kl_estimates(judged.logprobs, judged.reference)
    return {
        "score": jnp.mean(scores_B),
        "score_std": jnp.std(scores_B),
        "kl": jnp.sum(kl.k1 * mask_BT) / mask_BT.shape[0],
        "kl_k1": _mean(kl.k1, mask_BT),
        "kl_k2": _mean(kl.k2, mask_BT),
        "kl_k3": _mean(kl.k3, mask_BT),
        "entropy": _mean(judged.entropies, mask_BT),
    }


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """The share of different n-grams among all n-grams of the responses (Li et al., 2016); 0 where there are none."""
    found = [tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)]
    return len(set(found)) / len(found) if found else 0.0


def _mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Over the tokens of all responses."""
    return jnp.sum(x_BT * mask_BT) / jnp.maximum(jnp.sum(mask_BT), 1.0)
