"""Reward models: the head that replaces the logits, rewards by hand, and the callable that all else takes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.alignment import reward, reward_batch
from llm_jax.alignment.config import RewardDataConfig, RewardLossConfig
from llm_jax.alignment.preferences import Pair
from llm_jax.alignment.reward import RewardModel
from llm_jax.alignment.reward_batch import ResponseEncoder
from llm_jax.alignment.rewards import Response
from llm_jax.config import MeshConfig
from llm_jax.errors import UserError
from llm_jax.interop import pretrained
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.tokenization.chat import Message
from llm_jax.training import checkpoint
from tests.alignment import base_models
from tests.alignment.base_models import MODEL

PROMPTS = [(), (Message("user", "one two"),), (Message("user", "three"),)]
RESPONSES = [Response("one two three three"), Response("two"), Response("three one")]


def mesh_of(count):
    return mesh_lib.build(MeshConfig(), jax.devices()[:count])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_models.make(tmp_path_factory.mktemp("base") / "model")


@functools.cache
def converted(base, devices=1):
    mesh = mesh_of(devices)
    return reward.from_language_model(pretrained.load(base, mesh=mesh), mesh, jax.random.key(1))


def callable_of(base, devices=1, **changes):
    model = converted(base, devices)
    encoder = ResponseEncoder(model.tokenizer)
    return RewardModel(model.config, model.params, encoder, mesh_of(devices), **changes)


def test_only_the_head_is_new(base):
    before, after = pretrained.load(base), converted(base)
    assert after.config == dataclasses.replace(MODEL, output="reward")
    assert set(after.params) == {*set(before.params) - {"head"}, "reward_head"}
    for name in set(before.params) - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, after.params[name], before.params[name])
    assert models.count_parameters(after.config) == sum(leaf.size for leaf in jax.tree.leaves(after.params))
    assert reward.from_language_model(after, mesh_of(1), jax.random.key(2)) is after


def test_the_new_head_gives_rewards_of_order_one():
    config = dataclasses.replace(MODEL, output="reward", hidden_size=4096, num_layers=1, num_heads=1, num_kv_heads=1)
    kernel = np.asarray(jax.jit(lambda key: models.init(config, key)["reward_head"]["kernel"])(jax.random.key(0)))
    assert abs(kernel.std() * 4097**0.5 - 1) < 0.05


def test_rewards_are_the_heads_product_at_the_last_token(base):
    """Each response alone, without padding or neighbours, through the hidden states and a product in numpy."""
    model = converted(base)
    head = jax.device_get(model.params["reward_head"])
    encoder = ResponseEncoder(model.tokenizer)
    expected = []
    for prompt, said in zip(PROMPTS, RESPONSES):
        ids = encoder(prompt, said.text)
        hidden = models.hidden_states(model.params, model.config, ids[None])
        expected.append(np.asarray(hidden)[0, -1] @ head["kernel"] + head["bias"])
    found = callable_of(base)(PROMPTS, RESPONSES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"sequence_length": 16}, {"batch_size": 3}])
def test_neighbours_order_and_rows_change_no_reward(base, changes):
    expected = callable_of(base)(PROMPTS, RESPONSES)
    np.testing.assert_allclose(callable_of(base, **changes)(PROMPTS[::-1], RESPONSES[::-1])[::-1], expected, atol=1e-5)


def test_eight_devices_are_as_one(base):
    expected = callable_of(base)(PROMPTS, RESPONSES)
    np.testing.assert_allclose(callable_of(base, devices=8)(PROMPTS, RESPONSES), expected, atol=1e-5)


def test_saved_settings_come_back(base, tmp_path):
    model = converted(base)
    folder = tmp_path / "run"
    checkpoint.save_model(folder, model.config, model.params)
    (folder / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="no finished reward model"):
        reward.load(folder, mesh_of(1))
    reward.save_settings(folder, "llama2", "last", 0.5)
    loaded = reward.load(folder, mesh_of(1))
    assert (loaded.encoder.template.name, loaded.encoder.pooling, loaded.offset) == ("llama2", "last", 0.5)
    uncentred = dataclasses.replace(loaded, offset=0.0)(PROMPTS, RESPONSES)
    np.testing.assert_allclose(loaded(PROMPTS, RESPONSES), uncentred - 0.5, atol=1e-6)
    (folder / reward.SETTINGS).write_text('{"template": "llama2"}')
    with pytest.raises(UserError, match="damaged"):
        reward.load(folder, mesh_of(1))


def test_a_language_model_is_no_reward_model(base, tmp_path):
    model = pretrained.load(base)
    with pytest.raises(UserError, match="train a reward model of it first"):
        models.rewards(model.params, model.config, np.zeros((1, 1, 16), np.float32))
    rewarding = converted(base)
    with pytest.raises(UserError, match="it has no logits"):
        models.logits(rewarding.params, rewarding.config, np.zeros((1, 2), np.int32))
    with pytest.raises(UserError, match="generates nothing"):
        models.for_decoding(rewarding.params, rewarding.config)


def test_the_loss_of_a_batch_is_that_of_its_pairs(base):
    """Packed rows with an absent pair, against the formula over rewards of the callable."""
    model = converted(base)
    encoder = ResponseEncoder(model.tokenizer)
    pairs = [Pair((), "one two", "three", 1), Pair((), "two", "one one one", 4), Pair((), "three two", "two two", 2)]
    encoded = [reward_batch.encode_pair(pair, encoder, 64) for pair in pairs]
    (batch,) = reward_batch.heldout_batches(encoded, RewardDataConfig(sequence_length=32, batch_size=3))
    config = RewardLossConfig(margin="large")
    output = jax.jit(reward.loss_function(model.config, config))(model.params, batch, jax.random.key(0))
    score = callable_of(base)
    chosen, rejected = score.score([e.chosen for e in encoded]), score.score([e.rejected for e in encoded])
    margins = np.array([0.0, 3.0, 1.0])
    expected = np.sum(np.log1p(np.exp(margins - (chosen - rejected))))
    assert output.weight == 3
    np.testing.assert_allclose(output.total, expected, rtol=1e-5)
