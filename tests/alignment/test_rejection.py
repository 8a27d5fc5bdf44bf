"""Rejection sampling: what is chosen, kept over rounds and learned, against plain Python."""

import numpy as np
import pytest

from llm_jax.alignment import conversations, rejection, rollout
from llm_jax.alignment.policy_config import PromptDataConfig, RolloutConfig
from llm_jax.alignment.prompts import Prompt
from llm_jax.alignment.rejection import Drawn, Scored
from llm_jax.alignment.rejection_config import CurvesConfig, RejectionConfig
from llm_jax.config import SamplingConfig
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message
from tests.alignment import ppo_runs

PROMPTS = [Prompt((Message("user", name),), (number, 9), record=f"{name}:1") for number, name in enumerate("abc", 1)]


def scored(reward, *, ended=True, text="x"):
    return Scored(text, (5, 6), reward, ended)


def drawn(*rewards, **changes):
    rows = [[scored(each, text=f"{i}{each}", **changes) for i, each in enumerate(row)] for row in rewards]
    return Drawn(PROMPTS[: len(rows)], rows, np.array(rewards, np.float32))


def test_the_first_of_the_best_is_chosen():
    found = rejection.choose(drawn([0.0, 2.5, 2.5], [-1.0, -3.0, -2.0]), 4)
    assert [(each.prompt, each.response.text, each.round) for each in found] == [
        ((1, 9), "12.5", 4),
        ((2, 9), "0-1.0", 4),
    ]
    assert found[0].messages == PROMPTS[0].messages and found[0].record == "a:1"


def test_what_may_not_be_chosen_leaves_its_prompt_out():
    assert [each.prompt for each in rejection.choose(drawn([0.0, 0.4], [0.0, 1.0]), 1, minimum=0.5)] == [(2, 9)]
    mixed = Drawn(PROMPTS[:1], [[scored(3.0, ended=False), scored(1.0)]], np.ones((1, 2), np.float32))
    assert rejection.choose(mixed, 1)[0].response.reward == 1.0
    assert rejection.choose(mixed, 1, only_ended=False)[0].response.reward == 3.0
    assert rejection.choose(drawn([1.0], ended=False), 1) == []


def test_the_best_of_all_rounds_is_kept():
    first, second = rejection.choose(drawn([2.0], [1.0], [1.0]), 1), rejection.choose(drawn([1.0], [1.0]), 2)
    kept = {each.prompt: each.round for each in rejection.remember(first, second)}
    assert kept == {(1, 9): 1, (2, 9): 2, (3, 9): 1}  # better, as good but newer, not drawn again
    assert {each.round for each in rejection.remember([], second)} == {2}


def test_the_response_alone_is_learned():
    sample = rejection.sample(rejection.choose(drawn([1.0]), 1)[0])
    assert sample.tokens.tolist() == sample.labels.tolist() == [1, 9, 5, 6]
    assert sample.weights.tolist() == [0, 0, 1, 1]


def test_files_are_read_back_and_are_conversations(tmp_path):
    found = rejection.choose(drawn([0.5, 1.25], [2.0, 1.0]), 3)
    rejection.write(tmp_path / "chosen.jsonl", found)
    assert rejection.read(tmp_path / "chosen.jsonl") == found
    read, tally = conversations.read(tmp_path / "chosen.jsonl")
    assert [each.messages[-1] for each in read] == [Message("assistant", "11.25"), Message("assistant", "02.0")]
    assert not tally.counts


def test_draws_are_the_rollouts_and_their_rewards():
    mesh = ppo_runs.mesh_of()
    model, config = ppo_runs.policy(mesh), ppo_runs.settings(samples=3)
    data = ppo_runs.data(config)
    asked, streams = data.prompts.batch(0), data.prompts.streams(0)
    found = rejection.draw(model.params, model.config, asked, config.rollout, data, streams)
    rolled = rollout.roll(model.params, model.config, asked, config.rollout, stop_ids=(0,), streams=streams)
    assert found.rewards_PK.shape == (len(asked), 3) and found.rewards_PK.dtype == np.float32
    flat = [each for row in found.responses for each in row]
    assert [each.tokens for each in flat] == [tuple(rolled.response_tokens(row)) for row in range(len(flat))]
    assert [each.ended for each in flat] == rolled.ended_B.tolist()
    letters = [[token for token in each.tokens if token != 0] for each in flat]
    share = [said.count(1) / len(each.tokens) for said, each in zip(letters, flat)]  # of A, by its token
    np.testing.assert_allclose(found.rewards_PK.reshape(-1), share, rtol=1e-6)
    best = {chosen.prompt: chosen.response.reward for chosen in rejection.choose(found, 1, only_ended=False)}
    for prompt, row in zip(asked, found.rewards_PK):
        assert best[prompt.tokens] >= row.max() - 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds"),
        ({"memory": "some"}, "memory"),
        ({"temperatures": (1.0, 0.0)}, "must be different ones above 0"),
        ({"temperatures": (1.0, 1.0)}, "must be different ones above 0"),
        ({"prompts": PromptDataConfig(max_tokens=300)}, "make them equal"),
        ({"rollout": RolloutConfig(sampling=SamplingConfig(max_new_tokens=500))}, "raise it"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        RejectionConfig(**changes)


def test_curves_need_a_temperature():
    with pytest.raises(UserError, match="temperatures is empty"):
        CurvesConfig(temperatures=())


def test_samples_of_a_round():
    config = RejectionConfig(batches=3, rollout=RolloutConfig(prompts=5, sampling=SamplingConfig(num_samples=7)))
    assert config.samples == 105
