"""Rejection sampling: many responses to a prompt, of which the best by reward is kept to learn from.

LLaMA-2, section 3.2.3: the best of K samples of the newest model, over prompts of all earlier rounds too, becomes the
new gold standard, on which the model is fine-tuned.

Shapes: P prompts, K samples of each.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_jax.alignment import ppo_experience, rollout
from llm_jax.alignment.policy_config import RolloutConfig
from llm_jax.alignment.ppo import Data
from llm_jax.alignment.prompts import Prompt, stop_ids
from llm_jax.alignment.sft import Sample
from llm_jax.config import ModelConfig
from llm_jax.files import read_lines, write_lines
from llm_jax.tokenization.chat import Message

Tokens = tuple[int, ...]


class Scored(NamedTuple):
    """A response to a prompt, and what it earned."""

    text: str
    tokens: Tokens  # the end token included
    reward: float
    ended: bool


class Drawn(NamedTuple):
    """Responses to prompts, and their rewards."""

    prompts: Sequence[Prompt]
    responses: Sequence[Sequence[Scored]]  # to each prompt
    rewards_PK: np.ndarray  # float32


class Chosen(NamedTuple):
    """The best response to a prompt."""

    messages: tuple[Message, ...]  # of the prompt
    prompt: Tokens
    response: Scored
    round: int
    record: str = ""  # where the prompt was read


def draw(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Prompt],
    settings: RolloutConfig,
    data: Data,
    streams: Sequence[int] | np.ndarray,
) -> Drawn:
    """K responses to every prompt, with their rewards.

    Args:
        params: the model's, as they are trained, or as `rollout.generation_layout` gives them for several calls.
        config: the model.
        prompts: what is asked.
        settings: how to draw; K is its `sampling.num_samples`.
        data: the reward, tokenizer and template.
        streams: a number for each prompt, with which its random numbers differ from others'.

    Raises:
        UserError: as `rollout.roll`, and `ppo_experience.score`.
    """
    ends = stop_ids(data.tokenizer, data.template)
    found = rollout.roll(params, config, prompts, settings, stop_ids=ends, streams=streams)
    said = rollout.responses(found, prompts, data.tokenizer, data.template)
    rewards_B = ppo_experience.score(data.reward, [prompts[i].messages for i in found.prompt_B], said)
    responses = [
        Scored(each.text, tuple(found.response_tokens(row)), float(rewards_B[row]), each.ended)
        for row, each in enumerate(said)
    ]
    samples = settings.sampling.num_samples
    rows = [responses[first : first + samples] for first in range(0, len(responses), samples)]
    return Drawn(prompts, rows, rewards_B.reshape(-1, samples))


def choose(drawn: Drawn, number: int, *, minimum: float = -math.inf, only_ended: bool = True) -> list[Chosen]:
    """The best response to each prompt that has one: the first of the highest reward.

    Args:
        drawn: all responses.
        number: the round's.
        minimum: the least reward of a response that may be chosen.
        only_ended: whether responses without an end token may not.
    """
    found = []
    for prompt, responses in zip(drawn.prompts, drawn.responses):
        allowed = [each for each in responses if each.reward >= minimum and (each.ended or not only_ended)]
        if allowed:
            best = max(allowed, key=lambda each: each.reward)
            found.append(Chosen(prompt.messages, prompt.tokens, best, number, prompt.record))
    return found


def remember(earlier: Iterable[Chosen], new: Iterable[Chosen]) -> list[Chosen]:
    """For every prompt of either, its best response; of two equally good ones the new one."""
    found = {chosen.prompt: chosen for chosen in earlier}
    for chosen in new:
        known = found.get(chosen.prompt)
        if known is None or chosen.response.reward >= known.response.reward:
            found[chosen.prompt] = chosen
    return list(found.values())


def sample(chosen: Chosen) -> Sample:
    """What supervised fine-tuning learns: the very tokens of the response."""
    tokens = np.array([*chosen.prompt, *chosen.response.tokens], np.int32)
    weights = np.zeros(len(tokens), np.float32)
    weights[len(chosen.prompt) :] = 1
    return Sample(tokens, tokens, weights)


def write(path: Path, found: Iterable[Chosen]) -> None:
    """Write them as JSON Lines that `read` gives back, and that fine-tuning another model reads as conversations."""
    write_lines(path, map(_record, found))


def _record(chosen: Chosen) -> dict[str, Any]:
    said = [*chosen.messages, Message("assistant", chosen.response.text)]
    return {
        "messages": [dataclasses.asdict(message) for message in said],
        "reward": chosen.response.reward,
        "round": chosen.round,
        "ended": chosen.response.ended,
        "record": chosen.record,
        "prompt_tokens": chosen.prompt,
        "response_tokens": chosen.response.tokens,
    }


def read(path: Path) -> list[Chosen]:
    """What `write` wrote."""
    return [_chosen(record) for record in read_lines(path)]


def _chosen(record: Mapping[str, Any]) -> Chosen:
    messages = [Message(**message) for message in record["messages"]]
    tokens = tuple(record["response_tokens"])
    response = Scored(messages[-1].content, tokens, record["reward"], record["ended"])
    return Chosen(tuple(messages[:-1]), tuple(record["prompt_tokens"]), response, record["round"], record["record"])
