"""The critic of PPO: a model with a scalar head that is read at every token, as the value of what is still to come.

It begins as a reward model does: all of a trained model but for its logits, or a reward model, whose scalar already
speaks of responses. Either way its head begins at zero, so that its first values are 0 and not noise.

B rows, T tokens, D model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax import models
from llm_jax.alignment import reward
from llm_jax.config import ModelConfig
from llm_jax.errors import require
from llm_jax.interop.pretrained import Pretrained


def from_model(model: Pretrained, mesh: Mesh) -> Pretrained:
    """A critic that shares the arrays of a language model, or of a reward model, but for its head, which is zero."""
    with_head = reward.from_language_model(model, mesh, jax.random.key(0))
    head = jax.tree.map(jnp.zeros_like, with_head.params["reward_head"])
    return with_head._replace(params={**with_head.params, "reward_head": head})


def check_tokenizer(critic: Pretrained, policy: Pretrained) -> None:
    """Raise `UserError` unless the critic reads the policy's tokens as they are."""
    require(
        critic.tokenizer.fingerprint == policy.tokenizer.fingerprint,
        "the critic has another tokenizer than the policy, whose tokens it must value one by one: begin with the "
        "policy itself (CriticConfig.model='') or with a reward model that was trained from it",
    )


def values(params: Any, model: ModelConfig, batch: Any) -> jax.Array:
    """The value of the state in which each target of a `data.batch.Batch` is drawn, float32 [B,T].

    Read at the token before it: one position early. 0 where the target has no weight.
    """
    hidden_BTD = models.hidden_states(
        params, model, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    return jnp.where(batch.loss_weights > 0, models.rewards(params, model, hidden_BTD), 0.0)
