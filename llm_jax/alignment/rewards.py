"""Rewards of responses as plain functions, and functions that make one reward of others.

Whatever trains or chooses by rewards takes a `Reward`: a trained model's, any Python function, or a combination.

Legend: B responses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from scipy.special import expit

from llm_jax.config import unknown_key
from llm_jax.errors import UserError, require
from llm_jax.tokenization.chat import Message

SAFETY_THRESHOLD = 0.15  # LLaMA-2, section 3.2.3

Prompt = tuple[Message, ...]  # the messages that a response replies to; () = the response is a text on its own


class Response(NamedTuple):
    """What a model said."""

    text: str
    ended: bool = True  # False = it was cut off before its end token
    tokens: int = 0  # that were sampled, the end token included


class Reward(Protocol):
    """How good responses are: higher is better, and only differences matter."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        """The reward of each response to the prompt of the same index, float32 [B]."""
        ...


def score(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
    """Call a reward and check what it returns: float32 [B].

    Raises `UserError` where there are not as many prompts as responses, or the reward gives another number of values,
    values that are no numbers, NaN, or an infinity.
    """
    require(
        len(prompts) == len(responses), f"rewards: {len(prompts)} prompts for {len(responses)} responses: one for each"
    )
    name = getattr(reward, "__name__", type(reward).__name__)
    return _check(name, np.asarray(reward(prompts, responses)), responses)


def _check(name: str, values: np.ndarray, responses: Sequence[Response]) -> np.ndarray:
    """The values as float32 rewards of the responses; `UserError` where they cannot be."""
    require(
        values.shape == (len(responses),) and values.dtype.kind in "fiub",
        f"the reward {name!r} returned {values.dtype} of shape {values.shape} for {len(responses)} responses: it must "
        "return one number for each",
    )
    with np.errstate(over="ignore"):  # which the next line finds
        rewards_B = values.astype(np.float32)
    for bad in np.flatnonzero(~np.isfinite(rewards_B))[:1]:
        raise UserError(
            f"the reward {name!r} of response {bad + 1} of {len(responses)} is {values[bad]}, no finite float32: "
            f"{responses[bad].text[:40]!r}"
        )
    return rewards_B


def each(function: Callable[[Prompt, Response], float]) -> Reward:
    """The reward of any Python function of one prompt and one response, checked as in `score`."""
    name = getattr(function, "__name__", type(function).__name__)

    def of_each(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        values = [function(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        return _check(name, np.array(values), responses)

    return of_each


def weighted(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> Reward:
    """The sum of weight * reward over named rewards. Raises `UserError` unless each has exactly one weight."""
    for name in weights:
        if name not in rewards:
            message = unknown_key(name, list(rewards)).removeprefix("unknown config key ")
            raise UserError(f"weighted: a weight for a reward that is not there: {message}")
    missing = [name for name in rewards if name not in weights]
    require(bool(rewards) and not missing, f"weighted: no weight for {', '.join(missing) or 'any reward'}")

    def weighted_sum(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        values = {name: score(reward, prompts, responses) for name, reward in rewards.items()}
        return np.sum([np.float32(weights[name]) * values_B for name, values_B in values.items()], axis=0)

    return weighted_sum


def _never(prompt: Prompt) -> bool:
    return False


def piecewise(
    safety: Reward,
    helpfulness: Reward,
    *,
    threshold: float = SAFETY_THRESHOLD,
    is_tagged: Callable[[Prompt], bool] = _never,
) -> Reward:
    """The safety reward where it is low, or the prompt is tagged as one that may draw unsafe responses; else the other.

    LLaMA-2, section 3.2.3, compares the safety model's probability sigmoid(reward) with the threshold, and afterwards
    turns the chosen probability back into the reward by the logit: so what is chosen here are the rewards themselves.

    Args:
        safety: of a model whose sigmoid(reward) is the probability of a safe response.
        helpfulness: on the same scale.
        threshold: the probability below which safety decides.
        is_tagged: of a prompt; of a set of tagged prompts, it is `tagged.__contains__`.
    """
    require(0 < threshold < 1, f"piecewise: the threshold {threshold} is a probability: it must be in (0, 1)")

    def safety_or_helpfulness(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        safety_B = score(safety, prompts, responses)
        helpfulness_B = score(helpfulness, prompts, responses)
        tagged_B = np.fromiter(map(is_tagged, prompts), bool, len(prompts))
        return np.where(tagged_B | (expit(safety_B) < threshold), safety_B, helpfulness_B)

    return safety_or_helpfulness


def length_penalty(reward: Reward, per_token: float, *, free_tokens: int = 0) -> Reward:
    """The reward minus `per_token` for every token of a response after the first `free_tokens`."""

    def shorter(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        beyond_B = np.array([max(0, response.tokens - free_tokens) for response in responses], np.float32)
        return score(reward, prompts, responses) - np.float32(per_token) * beyond_B

    return shorter


def missing_end_penalty(reward: Reward, penalty: float) -> Reward:
    """The reward minus `penalty` where a response did not come to its end."""

    def ended(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        cut_B = np.array([not response.ended for response in responses], np.float32)
        return score(reward, prompts, responses) - np.float32(penalty) * cut_B

    return ended


def shifted(reward: Reward, by: float) -> Reward:
    """The reward plus a constant."""

    def shift(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        return score(reward, prompts, responses) + np.float32(by)

    return shift


def mean(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[Response]) -> float:
    """The mean reward of reference samples. Raises `UserError` where there are none."""
    require(len(responses) > 0, "rewards cannot be centred without reference samples")
    return float(np.mean(score(reward, prompts, responses), dtype=np.float64))


def centred(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Reward:
    """The reward minus its mean over reference samples, which then have mean 0: a ranking loss leaves it open."""
    return shifted(reward, -mean(reward, prompts, responses))
