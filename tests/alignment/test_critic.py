"""The critic: where it begins, that it sees nothing of what is valued, and whose tokens it reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.alignment import critic, reward
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from tests.alignment import ppo_runs

LENGTH = 6
CRITIC = dataclasses.replace(ppo_runs.MODEL, output="reward")


def batch(tokens):
    ids = jnp.asarray(tokens, jnp.int32)[None]
    ones = jnp.ones_like(ids)
    return Batch(ids, jnp.roll(ids, -1, 1), ones.astype(jnp.float32), ones, jnp.arange(ids.shape[1])[None])


def test_it_begins_as_the_model_with_values_of_zero():
    mesh = ppo_runs.mesh_of()
    model = ppo_runs.policy(mesh)
    begun = critic.from_model(model, mesh)
    assert begun.config == CRITIC and "head" not in begun.params
    jax.tree.map(np.testing.assert_array_equal, begun.params["layers"], model.params["layers"])
    np.testing.assert_array_equal(critic.values(begun.params, CRITIC, batch(range(LENGTH))), np.zeros((1, LENGTH)))


def test_of_a_reward_model_only_the_head_is_new():
    mesh = ppo_runs.mesh_of()
    model = reward.from_language_model(ppo_runs.policy(mesh), mesh, jax.random.key(1))
    assert np.any(model.params["reward_head"]["kernel"])
    begun = critic.from_model(model, mesh)
    assert not np.any(begun.params["reward_head"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, begun.params["layers"], model.params["layers"])


def early(params, model, batch):
    """One token too early, as if a value were stored with the state after its token."""
    return jnp.roll(critic.values(params, model, batch), -1, axis=1)


@pytest.mark.parametrize(("values_of", "is_right"), [(critic.values, True), (early, False)])
def test_a_value_is_of_the_state_before_its_token(values_of, is_right):
    """Another token at place 3 is the target of place 2: values up to there are the same, those from 3 on are not."""
    params = models.init(CRITIC, jax.random.key(2))
    values = [values_of(params, CRITIC, batch(tokens))[0] for tokens in ([5, 6, 7, 8, 9, 2], [5, 6, 7, 3, 9, 2])]
    same = np.asarray(values[0] == values[1])
    assert (same.tolist() == [True] * 3 + [False] * 3) == is_right


def test_padding_has_no_value():
    params = models.init(CRITIC, jax.random.key(2))
    padded = batch([5, 6, 7, 0])._replace(loss_weights=jnp.array([[0.0, 1.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(critic.values(params, CRITIC, padded)[0] != 0, [False, True, False, False])


def test_another_tokenizer_is_refused():
    model = ppo_runs.policy(ppo_runs.mesh_of())
    other = ppo_runs.Letters()
    other.fingerprint = "others"
    critic.check_tokenizer(model, model)
    with pytest.raises(UserError, match="another tokenizer than the policy"):
        critic.check_tokenizer(model._replace(tokenizer=other), model)
