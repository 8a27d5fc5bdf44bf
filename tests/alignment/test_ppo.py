"""PPO as a whole: what its first minibatch must show, that it learns what is paid for and nothing else, that a stop
changes nothing, and what is refused."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.alignment import ppo_experience, ppo_memory, ppo_run, ppo_state, ppo_update
from llm_jax.alignment.policy_config import (
    AdvantageConfig,
    CriticConfig,
    KlConfig,
    PretrainingConfig,
    RewardShapingConfig,
)
from llm_jax.alignment.rewards import Response
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.training import metrics
from llm_jax.training.loop import FINITE, DivergedError
from tests.alignment import ppo_runs

SETTINGS = ppo_runs.settings()


@pytest.fixture(scope="module")
def straight():
    """Four iterations in one go."""
    return ppo_runs.iterate(ppo_runs.start(SETTINGS), 4)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


def test_at_first_the_policy_is_the_reference_and_its_ratio_is_one(straight):
    first, *others = straight[1]
    assert first["kl_k1"] == first["kl_k2"] == first["kl_k3"] == first["kl"] == 0.0
    assert first["explained_variance"] == 0.0 and first["value"] == 0.0
    assert all(record["policy/first_ratio"] == 1.0 for record in straight[1])
    assert all(record["kl_k3"] > 0 for record in others)
    assert int(straight[0].iteration) == int(straight[0].prompts_drawn) == 4
    assert all(record["sampler_difference"] < 1e-5 for record in straight[1])


def test_fractions_of_rewards_survive(straight):
    scores = [record["score"] for record in straight[1]]
    assert all(0 < score < 0.2 for score in scores)  # integers would be 0 or 1
    assert 0 < straight[1][0]["critic/return_squared"] < 0.1


def test_a_letter_that_is_paid_for_is_written_more_often():
    run = ppo_runs.start(ppo_runs.settings(steps=60, learning_rate=1e-2))
    before = run.evaluate(run.first())[0]
    state, records = ppo_runs.iterate(run, 60)
    after, table = run.evaluate(state)
    assert after["score"] > before["score"] + 0.3
    assert records[-1]["explained_variance"] > 0.1
    assert len(table) == 2 * ppo_runs.QUESTIONS and table[0]["record"] == f"{4 * ppo_runs.QUESTIONS}"
    np.testing.assert_allclose(np.mean([sample["score"] for sample in table]), after["score"])


@pytest.mark.parametrize("kind", [pytest.param("grpo", marks=pytest.mark.slow), "rloo"])
def test_groups_are_enough_to_learn_from(kind):
    config = ppo_runs.settings(steps=40, learning_rate=1e-2, samples=4, advantage=AdvantageConfig(kind=kind))
    state, records = ppo_runs.iterate(ppo_runs.start(config), 40)
    assert state.critic is None and "explained_variance" not in records[0]
    assert records[-1]["score"] > records[0]["score"] + 0.2


def share_of_even(prompts, responses):
    """The share of every other letter: half of them, before anything is learned."""
    return np.array([even(each.text) for each in responses], np.float32)


def even(text):
    return np.mean([ord(letter) % 2 == 0 for letter in text]) if text else 0.5


def shuffled(seed):
    """Rewards that say nothing of their responses."""
    generator = np.random.default_rng(seed)
    return lambda prompts, responses: generator.permutation(share_of_even(prompts, responses))


@pytest.mark.slow
def test_shuffled_rewards_teach_nothing():
    """Within two standard errors over policies and seeds; rewards in order teach more than five of these."""

    def gain(seed, reward):
        run = ppo_runs.start(ppo_runs.settings(steps=30, learning_rate=1e-2, seed=seed), reward, key=seed)
        before = letters(run.evaluate(run.first())[1])
        return letters(run.evaluate(ppo_runs.iterate(run, 30)[0])[1]) - before

    def letters(table):
        return np.mean([even(each["response"]) for each in table])

    gains = [gain(seed, shuffled(seed)) for seed in range(12)]
    error = np.std(gains, ddof=1) / np.sqrt(len(gains))
    assert abs(np.mean(gains)) < 2 * error
    assert gain(0, share_of_even) > 5 * error


def test_a_large_price_holds_the_kl_near_zero():
    """Nats of a response, over the last iterations; whatever else is paid for is not learned then."""
    free, held = (
        ppo_runs.iterate(
            ppo_runs.start(ppo_runs.settings(steps=40, kl=KlConfig(coefficient=beta), learning_rate=1e-3)), 40
        )[1][-5:]
        for beta in (0.0, 30.0)
    )
    assert np.mean([record["kl"] for record in free]) > 10 and np.mean([record["score"] for record in free]) > 0.5
    assert np.mean([record["kl"] for record in held]) < 0.5 and np.mean([record["score"] for record in held]) < 0.1


def test_all_state_goes_through_its_checkpoint(straight, tmp_path):
    """Stopped after two of four iterations and continued from the folder: bit for bit as in one go."""
    config, mesh = SETTINGS, ppo_runs.mesh_of()
    stop_after(config, 2, tmp_path)
    assert ppo_run.train(config, ppo_runs.policy(mesh), ppo_runs.data(config), tmp_path, mesh)
    run = ppo_runs.start(config)
    with ppo_run.Checkpointer(tmp_path, config.training.checkpoint, ppo_runs.MODEL, 1) as checkpointer:
        assert checkpointer.latest_step() == 4
        kept = checkpointer.restore(ppo_state.as_train_state(run.abstract()), 4)
    assert_same(ppo_state.from_train_state(kept), straight[0])
    records = metrics.read(tmp_path, "train")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["score"] for record in records] == [record["score"] for record in straight[1]]
    assert [record["step"] for record in metrics.read(tmp_path, "heldout")] == [0, 2, 4]
    steps = [json.loads(line)["step"] for line in (tmp_path / ppo_run.SAMPLES).read_text().splitlines()]
    assert steps == sorted(steps) and len(steps) == 3 * 2 * config.samples


def stop_after(config, count, folder):
    """A run that is asked to stop while it scores the responses of an iteration."""
    calls = [0]

    def reward(prompts, responses):
        calls[0] += 1
        if calls[0] == count + 1:  # the first call is of held-out prompts
            signal.raise_signal(signal.SIGTERM)
        return ppo_runs.share_of_a(prompts, responses)

    mesh = ppo_runs.mesh_of()
    assert not ppo_run.train(config, ppo_runs.policy(mesh), ppo_runs.data(config, reward), folder, mesh)


def test_the_critic_learns_alone_at_first():
    config = ppo_runs.settings(critic=CriticConfig(warmup_iterations=2, optimizer=ppo_runs.constant(1e-2)))
    run = ppo_runs.start(config)
    before = jax.device_get(run.first().policy)
    warm, records = ppo_runs.iterate(run, 2)
    assert_same(warm.policy, before)
    assert int(warm.critic.step) == 2 * 4 and "policy/loss" not in records[0]
    assert int(ppo_runs.iterate(run, 1, warm)[0].policy.step) == 4


def test_the_estimate_of_memory_is_what_the_state_takes(straight):
    run = ppo_runs.start(SETTINGS)
    found = ppo_memory.sizes(SETTINGS, run.actors, (400, 600), run.mesh)
    state = straight[0]
    assert found["policy: parameters and optimiser"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.policy))
    assert found["critic: parameters and optimiser"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.critic))
    parameters = models.count_parameters(ppo_runs.MODEL)
    assert found["policy: gradients"] == found["reference"] == 4 * parameters
    assert found["rolling out: keys and values"] == 4 * 2 * 32 * 12 * 2 * 2 * 8  # float32, k and v, rows, T, L, heads
    assert found["reward models"] == 1000
    lines = ppo_memory.estimate(SETTINGS, run.actors, (400, 600), run.mesh).splitlines()
    assert len(lines) == len(found) + 2 and lines[-1].startswith("  together")
    away = ppo_runs.settings(offload=True)
    offloaded = ppo_runs.start(away)
    smaller = ppo_memory.sizes(away, offloaded.actors, (400, 600), run.mesh)
    assert sum(found.values()) - sum(smaller.values()) == 1000  # of two reward models and the reference, one at a time
    waiting = ppo_memory.waiting(away, offloaded.actors, (400, 600))
    assert waiting == {"in the host's memory: reward models": 1000, "in the host's memory: reference": 4 * parameters}
    lines = ppo_memory.estimate(away, offloaded.actors, (400, 600), run.mesh).splitlines()
    assert lines[-2].startswith("  in the host's memory: reward models")
    adapters = ppo_runs.start(ppo_runs.settings(lora=2))
    shared = ppo_memory.sizes(SETTINGS, adapters.actors, (), adapters.mesh)
    assert "reference" not in shared and shared["policy: frozen model under its adapters"] == 4 * parameters


def test_pretraining_data_counts_by_its_coefficient():
    """Rewards of zero and one coefficient: the update is that of the cross-entropy alone."""
    ids = np.random.default_rng(0).integers(1, ppo_runs.VOCABULARY, (8, 13)).astype(np.int32)
    ones = np.ones((8, 12), np.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, ones * np.arange(12, dtype=np.int32))
    drawn = []

    def batches(first):
        for number in range(first, 100):
            drawn.append(number)
            yield batch

    config = ppo_runs.settings(
        kl=KlConfig(coefficient=0.0), pretraining=PretrainingConfig(dataset="given", coefficient=0.5, batch_size=8)
    )
    run = ppo_runs.start(config, lambda prompts, responses: np.zeros(len(prompts), np.float32), pretraining=batches)
    state, records = ppo_runs.iterate(run, 2)
    assert drawn == list(range(8)) and int(state.pretraining_drawn) == 8
    assert records[1]["policy/pretraining_loss"] < records[0]["policy/pretraining_loss"]
    np.testing.assert_allclose(
        records[0]["policy/loss"] - records[0]["policy/policy_loss"],
        0.5 * records[0]["policy/pretraining_loss"],
        rtol=1e-5,
    )
    state = state._replace(pretraining_drawn=state.pretraining_drawn - 2)
    ppo_runs.iterate(run, 1, state)  # another state than the one that followed: read anew from where it is
    assert drawn[8:] == [8, *range(6, 10)]


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "parameter_norm"])
def test_an_update_that_is_not_finite_changes_nothing(name):
    def update(state, factor):
        return jax.tree.map(lambda x: x * factor, state), {n: factor if n == name else 1.0 for n in FINITE}

    state = {"params": np.ones(3), "moments": (np.full(2, 4.0), np.array(7))}
    for factor in (np.inf, np.nan):
        kept, report = ppo_update.finite_only(update)(state, factor)
        assert_same(kept, state)
        assert report["skipped"] == 1
    changed, report = ppo_update.finite_only(update)(state, 2.0)
    assert report["skipped"] == 0 and changed["moments"][1] == 14


def test_a_run_without_one_finite_update_ends():
    """A score of 1e30 is a finite reward whose square is not."""

    def huge(prompts, responses):
        return np.full(len(prompts), 1e30, np.float32)

    run = ppo_runs.start(ppo_runs.settings(advantage=AdvantageConfig(lam=1.0, whiten=False)), huge)
    with pytest.raises(DivergedError, match=r"no update of the (policy and the )?critic was finite in iteration 1"):
        ppo_runs.iterate(run, 1)


def test_a_policy_that_went_far_enough_waits_for_the_next_iteration():
    config = ppo_runs.settings(stop_kl=1e-9, learning_rate=1e-2)
    state, _ = ppo_runs.iterate(ppo_runs.start(config), 1)
    assert int(state.policy.step) == 2  # the second minibatch sees what the first one did
    assert int(state.critic.step) == 4


def test_a_scheduled_price_falls_and_running_moments_move():
    config = ppo_runs.settings(
        kl=KlConfig(kind="scheduled", coefficient=0.2, end=0.0, iterations=4),
        rewards=RewardShapingConfig(normalization="running_both"),
    )
    state, records = ppo_runs.iterate(ppo_runs.start(config), 3)
    np.testing.assert_allclose([record["kl_coefficient"] for record in records], [0.2, 0.15, 0.1], rtol=1e-6)
    assert int(state.moments.number) == 3 * 2 * ppo_runs.QUESTIONS
    np.testing.assert_allclose(state.moments.mean, np.mean([record["score"] for record in records]), rtol=1e-5)


SAID = [Response("A", True, 2), Response("B", False, 3)]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda p, r: np.array([0.5, np.nan], np.float32), "is nan, no finite float32"),
        (
            lambda p, r: np.array([0.5], np.float32),
            r"shape \(1,\) for 2 responses: it must return one number for each",
        ),
        (lambda p, r: np.array([0, 1]), "returned int64, in which fractions would be lost: return float32"),
        (lambda p, r: [True, False], "returned bool"),
        (lambda p, r: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda p, r: ["good", "bad"], "one number for each"),
    ],
)
def test_what_is_no_reward_is_refused(reward, message):
    with pytest.raises(UserError, match=message):
        ppo_experience.score(reward, [(), ()], SAID)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minibatch_size": 12}, "does not divide the 32 responses"),
        ({"samples": 1, "minibatch_size": 4, "advantage": AdvantageConfig(kind="grpo")}, "num_samples to 2 or more"),
        ({"critic": CriticConfig(warmup_iterations=9)}, "leaves nothing of the 4 iterations"),
        (
            {"critic": CriticConfig(warmup_iterations=1), "advantage": AdvantageConfig(kind="rloo")},
            "has no critic to warm up",
        ),
        ({"reference_weights": "int3"}, "is not one of float32"),
        ({"steps": 0}, "is the number of iterations"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ppo_runs.settings(**changes)


def test_dropout_is_refused():
    training = dataclasses.replace(SETTINGS.training, dropout_rate=0.1)
    with pytest.raises(UserError, match="dropout and NEFTune's noise must be 0"):
        dataclasses.replace(SETTINGS, training=training)
