"""Rewards made of others: by hand-computed values, and by what a bad function may return."""

import numpy as np
import pytest

from llm_jax.alignment import rewards
from llm_jax.alignment.rewards import Response
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message

PROMPTS = [(Message("user", question),) for question in ("How?", "Why?", "How do I harm?", "")]
RESPONSES = [
    Response("so", True, 2),
    Response("because", False, 9),
    Response("no", True, 5),
    Response("", True, 1),
]


def constant(*values):
    def reward(prompts, responses):
        assert list(prompts) == PROMPTS and list(responses) == RESPONSES
        return np.array(values, np.float32)

    return reward


def check(reward, expected):
    found = rewards.score(reward, PROMPTS, RESPONSES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert reward(PROMPTS, RESPONSES).dtype == np.float32, "the bare call has the promised dtype, too"


def test_any_function_of_a_prompt_and_a_response():
    check(rewards.each(lambda prompt, response: len(prompt[0].content) - 2 * len(response.text)), [0, -10, 10, 0])


def test_safety_decides_below_the_threshold_or_for_a_tagged_prompt():
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    safety = constant(logit(0.14), logit(0.16), logit(0.9), 3)
    helpfulness = constant(7, 8, 9, 10)
    check(rewards.piecewise(safety, helpfulness), [logit(0.14), 8, 9, 10])
    tagged = {PROMPTS[2]}
    check(rewards.piecewise(safety, helpfulness, is_tagged=tagged.__contains__), [logit(0.14), 8, logit(0.9), 10])
    check(rewards.piecewise(safety, helpfulness, threshold=0.89), [logit(0.14), logit(0.16), 9, 10])


def test_weighted_sum():
    both = {"help": constant(1, 2, 3, 4), "safe": constant(0, 0, -1, 2)}
    check(rewards.weighted(both, {"help": 0.5, "safe": 2.0}), [0.5, 1, -0.5, 6])


def test_penalties():
    check(rewards.length_penalty(constant(0, 0, 0, 0), 0.5, free_tokens=4), [0, -2.5, -0.5, 0])
    check(rewards.missing_end_penalty(constant(1, 1, 1, 1), 3), [1, -2, 1, 1])


def test_centring_gives_mean_zero_on_the_reference_samples():
    reward = constant(1, 2, 3, 6)
    assert rewards.mean(reward, PROMPTS, RESPONSES) == 3
    centred = rewards.centred(reward, PROMPTS, RESPONSES)
    check(centred, [-2, -1, 0, 3])
    assert rewards.mean(centred, PROMPTS, RESPONSES) == 0


def test_combinations_combine():
    inner = rewards.missing_end_penalty(rewards.length_penalty(constant(4, 4, 4, 4), 1), 10)
    check(rewards.shifted(inner, 1), [3, -14, 0, 4])


def test_no_responses_no_rewards():
    assert rewards.score(rewards.each(lambda prompt, response: 1.0), [], []).shape == (0,)
    with pytest.raises(UserError, match="without reference samples"):
        rewards.centred(lambda prompts, responses: np.zeros(0), [], [])


def my_reward(prompt, response):
    return float("nan") if response.text == "no" else 1.0


@pytest.mark.parametrize(
    "reward, message",
    [
        (rewards.each(my_reward), r"reward 'my_reward' of response 3 of 4 is nan, .*'no'"),
        (constant(1, 2, np.inf, 4), "response 3 of 4 is inf"),
        (lambda p, r: [0.0, 1.0, 2.0, 1e39], "response 4 of 4 is 1e\\+39, no finite float32"),
        (constant(1, 2, 3), r"returned float32 of shape \(3,\) for 4 responses"),
        (lambda p, r: np.zeros((4, 1)), r"returned float64 of shape \(4, 1\) for 4"),
        (lambda p, r: ["a", "b", "c", "d"], "returned <U1"),
        (lambda p, r: [None, 1, 2, 3], "returned object"),
    ],
)
def test_what_is_no_reward_is_refused_in_one_line(reward, message):
    for combined in (
        reward,
        rewards.shifted(reward, 1.0),
        rewards.piecewise(reward, constant(1, 1, 1, 1)),
        rewards.weighted({"a": reward}, {"a": 1.0}),
    ):
        with pytest.raises(UserError, match=message) as error:
            rewards.score(combined, PROMPTS, RESPONSES)
        assert "\n" not in str(error.value)


def test_other_mistakes():
    with pytest.raises(UserError, match="4 prompts for 3 responses"):
        rewards.score(constant(1, 2, 3, 4), PROMPTS, RESPONSES[:3])
    with pytest.raises(UserError, match=r"threshold 1\.5 is a probability"):
        rewards.piecewise(constant(1), constant(1), threshold=1.5)
    with pytest.raises(UserError, match="no weight for safe"):
        rewards.weighted({"help": constant(1), "safe": constant(1)}, {"help": 1.0})
    with pytest.raises(UserError, match="'hlep'; did you mean 'help'"):
        rewards.weighted({"help": constant(1)}, {"hlep": 1.0})
