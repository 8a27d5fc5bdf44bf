"""Runs trained together take the steps that each takes alone, and none of them spoils another."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from llm_jax.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from llm_jax.data.batch import Batch
from llm_jax.evaluation import perplexity
from llm_jax.optim import schedules
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import language_model, state, step, together
from llm_jax.training.loop import place

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=24,
    max_length=8,
    norm_head=True,
    qkv_bias=True,
    dropout_rate=0.2,
    init_std=0.1,
)
LOSS = LossConfig(chunk_size=3, max_z_loss=1e-3)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, eps=1e-5)
STEPS = 5
SEEDS, RATES = (3, 4, 3), (1e-2, 1e-2, 3e-2)
SINGLE = {"rtol": 1e-5, "atol": 1e-6}


def batch_of(seed, step):
    generator = np.random.default_rng((seed, step))
    tokens = generator.integers(0, MODEL.vocab_size, (4, 9)).astype(np.int32)
    weights = generator.integers(0, 2, (4, 8)).astype(np.float32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (4, 8))
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, np.ones((4, 8), np.int32), positions)


def mesh():
    return mesh_lib.build(MeshConfig(), jax.devices()[:1])


def fresh(seed):
    return state.init_state(MODEL, state.optimizer(MODEL, OPTIMIZER), mesh(), jax.random.key(seed))


def schedule_of(rate):
    return schedules.learning_rate(dataclasses.replace(OPTIMIZER, learning_rate=rate), STEPS)


@functools.cache
def alone(seed, rate):
    """The metrics of every step and the last state, by the step function of a single run."""
    update = language_model.compiled_update(MODEL, LOSS, state.optimizer(MODEL, OPTIMIZER), 1)
    update = step.bind(update, step.seed_number(seed), schedule_of(rate))
    current, records = fresh(seed), []
    with jax.set_mesh(mesh()):
        for index in range(STEPS):
            current, metrics = update(current, place(batch_of(seed, index), mesh()))
            records.append(jax.device_get(metrics))
    return records, jax.device_get(current)


def side_by_side(vectorize):
    optimizer, schedules_R = state.optimizer(MODEL, OPTIMIZER), [schedule_of(rate) for rate in RATES]
    update = together.step_function(MODEL, LOSS, optimizer, SEEDS, schedules_R, vectorize=vectorize)
    batches = together.stacked_batches(SEEDS, lambda seed: (batch_of(seed, index) for index in itertools.count()))
    current, records = together.stack([fresh(seed) for seed in SEEDS]), []
    with jax.set_mesh(mesh()):
        for _ in range(STEPS):
            current, metrics = update(current, place(next(batches), mesh()))
            records.append(jax.device_get(metrics))
    return records, current


@pytest.mark.parametrize("vectorize", [False, True])
def test_every_run_is_the_run_it_would_be_alone(vectorize):
    records, states = side_by_side(vectorize)
    for run, (seed, rate) in enumerate(zip(SEEDS, RATES)):
        expected_records, expected = alone(seed, rate)
        for got, want in zip(records, expected_records, strict=True):
            for name in want:
                np.testing.assert_allclose(got[name][run], want[name], err_msg=name, **SINGLE)
        taken = jax.device_get(together.take(states, run))
        for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(taken), jax.tree.leaves(expected)):
            np.testing.assert_allclose(got, want, err_msg=jax.tree_util.keystr(path), rtol=1e-3, atol=2e-5)
    assert abs(records[-1]["loss"][0] - records[-1]["loss"][2]) > 1e-4  # the learning rate is each run's own


@pytest.mark.parametrize("vectorize", [False, True])
def test_one_run_that_diverges_leaves_the_others_bit_for_bit(vectorize):
    optimizer = state.optimizer(MODEL, OPTIMIZER)
    results = []
    for rate in (1e-2, 1e38):
        schedules_R = [schedule_of(1e-2), schedule_of(rate), schedule_of(1e-2)]
        update = together.step_function(MODEL, LOSS, optimizer, (3, 4, 5), schedules_R, vectorize=vectorize)
        current = together.stack([fresh(seed) for seed in (3, 4, 5)])
        batch = jax.tree.map(lambda *rows: np.stack(rows), *(batch_of(seed, 0) for seed in (3, 4, 5)))
        with jax.set_mesh(mesh()):
            for _ in range(3):
                current, metrics = update(current, place(batch, mesh()))
        results.append((float(metrics["loss"][0]), float(metrics["parameter_norm"][1])))
    assert results[0][0] == results[1][0]
    assert np.isfinite(results[0][1]) and not np.isfinite(results[1][1])


def test_the_score_of_several_models_is_that_of_each():
    plain = dataclasses.replace(MODEL, dropout_rate=0.0)
    params = [fresh(seed).params for seed in SEEDS]
    batches = [batch_of(9, index) for index in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
    scores = perplexity.scorer(plain, LOSS, mesh(), together=True)(stacked, batches)
    singles = [perplexity.scorer(plain, LOSS, mesh())(one, batches) for one in params]
    np.testing.assert_allclose(scores.nats, [single.nats for single in singles], rtol=1e-6)
    np.testing.assert_allclose(scores.loss, [single.loss for single in singles], rtol=1e-6)
    assert scores.tokens == singles[0].tokens == sum(batch.loss_weights.sum() for batch in batches)


def test_runs_of_one_seed_share_a_reading():
    opened = []

    def read(seed):
        opened.append(seed)
        return (batch_of(seed, index) for index in itertools.count())

    batches = together.stacked_batches((5, 7, 5), read)
    next(batches)
    second = next(batches)
    assert opened == [5, 7]
    for run, seed in enumerate((5, 7, 5)):
        np.testing.assert_array_equal(second.tokens[run], batch_of(seed, 1).tokens)


def test_runs_of_other_lengths_and_rates_do_not_compile_again():
    optimizer = state.optimizer(MODEL, OPTIMIZER)
    assert optimizer is state.optimizer(MODEL, dataclasses.replace(OPTIMIZER, learning_rate=1.0, warmup_steps=9))
    update = language_model.compiled_update(MODEL, LOSS, optimizer, 1)
    assert update is language_model.compiled_update(MODEL, LOSS, optimizer, 1)
    compiled = []
    with jax.set_mesh(mesh()):
        for seed, rate, steps in ((1, 1e-3, 10), (2, 1e-2, 30)):
            config = dataclasses.replace(OPTIMIZER, learning_rate=rate, warmup_steps=steps // 10)
            bound = step.bind(update, step.seed_number(seed), schedules.learning_rate(config, steps))
            bound(fresh(seed), place(batch_of(seed, 0), mesh()))
            compiled.append(update._cache_size())
    assert compiled[0] == compiled[1]
