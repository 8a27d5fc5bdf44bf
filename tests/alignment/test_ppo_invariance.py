"""What must not change what PPO learns: padding, devices, microbatches; and what may a little: a smaller reference."""

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax.alignment import ppo_experience, ppo_memory
from llm_jax.alignment.policy_config import PolicyLossConfig
from llm_jax.errors import UserError
from tests.alignment import ppo_runs

SETTINGS = ppo_runs.settings()


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


def assert_near(found, expected, tolerance=1e-4):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), jax.device_get(found), jax.device_get(expected)
    )


def wider(config, by):
    rollout = dataclasses.replace(config.rollout, max_prompt_tokens=config.rollout.max_prompt_tokens + by)
    return dataclasses.replace(config, rollout=rollout)


def test_padding_changes_nothing():
    """The same responses in rows that are longer by half; a loss that does not mask it would be noticed."""
    narrow, wide = (ppo_runs.iterate(ppo_runs.start(wider(SETTINGS, by)), 2) for by in (0, 6))
    assert_near(narrow[0].policy.params, wide[0].policy.params)
    assert_near(narrow[0].critic.params, wide[0].critic.params)
    for name in ("kl", "entropy", "advantage_std", "return", "policy/ratio", "critic/value_loss"):
        np.testing.assert_allclose(narrow[1][1][name], wide[1][1][name], rtol=1e-3, atol=1e-6)


def cold(config):
    sampling = dataclasses.replace(config.rollout.sampling, temperature=0.7)
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, sampling=sampling))


def test_the_temperature_is_in_all_logprobs(monkeypatch):
    first, second = ppo_runs.iterate(ppo_runs.start(cold(SETTINGS)), 2)[1]
    assert first["kl"] == 0 and first["policy/first_ratio"] == second["policy/first_ratio"] == 1
    logprobs_of = ppo_experience.logprobs_of
    monkeypatch.setattr(ppo_experience, "logprobs_of", lambda model, _, *rest: logprobs_of(model, 1.0, *rest))
    with pytest.raises(UserError, match=r"the trainer computes .* apart"):
        ppo_runs.iterate(ppo_runs.start(cold(SETTINGS)), 1)


def test_eight_devices_are_as_one():
    state, records = ppo_runs.iterate(ppo_runs.start(SETTINGS, devices=8), 1)
    one, expected = ppo_runs.iterate(ppo_runs.start(SETTINGS), 1)
    assert_near(records[0]["score"], expected[0]["score"], 1e-6)
    assert_near(state.policy.params, one.policy.params)
    assert_near(state.critic.params, one.critic.params)


def test_microbatches_are_as_one_batch():
    loss = PolicyLossConfig(per_sequence=True, kl_coefficient=0.1, entropy_coefficient=0.01)
    states = [
        ppo_runs.iterate(ppo_runs.start(ppo_runs.settings(microbatches=count, loss=loss)), 1)[0] for count in (1, 4)
    ]
    assert_near(states[0].policy.params, states[1].policy.params)
    assert_near(states[0].critic.params, states[1].critic.params)


def test_adapters_share_the_model_with_reference_and_critic():
    run = ppo_runs.start(ppo_runs.settings(lora=2, learning_rate=1e-2))
    base = run.actors.policy.frozen[0]
    assert run.actors.reference.params is base
    assert run.actors.critic.frozen[0]["layers"] is base["layers"]
    frozen = jax.device_get(base)
    state, records = ppo_runs.iterate(run, 3)
    assert records[0]["kl"] == 0.0 and records[2]["kl_k3"] > 0
    assert_same(base, frozen)
    assert set(state.critic.params) == {"layers", "reward_head"} and set(state.policy.params) == {"layers"}


@pytest.mark.parametrize(("weights", "most"), [("bfloat16", 1e-3), ("int8", 1e-2)])
def test_a_smaller_reference_is_near(weights, most):
    """Offloaded too: it comes back where it is computed with."""
    run = ppo_runs.start(ppo_runs.settings(reference_weights=weights, offload=True))
    leaves = jax.tree.leaves(run.actors.reference.params)
    assert {leaf.sharding.memory_kind for leaf in leaves} == {"pinned_host"}
    record = ppo_runs.iterate(run, 1)[1][0]
    assert 0 < record["kl_k3"] < most
    full = ppo_memory.tree_bytes(ppo_runs.start(SETTINGS).actors.reference.params)
    assert ppo_memory.tree_bytes(run.actors.reference.params) < 0.6 * full
