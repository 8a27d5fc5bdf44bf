"""NEFTune's noise: how large, where, when, and that nothing else changes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import models
from llm_jax.config import LossConfig, MeshConfig, ModelConfig, TrainConfig
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.evaluation import perplexity
from llm_jax.models.decoder import neftune_noise
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import rules
from llm_jax.training import language_model

MODEL = ModelConfig(
    vocab_size=48, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, ffn_size=48, max_length=16
)
NOISY = dataclasses.replace(MODEL, neftune_alpha=5.0)
# Two rows of packed texts of 3, 9 and 1 tokens, and of 12; the rest of each row is padding.
SEGMENTS = np.array([[1] * 3 + [2] * 9 + [3] + [0] * 3, [1] * 12 + [0] * 4], np.int32)
POSITIONS = np.array([[*range(3), *range(9), 0, 0, 0, 0], [*range(12), 0, 0, 0, 0]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 16)).astype(np.int32)

hidden_states = jax.jit(models.hidden_states, static_argnums=1)


def parameters():
    return models.init(MODEL, jax.random.key(0))


def test_every_text_gets_noise_by_its_own_length_and_padding_gets_none():
    noise = np.asarray(neftune_noise((2, 16, 512), 5.0, POSITIONS, SEGMENTS, jax.random.key(0)))
    assert noise.dtype == np.float32
    for row, segment in [(0, 1), (0, 2), (0, 3), (1, 1)]:
        text = noise[row, SEGMENTS[row] == segment]
        bound = 5.0 / math.sqrt(len(text) * 512)
        assert 0.98 * bound < np.max(np.abs(text)) <= bound * (1 + 1e-6)
        np.testing.assert_allclose(np.std(text), bound / math.sqrt(3), rtol=0.08)  # of a uniform distribution
        assert abs(np.mean(text)) < 0.1 * bound
    np.testing.assert_array_equal(noise[SEGMENTS == 0], 0)


def test_a_row_without_segments_is_one_text():
    positions = np.arange(16, dtype=np.int32)[None].repeat(2, 0)
    noise = np.asarray(neftune_noise((2, 16, 64), 15.0, positions, None, jax.random.key(0)))
    bound = 15.0 / math.sqrt(16 * 64)
    assert 0.98 * bound < np.max(np.abs(noise)) <= bound * (1 + 1e-6)


def test_the_noise_is_added_to_what_the_embedding_gives():
    """Each token has a row of the table to itself here, so that noise on tokens is noise on the table."""
    params, key = parameters(), jax.random.key(3)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    noise = neftune_noise((2, 16, 32), 5.0, POSITIONS, SEGMENTS, jax.random.split(key, 3)[2])
    table = params["embedding"]["embedding"]
    moved = {**params, "embedding": {"embedding": table.at[:32].add(noise.reshape(32, 32))}}
    inputs = {"positions": POSITIONS, "segment_ids": SEGMENTS}
    got = hidden_states(params, NOISY, tokens, **inputs, dropout_key=key)
    np.testing.assert_allclose(got, hidden_states(moved, MODEL, tokens, **inputs), atol=1e-5)
    assert float(jnp.abs(got - hidden_states(params, MODEL, tokens, **inputs)).max()) > 0.1


def test_without_a_key_or_an_alpha_nothing_changes():
    params, key = parameters(), jax.random.key(3)
    want = hidden_states(params, MODEL, TOKENS)
    np.testing.assert_array_equal(hidden_states(params, NOISY, TOKENS), want)
    np.testing.assert_array_equal(hidden_states(params, MODEL, TOKENS, dropout_key=key), want)


def test_dropout_draws_the_same_with_noise_and_without():
    params, key = parameters(), jax.random.key(3)
    dropping = dataclasses.replace(MODEL, dropout_rate=0.5)
    want = hidden_states(params, dropping, TOKENS, dropout_key=key)
    faint = dataclasses.replace(dropping, neftune_alpha=1e-20)
    np.testing.assert_array_equal(hidden_states(params, faint, TOKENS, dropout_key=key), want)


def batch():
    weights = (SEGMENTS > 0).astype(np.float32).repeat(2, 0)
    rows = (array.repeat(2, 0) for array in (TOKENS, np.roll(TOKENS, -1, 1), SEGMENTS, POSITIONS))
    tokens, targets, segments, positions = rows
    return Batch(tokens, targets, weights, segments, positions)


def losses_of_two_steps(sizes, model=NOISY):
    """What a step's loss is at two steps of the same parameters: whatever differs is the noise."""
    mesh = mesh_lib.build(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    params = jax.device_put(parameters(), rules.shardings(models.logical_axes(MODEL), models.abstract(MODEL), mesh))
    loss_fn = language_model.loss_function(model, LossConfig())

    @jax.jit
    def loss(params, rows, step):
        output = loss_fn(params, rows, jax.random.fold_in(jax.random.key(0), step))
        return output.total / output.weight

    with jax.set_mesh(mesh):
        return [float(loss(params, batch(), step)) for step in range(2)]


def test_noise_depends_on_the_key_and_not_on_the_mesh():
    first, second = losses_of_two_steps((1, 1, 1))
    assert abs(first - second) > 1e-3
    np.testing.assert_allclose(losses_of_two_steps((1, 2, 4)), [first, second], rtol=2e-5)
    quiet = losses_of_two_steps((1, 1, 1), MODEL)
    assert quiet[0] == quiet[1]


def test_held_out_loss_has_no_noise():
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:1])
    params = jax.device_put(parameters(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    scores = [perplexity.scorer(model, LossConfig(), mesh)(params, [batch()]) for model in (MODEL, NOISY)]
    assert scores[0].loss == scores[1].loss


def test_it_is_no_part_of_the_architecture_and_configs_without_it_are_read(tmp_path):
    assert NOISY.architecture() == MODEL.architecture()
    config_lib.save(TrainConfig(), tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text()
    older = "".join(line for line in text.splitlines(keepends=True) if "neftune_alpha" not in line)
    assert older != text
    (tmp_path / "config.json").write_text(older)
    assert config_lib.load(TrainConfig, tmp_path / "config.json") == TrainConfig()
    with pytest.raises(UserError, match=r"ModelConfig.neftune_alpha=-1 must not be negative"):
        ModelConfig(neftune_alpha=-1)
