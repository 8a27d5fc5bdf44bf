"""How far a model's predictions are from those of another one on the same text.

D documents, T tokens, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Divergence(NamedTuple):
    """Means over a document's predicted tokens, or a column of such means: of a model and of what it should be."""

    nats: jax.Array | np.ndarray  # negative log-likelihood of the text under the model
    reference_nats: jax.Array | np.ndarray
    kl: jax.Array | np.ndarray  # of the model from the reference, in nats
    agreement: jax.Array | np.ndarray  # share of the tokens where both find the same one likeliest


@jax.jit
def divergence(logits_TV: jax.Array, reference_TV: jax.Array, targets_T: jax.Array) -> Divergence:
    """Compare float32 logits of the model and of the reference, both predicting `targets_T`."""
    logprobs_TV, expected_TV = jax.nn.log_softmax(logits_TV), jax.nn.log_softmax(reference_TV)
    kl_T = jnp.sum(jnp.exp(expected_TV) * (expected_TV - logprobs_TV), axis=-1)
    same_T = jnp.argmax(logits_TV, axis=-1) == jnp.argmax(reference_TV, axis=-1)
    nats_T, reference_nats_T = (
        -jnp.take_along_axis(values_TV, targets_T[:, None], axis=-1)[:, 0] for values_TV in (logprobs_TV, expected_TV)
    )
    return Divergence(*(jnp.mean(values_T) for values_T in (nats_T, reference_nats_T, kl_T, same_T)))
