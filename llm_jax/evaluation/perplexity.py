"""Held-out likelihood: nats, perplexity and bits per byte."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax import models
from llm_jax.config import LossConfig, ModelConfig
from llm_jax.data.batch import Batch
from llm_jax.losses.weighted import WeightedSum
from llm_jax.parallel import shares
from llm_jax.training.language_model import loss_function
from llm_jax.training.loop import place
from llm_jax.training.together import map_runs, vectorizes

LOGIT_ROWS = 1024  # tokens whose logits exist at once


class Heldout(NamedTuple):
    """Summed negative log-likelihood in nats, and how many tokens were predicted.

    Of several models at once, `nats` is an array [R], and so are the values computed from it.
    """

    nats: Any
    tokens: float

    @property
    def loss(self) -> Any:
        """Nats per token; NaN if nothing was predicted."""
        return self.nats / self.tokens if self.tokens else math.nan

    def bits_per_byte(self, num_bytes: float) -> Any:
        """Total nats as bits, over the bytes of the text they encode: comparable between tokenizers."""
        return self.nats / math.log(2) / num_bytes


@functools.lru_cache
def _compiled_score(config: ModelConfig, loss: LossConfig, together: bool) -> Callable[[Any, Batch], WeightedSum]:
    loss_fn = loss_function(config, LossConfig(chunk_size=loss.chunk_size))

    def score(params: Any, batch: Batch) -> WeightedSum:
        output = loss_fn(params, batch, None)  # type: ignore[arg-type]  # no dropout: the key is never used
        return WeightedSum(output.total, output.weight)

    def score_all(params: Any, batch: Batch) -> WeightedSum:
        total_R, weight_R = map_runs(lambda one: score(one, batch), vectorizes())(params)
        return WeightedSum(total_R, weight_R[0])

    return jax.jit(score_all if together else score)


def scorer(
    config: ModelConfig, loss: LossConfig, mesh: Mesh, together: bool = False
) -> Callable[[Any, Iterable[Batch]], Heldout]:
    """A function `(params, batches) -> Heldout`, compiled once; plain cross-entropy, no regularisers, no dropout.

    `batches` holds this process's rows of each batch, in numpy. With `together`, the parameters are those of several
    models on a leading axis: see `training/together.py`.
    """
    score = _compiled_score(config, loss, together)

    def run(params: Any, batches: Iterable[Batch]) -> Heldout:
        nats: Any = 0.0
        tokens = 0.0
        with jax.set_mesh(mesh):
            for batch in batches:
                total, weight = jax.device_get(shares.settled(score(params, place(batch, mesh))))
                nats, tokens = nats + total.astype(np.float64), tokens + float(weight)
        return Heldout(nats, tokens)

    return run


@functools.partial(jax.jit, static_argnames="config")
def token_nats(params: Any, config: ModelConfig, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The negative log-likelihood of each target, float32 [B, T]; every row is one text without padding."""
    hidden_BTD = models.hidden_states(params, config, tokens_BT)
    unembedding_VD = models.unembedding(params, config)

    def nats(token: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_D, target = token
        logits_V = jnp.einsum("d,vd->v", hidden_D, unembedding_VD, preferred_element_type=jnp.float32)
        return jax.nn.logsumexp(logits_V) - logits_V[target]

    rows = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
    return jax.lax.map(nats, rows, batch_size=LOGIT_ROWS).reshape(targets_BT.shape)
