"""Reward models: a model whose logits a scalar has replaced, trained on preferences, and a callable ever after.

A run's folder says in reward.json how responses are put before the model, and by what their rewards are centred.

B rows, T tokens, P pairs of a row, D model, R responses of a row.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax import models
from llm_jax.alignment.config import RewardLossConfig
from llm_jax.alignment.reward_batch import ResponseEncoder, response_batches
from llm_jax.alignment.rewards import Prompt, Response
from llm_jax.config import ModelConfig
from llm_jax.errors import UserError, require
from llm_jax.files import replacing
from llm_jax.interop import pretrained
from llm_jax.interop.pretrained import Pretrained
from llm_jax.losses.preference import reward_loss
from llm_jax.losses.weighted import LossOutput
from llm_jax.parallel import offload, rules, shares
from llm_jax.tokenization import chat
from llm_jax.training import checkpoint
from llm_jax.training.loop import place
from llm_jax.training.step import LossFunction

SETTINGS = "reward.json"


def from_language_model(model: Pretrained, mesh: Mesh, key: jax.Array) -> Pretrained:
    """The same model with a new scalar head in place of its logits, on the mesh; a reward model comes back as it is.

    Nothing else changes: what a chat model knows is where its reward model begins (LLaMA-2, section 3.2.2).
    """
    if model.config.output == "reward":
        return model
    config = dataclasses.replace(model.config, output="reward", norm_head=False)
    layout = jax.tree.map(lambda leaf: leaf.sharding, checkpoint.placed(config, mesh)["reward_head"])
    with jax.set_mesh(mesh):
        head = jax.jit(lambda key: models.init(config, key)["reward_head"], out_shardings=layout)(key)
    kept = {name: part for name, part in model.params.items() if name != "head"}
    return model._replace(config=config, params={**kept, "reward_head": head})


def loss_function(model: ModelConfig, config: RewardLossConfig) -> LossFunction:
    """`loss_fn(params, batch, key)` of a `RewardBatch`; see `losses.preference.reward_loss`."""

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> LossOutput:
        return reward_loss(
            rewards(params, model, batch, key if model.is_stochastic() else None),
            batch.strengths,
            batch.weights,
            batch.safety_labels,
            batch.safety_weights,
            margins=config.margins,
            safety_coefficient=config.safety_coefficient,
        )

    return loss_fn


def rewards(params: Any, model: ModelConfig, batch: Any, dropout_key: jax.Array | None = None) -> jax.Array:
    """The rewards of a `RewardBatch`'s responses, float32 [B, P, 2]; those of absent pairs mean nothing."""
    B, P, _ = batch.ends.shape
    return _rewards_at(params, model, batch, batch.ends.reshape(B, 2 * P), dropout_key).reshape(B, P, 2)


def _rewards_at(
    params: Any, model: ModelConfig, batch: Any, ends_BR: jax.Array, dropout_key: jax.Array | None = None
) -> jax.Array:
    """The rewards at some tokens of each row, float32 [B, R]."""
    hidden_BTD = models.hidden_states(
        params,
        model,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        dropout_key=dropout_key,
    )
    scored_BRD = jnp.take_along_axis(hidden_BTD, ends_BR[..., None], axis=1)
    return models.rewards(params, model, scored_BRD)


@functools.partial(jax.jit, static_argnums=1)
def _score(params: Any, model: ModelConfig, batch: Any) -> jax.Array:
    return _rewards_at(params, model, batch, batch.ends)


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A trained reward model as a function of prompts and responses: a `rewards.Reward`.

    In a job of several processes all of them call it together, each with prompts and responses of its own.
    """

    config: ModelConfig
    params: Any  # to be fetched before they are used; see `parallel.offload`
    encoder: ResponseEncoder
    mesh: Mesh
    offset: float = 0.0  # is subtracted: the mean over reference samples
    sequence_length: int = 0  # of a row of responses; 0 = the model's
    batch_size: int = 8  # rows scored at once, rounded up to what the mesh divides

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        """The centred reward of each response to the prompt of the same index, float32 [B].

        Raises `UserError` where one does not fit into a row, or the chat template refuses it.
        """
        own = [self.encoder(prompt, said.text) for prompt, said in zip(prompts, responses, strict=True)]
        parts = shares.gather([sequence.tolist() for sequence in own])
        rewards_B = self.score([np.array(sequence, np.int32) for part in parts for sequence in part])
        first = sum(len(part) for part in parts[: jax.process_index()])
        return rewards_B[first : first + len(own)]

    def score(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """The centred reward of each encoded response, float32 [B]; see `ResponseEncoder`.

        All processes of a job give the same responses.
        """
        parts = rules.axis_size(self.mesh, "batch")
        rows = -(-self.batch_size // parts) * parts
        rewards_B, params = np.zeros(len(sequences), np.float32), offload.fetch(self.params)
        with jax.set_mesh(self.mesh):
            for batch in response_batches(sequences, self.sequence_length or self.config.max_length, rows):
                own = place(shares.own_rows(batch, self.mesh), self.mesh)
                scored_BR = shares.all_rows(_score(params, self.config, own))
                known = batch.places >= 0
                rewards_B[batch.places[known]] = scored_BR[known]
        return rewards_B - np.float32(self.offset)


def save_settings(workdir: Path, template: str, pooling: str, offset: float) -> None:
    """Write reward.json: a chat template's name ("none" = plain texts), which token is scored, and the offset."""
    with replacing(workdir / SETTINGS) as partial:
        partial.write_text(json.dumps({"template": template, "pooling": pooling, "offset": offset}) + "\n")


def load(path: Path, mesh: Mesh) -> RewardModel:
    """A reward model from the folder of the run that trained it. Raises `UserError` where it is none."""
    settings = path / SETTINGS
    require(
        settings.is_file(),
        f"{path} holds no finished reward model: experiments.reward_model writes {SETTINGS} at its end",
    )
    model = pretrained.load(path, mesh=mesh)
    require(model.config.output == "reward", f"{path} holds a language model, no reward model")
    try:
        values = json.loads(settings.read_text())
        name, pooling, offset = str(values["template"]), str(values["pooling"]), float(values["offset"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{settings} is damaged ({error}): train the model's last step again") from None
    template = None if name == "none" else chat.choose(name, model.tokenizer, model.chat_template)
    return RewardModel(model.config, model.params, ResponseEncoder(model.tokenizer, template, pooling), mesh, offset)
