"""muP: the same function at the base width, activations and the best learning rate that do not move with the width."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.interop import huggingface
from llm_jax.models import mup
from llm_jax.optim import schedules
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import state, together
from llm_jax.training.loop import place

BASE = 32
VOCABULARY, LENGTH = 64, 16
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)


def model(width, base=BASE, **changes):
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_layers=2,
        num_heads=width // 8,
        num_kv_heads=width // 8,
        head_dim=8,
        ffn_size=2 * width,
        max_length=LENGTH,
        init_std=0.15,  # about 1 / sqrt(BASE)
        mup_base_width=base,
    )
    return dataclasses.replace(config, **changes)


HEADS = {"head": {}, "tied": {"tie_embeddings": True}, "norm_head": {"norm_head": True}}
heads = pytest.mark.parametrize("changes", HEADS.values(), ids=list(HEADS))


def names_and_leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@heads
def test_at_the_base_width_nothing_changes(changes):
    scaled, standard = model(BASE, **changes), model(BASE, base=0, **changes)
    params = models.init(scaled, jax.random.key(0))
    expected = models.init(standard, jax.random.key(0))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, expected)))
    np.testing.assert_array_equal(models.logits(params, scaled, TOKENS), models.logits(params, standard, TOKENS))
    assert set(jax.tree.leaves(models.rate_multipliers(scaled))) == {1.0}
    assert models.rate_multipliers(standard) is None


def test_the_table_of_the_paper():
    """Table 8 at four times the base: matrices start at half the deviation and learn at a quarter of the rate."""
    config = model(4 * BASE, qkv_bias=True)
    params = names_and_leaves(models.init(config, jax.random.key(0)))
    standard = names_and_leaves(models.init(dataclasses.replace(config, mup_base_width=0), jax.random.key(0)))
    rates = names_and_leaves(models.rate_multipliers(config))
    assert rates.keys() == params.keys()
    for name, leaf in params.items():
        matrix = name.startswith("layers/") and name.endswith("/kernel")
        assert rates[name] == (0.25 if matrix else 1.0), name
        np.testing.assert_allclose(leaf, standard[name] * (0.5 if matrix else 1.0), rtol=1e-6, err_msg=name)
    assert mup.output_multiplier(config) == 0.25
    assert mup.output_multiplier(dataclasses.replace(config, norm_head=True)) == 0.5


def test_a_matrix_learns_at_its_own_rate_and_decays_as_before():
    config, rate = model(4 * BASE), 1e-2
    optimizer = state.optimizer(config, OptimizerConfig(weight_decay=0.3, clip_norm=0.0, eps=1e-12))
    schedule = schedules.learning_rate(OptimizerConfig(learning_rate=rate, schedule="constant", warmup_steps=0), 1)
    params = models.init(config, jax.random.key(0))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params, schedule=schedule)
    kernel, embedding = params["layers"]["ffn"]["up"]["kernel"], params["embedding"]["embedding"]
    # The first step of Adam is 1 in the direction of the gradient.
    np.testing.assert_allclose(updates["layers"]["ffn"]["up"]["kernel"], -rate * (0.25 + 0.3 * kernel), rtol=1e-4)
    np.testing.assert_allclose(updates["embedding"]["embedding"], -rate * (1 + 0.3 * embedding), rtol=1e-4)


@heads
def test_folding_the_multiplier_into_the_last_norm_keeps_the_function(changes, tmp_path):
    config = model(3 * BASE, **changes)
    params = models.init(config, jax.random.key(1))
    want = models.logits(params, config, TOKENS)
    plain, folded = models.without_mup(params, config)
    assert plain.mup_base_width == 0
    np.testing.assert_allclose(models.logits(folded, plain, TOKENS), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        models.logits(*models.for_decoding(params, config)[::-1], TOKENS), want, rtol=1e-4, atol=1e-5
    )
    if not config.norm_head:
        huggingface.save(tmp_path / "out", config, params)
        loaded, weights = huggingface.load(tmp_path / "out")
        np.testing.assert_allclose(models.logits(weights, loaded, TOKENS), want, rtol=1e-5, atol=1e-6)


def test_it_is_part_of_what_a_checkpoint_means():
    assert model(64).architecture() != model(64, base=0).architecture()
    with pytest.raises(UserError, match="mup_base_width=-1 must not be negative"):
        model(64, base=-1)


def task(index, rows=16):
    """Each token follows from the two before it, by a fixed random rule, or is drawn at random one time in eight."""
    generator = np.random.default_rng(index)
    rule = np.random.default_rng(99).integers(0, VOCABULARY, (8, 8))
    tokens = generator.integers(0, VOCABULARY, (rows, LENGTH + 1))
    for t in range(2, LENGTH + 1):
        followed = rule[tokens[:, t - 1] % 8, tokens[:, t - 2] % 8]
        tokens[:, t] = np.where(generator.random(rows) < 0.125, tokens[:, t], followed)
    tokens = tokens.astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH))
    ones = np.ones((rows, LENGTH), np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)


def train(config, rates, steps):
    """The runs' states after a few steps at each learning rate, and their losses [steps, rates]."""
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:1])
    settings = OptimizerConfig(schedule="linear", warmup_steps=2, weight_decay=0.0, eps=1e-12)
    optimizer = state.optimizer(config, settings)
    plans = [schedules.learning_rate(dataclasses.replace(settings, learning_rate=rate), steps) for rate in rates]
    loss = LossConfig(chunk_size=LENGTH)
    update = together.step_function(config, loss, optimizer, [0] * len(rates), plans)
    current = together.stack([state.init_state(config, optimizer, mesh, jax.random.key(0))] * len(rates))
    losses = []
    with jax.set_mesh(mesh):
        for index in range(steps):
            batch = jax.tree.map(lambda x: np.stack([x] * len(rates)), task(index))
            current, metrics = update(current, place(batch, mesh))
            losses.append(jax.device_get(metrics["loss"]))
    return current, np.array(losses)


@functools.cache
def learned(width, base, head):
    """By how much a few steps raise the logits of the right tokens over the others, on average."""
    config, batch = model(width, base=base, **HEADS[head]), task(1000)

    def margin(params):
        logits_BTV = jax.jit(lambda params: models.logits(params, config, batch.tokens))(params)
        right_BT = jnp.take_along_axis(logits_BTV, batch.targets[..., None], -1)[..., 0]
        return float(jnp.mean(right_BT - jnp.mean(logits_BTV, -1)))

    states, _ = train(config, [2e-2], 5)
    return margin(together.take(states, 0).params) - margin(models.init(config, jax.random.key(0)))


@pytest.mark.parametrize(
    "head", ["head", pytest.param("tied", marks=pytest.mark.slow), pytest.param("norm_head", marks=pytest.mark.slow)]
)
def test_steps_teach_every_width_as_much(head):
    """The coordinate check of the paper (appendix D.1), of what a step does to the logits that it aims at."""
    narrow = learned(BASE, BASE, head)
    assert 0.7 < learned(8 * BASE, BASE, head) / narrow < 1.5
    assert learned(8 * BASE, 0, head) / narrow > 1.7


def best_rate(width, base):
    """The base-2 logarithm of the best learning rate, between the rates tried by a parabola, and its loss."""
    exponents = np.arange(-9, -3)
    losses = train(model(width, base=base), 2.0**exponents, 150)[1][-10:].mean(axis=0)
    best = int(np.clip(np.argmin(losses), 1, len(losses) - 2))
    before, at, after = losses[best - 1 : best + 2]
    return exponents[best] + 0.5 * (before - after) / (before - 2 * at + after), at


@pytest.mark.slow
def test_the_best_learning_rate_stays_put_across_widths():
    """From one width to one eight times as large: it stays with muP, and falls to about half without."""
    base_rate, base_loss = best_rate(BASE, BASE)
    rate, loss = best_rate(8 * BASE, BASE)
    standard_rate, standard_loss = best_rate(8 * BASE, 0)
    assert abs(rate - base_rate) < 0.75
    assert standard_rate < base_rate - 0.75
    assert loss < standard_loss - 0.05 and loss < base_loss
