"""The language-modelling loss: what pre-training and fine-tuning minimise, and the update that does."""

import functools
from typing import Any

import jax
import optax

from llm_jax import models
from llm_jax.config import LossConfig, ModelConfig
from llm_jax.losses.cross_entropy import chunked_cross_entropy
from llm_jax.losses.weighted import LossOutput
from llm_jax.training import step
from llm_jax.training.step import LossFunction, Update


def loss_function(model: ModelConfig, loss: LossConfig) -> LossFunction:
    """`loss_fn(params, batch, key)`: next-token cross-entropy of a `data.batch.Batch`.

    With dropout and NEFTune's noise, where they are configured and there is a key.
    """

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> LossOutput:
        hidden_BTD = models.hidden_states(
            params,
            model,
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            dropout_key=key if model.is_stochastic() else None,
        )
        with jax.named_scope("loss"):
            unembedding_VD = models.unembedding(params, model)
            return chunked_cross_entropy(hidden_BTD, unembedding_VD, batch.targets, batch.loss_weights, loss)

    return loss_fn


@functools.lru_cache
def compiled_update(
    model: ModelConfig, loss: LossConfig, optimizer: optax.GradientTransformationExtraArgs, microbatches: int
) -> Update:
    """The update of pre-training, jitted once in a process, with the state donated; see `step.update_function`."""
    return jax.jit(step.update_function(loss_function(model, loss), optimizer, microbatches), donate_argnums=0)
