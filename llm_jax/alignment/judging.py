"""What a policy writes, judged by referees: samples of held-out prompts, how far they are from the reference, scores.

P prompts, K samples of each, B responses, T tokens of a row.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from llm_jax.alignment import ppo_experience, rewards, rollout
from llm_jax.alignment.policy_config import RolloutConfig
from llm_jax.alignment.prompts import Prompt, stop_ids
from llm_jax.alignment.rewards import Reward
from llm_jax.evaluation import diversity
from llm_jax.files import write_lines
from llm_jax.interop.pretrained import Pretrained
from llm_jax.tokenization.chat import ChatTemplate
from llm_jax.training.loop import place

CHUNK = 16  # places of each row whose logits are there at once
KL, LOGPROB, LENGTH, ENDED, DISTINCT, SELF_BLEU = "kl", "logprob", "length", "ended", "distinct_2", "self_bleu"


class Verdict(NamedTuple):
    """A response, and what is said about it."""

    prompt: int  # its index
    text: str
    tokens: tuple[int, ...]  # its end token included
    ended: bool
    kl: float  # log p - log p of the reference, nats: its mean over samples is the KL divergence
    logprob: float  # the reference's, of a token in the mean
    scores: Mapping[str, float]  # of each referee


def judge(
    model: Pretrained,
    reference: Pretrained,
    prompts: Sequence[Prompt],
    referees: Mapping[str, Reward],
    settings: RolloutConfig,
    template: ChatTemplate | None,
    mesh: Mesh,
) -> list[Verdict]:
    """Draw responses to prompts, and have them judged: those to the first prompt, then those to the second, and so on.

    Args:
        model: the policy; its parameters stay.
        reference: the model that the policy is measured from.
        prompts: what is asked.
        referees: rewards by name.
        settings: how to draw `sampling.num_samples` responses of each prompt; so many `prompts` at once, always, and
            the last ones are filled up, so that one program serves all. Log-probabilities are those of the whole
            vocabulary at its temperature.
        template: how the model is talked to; None = prompts are the beginnings of texts.
        mesh: where both models are.

    Raises:
        UserError: a referee gave what is no reward, and what rollouts refuse.
    """
    found: list[Verdict] = []
    samples, size = settings.sampling.num_samples, settings.prompts
    with jax.set_mesh(mesh), rollout.generation_layout(model.params, model.config) as drawing:
        for first in track(range(0, len(prompts), size), "judging", console=Console(stderr=True)):
            batch = prompts[first : first + size]
            filled = [batch[i % len(batch)] for i in range(size)]
            rollouts = rollout.roll(
                drawing[1],
                drawing[0],
                filled,
                settings,
                stop_ids=stop_ids(model.tokenizer, template),
                streams=range(first, first + size),
            )
            said = rollout.responses(rollouts, filled, model.tokenizer, template)[: len(batch) * samples]
            own_BT, others_BT = (_logprobs(each, rollouts, settings, mesh) for each in (model, reference))
            asked = [filled[i].messages for i in rollouts.prompt_B[: len(said)]]
            scores = {name: rewards.score(referee, asked, said) for name, referee in referees.items()}
            for row, response in enumerate(said):
                found.append(
                    Verdict(
                        first + int(rollouts.prompt_B[row]),
                        response.text,
                        tuple(rollouts.response_tokens(row)),
                        response.ended,
                        float(own_BT[row].sum() - others_BT[row].sum()),
                        float(others_BT[row].sum() / rollouts.lengths_B[row]),
                        {name: float(values_B[row]) for name, values_B in scores.items()},
                    )
                )
    return found


def _logprobs(model: Pretrained, rollouts: rollout.Rollouts, settings: RolloutConfig, mesh: Mesh) -> np.ndarray:
    """What a model gives to the responses' tokens, float64 [B,T]; 0 elsewhere."""
    program = ppo_experience.logprobs_of(model.config, settings.sampling.temperature, CHUNK, 1)
    return np.asarray(program(model.params, place(rollouts.batch, mesh)).logprobs_BT, np.float64)


def columns(verdicts: Sequence[Verdict], compared: int = 0) -> dict[str, np.ndarray]:
    """Every number by its name, float64 [P,K]; "distinct_2" and "self_bleu", of the samples of a prompt, are [P].

    These two are of token ids and of the first `compared` samples, as they depend on how many there are; 0 = all.
    Self-BLEU is there where these are several.
    """
    groups: dict[int, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.prompt, []).append(verdict)
    rows = list(groups.values())

    def column(value: Any) -> np.ndarray:
        return np.array([[value(each) for each in row] for row in rows], np.float64)

    tokens = [[each.tokens for each in row[: compared or None]] for row in rows]
    found = {
        KL: column(lambda each: each.kl),
        LOGPROB: column(lambda each: each.logprob),
        LENGTH: column(lambda each: len(each.tokens)),
        ENDED: column(lambda each: each.ended),
        **{name: column(lambda each, name=name: each.scores[name]) for name in verdicts[0].scores},
        DISTINCT: np.array([ppo_experience.distinct(row, 2) for row in tokens]),
    }
    return found | ({SELF_BLEU: np.array([diversity.self_bleu(row) for row in tokens])} if len(tokens[0]) > 1 else {})


def write(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write them as JSON Lines that `read` gives back."""
    write_lines(path, (verdict._asdict() for verdict in verdicts))


def read(path: Path) -> list[Verdict]:
    """What `write` wrote."""
    with path.open(encoding="utf-8") as file:
        records = map(json.loads, file)
        return [Verdict(**{**record, "tokens": tuple(record["tokens"])}) for record in records]
