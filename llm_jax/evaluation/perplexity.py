"""Held-out likelihood: nats, perplexity and bits per byte."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax import models
from llm_jax.config import LossConfig, ModelConfig
from llm_jax.data.batch import Batch
from llm_jax.losses.weighted import WeightedSum
from llm_jax.training.language_model import loss_function
from llm_jax.training.loop import place

LOGIT_ROWS = 1024  # tokens whose logits exist at once


class Heldout(NamedTuple):
    """Summed negative log-likelihood in nats, and how many tokens were predicted."""

    nats: float
    tokens: float

    @property
    def loss(self) -> float:
        """Nats per token; NaN if nothing was predicted."""
        return self.nats / self.tokens if self.tokens else math.nan

    def bits_per_byte(self, num_bytes: float) -> float:
        """Total nats as bits, over the bytes of the text they encode: comparable between tokenizers."""
        return self.nats / math.log(2) / num_bytes


def scorer(config: ModelConfig, loss: LossConfig, mesh: Mesh) -> Callable[[Any, Iterable[Batch]], Heldout]:
    """A function `(params, batches) -> Heldout`, compiled once; plain cross-entropy, no regularisers, no dropout.

    `batches` holds this process's rows of each batch, in numpy.
    """
    plain = LossConfig(chunk_size=loss.chunk_size)
    loss_fn = loss_function(config, plain)

    @jax.jit
    def score(params: Any, batch: Batch) -> WeightedSum:
        output = loss_fn(params, batch, None)  # type: ignore[arg-type]  # no dropout: the key is never used
        return WeightedSum(output.total, output.weight)

    def run(params: Any, batches: Iterable[Batch]) -> Heldout:
        total = Heldout(0.0, 0.0)
        with jax.set_mesh(mesh):
            for batch in batches:
                nats, tokens = jax.device_get(score(params, place(batch, mesh)))
                total = Heldout(total.nats + float(nats), total.tokens + float(tokens))
        return total

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
