"""The language-modelling loss, and the update that minimises it; the log-probabilities that a model gives to tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llm_jax import models
from llm_jax.config import LossConfig, ModelConfig
from llm_jax.losses.cross_entropy import chunked_cross_entropy
from llm_jax.losses.logprobs import TokenLogprobs, token_logprobs
from llm_jax.losses.weighted import LossOutput
from llm_jax.parallel import overlap
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


def logprobs_function(
    model: ModelConfig, *, temperature: float = 1.0, chunk_size: int = 256, entropies: bool = False
) -> Callable[[Any, Any], TokenLogprobs]:
    """`(params, batch) -> TokenLogprobs` of a `data.batch.Batch`'s targets: 0 where its `loss_weights` are 0.

    Never with dropout or noise: PPO's ratio compares the same model with itself. See `losses.logprobs.token_logprobs`.
    """

    def logprobs(params: Any, batch: Any) -> TokenLogprobs:
        hidden_BTD = models.hidden_states(
            params, model, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
        )
        with jax.named_scope("logprobs"):
            result = token_logprobs(
                hidden_BTD,
                models.unembedding(params, model),
                batch.targets,
                temperature=temperature,
                chunk_size=chunk_size,
                entropies=entropies,
            )
        counted_BT = batch.loss_weights > 0
        return jax.tree.map(lambda x_BT: jnp.where(counted_BT, x_BT, 0.0), result)

    return logprobs


@functools.lru_cache
def compiled_update(
    model: ModelConfig,
    loss: LossConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    microbatches: int,
    mesh: Mesh | None = None,
) -> Update:
    """The update of pre-training, jitted once in a process, with the state donated; see `step.update_function`.

    With the mesh that it will run on, it is compiled so that communication runs under compute there.
    """
    once = functools.partial(models.gather_once, config=model)
    update = step.update_function(loss_function(model, loss), optimizer, microbatches, once)
    options = overlap.compiler_options(mesh, model) if mesh else {}
    return jax.jit(update, donate_argnums=0, compiler_options=options or None)
