"""The reward loss against its formula in float64, and what must not matter to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.alignment.config import RewardLossConfig
from llm_jax.errors import UserError
from llm_jax.losses.preference import margin, reward_loss

B, P = 3, 4


def inputs(seed=0):
    """Random rewards (some large), strengths 1..4, weights (some 0), safety labels and their weights (some 0)."""
    draw = np.random.default_rng(seed)
    rewards = draw.normal(size=(B, P, 2)).astype(np.float32) * np.array([0.3, 1, 5, 30], np.float32)[:, None]
    strengths = draw.integers(1, 5, (B, P)).astype(np.int32)
    weights = draw.choice([0.0, 0.5, 1.0], (B, P)).astype(np.float32)
    labels = draw.integers(0, 2, (B, P, 2)).astype(np.float32)
    return rewards, strengths, weights, labels, draw.integers(0, 2, (B, P, 2)).astype(np.float32)


def oracle(rewards, strengths, weights, labels, label_weights, margins, coefficient):
    """The total and its gradient for the rewards, a pair at a time."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    total, gradient = 0.0, np.zeros(rewards.shape)
    for b, p in np.ndindex(B, P):
        chosen, rejected = rewards[b, p].astype(np.float64)
        x = chosen - rejected - margins[strengths[b, p] - 1]
        total += weights[b, p] * np.logaddexp(0, -x)
        gradient[b, p] += weights[b, p] * (sigmoid(x) - 1) * np.array([1, -1])
        for i, reward in enumerate((chosen, rejected)):
            unsafe, share = labels[b, p, i], 0.5 * coefficient * weights[b, p] * label_weights[b, p, i]
            total += share * (unsafe * np.logaddexp(0, reward) + (1 - unsafe) * np.logaddexp(0, -reward))
            gradient[b, p, i] += share * (unsafe - sigmoid(-reward))
    return total, gradient


def run(*arrays, margins, coefficient=0.0):
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(rewards, *rest):
        output = reward_loss(rewards, *rest, margins=margins, safety_coefficient=coefficient)
        return output.total, output

    (_, output), gradient = jax.jit(total)(*arrays)
    return output, np.asarray(gradient)


@pytest.mark.parametrize("coefficient", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["none", "small", "large"])
def test_total_and_gradient_agree_with_the_formula(kind, coefficient):
    margins = RewardLossConfig(margin=kind, safety_coefficient=coefficient).margins
    arrays = inputs()
    output, gradient = run(*arrays, margins=margins, coefficient=coefficient)
    total, expected = oracle(*arrays, margins, coefficient)
    np.testing.assert_allclose(output.total, total, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    assert float(output.weight) == arrays[2].sum()
    assert ("safety_loss" in output.metrics) == ("safety_accuracy" in output.metrics) == (coefficient > 0)


def test_margins_are_those_of_the_report():
    """LLaMA-2, table 27, from "negligibly better or unsure" to "significantly better"."""
    assert RewardLossConfig(margin="small").margins == (0, 1 / 3, 2 / 3, 1)
    assert RewardLossConfig(margin="large").margins == (0, 1, 2, 3)
    assert set(RewardLossConfig(margin="none").margins) == {0}
    found = margin(jnp.array([1, 2, 3, 4]), RewardLossConfig(margin="small").margins)
    np.testing.assert_array_equal(found, np.array([0, 1 / 3, 2 / 3, 1], np.float32))


@pytest.mark.parametrize("strength", [0, -1, 5])
def test_a_strength_outside_the_scale_is_seen(strength):
    """The loop stops at such a loss, where an index that is clipped or wraps around would go unnoticed."""
    rewards, strengths, weights, *labels = inputs()
    strengths[0, 0], weights[0, 0] = strength, 1.0
    output, _ = run(rewards, strengths, weights, *labels, margins=RewardLossConfig(margin="large").margins)
    assert np.isnan(output.total)


def test_metrics():
    rewards = np.array([[[2, 1], [0, 3], [1, 1], [9, 9]]], np.float32)
    strengths, weights = np.array([[4, 1, 2, 0]]), np.array([[1, 1, 1, 0]], np.float32)
    labels = np.array([[[0, 0], [1, 1], [0, 1], [1, 1]]], np.float32)
    label_weights = np.array([[[1, 1], [1, 0], [0, 0], [1, 1]]], np.float32)
    margins = RewardLossConfig(margin="large").margins
    output, _ = run(rewards, strengths, weights, labels, label_weights, margins=margins, coefficient=1.0)
    means = {name: float(value.mean()) for name, value in output.metrics.items()}
    assert means["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert means["reward_gap"] == pytest.approx((1 - 3 + 0) / 3)
    assert means["chosen_reward"] == pytest.approx(1)
    assert means["rejected_reward"] == pytest.approx(5 / 3)
    assert means["margin"] == pytest.approx((3 + 0 + 1) / 3)
    assert means["ranking_loss"] == pytest.approx(np.mean(np.logaddexp(0, [2, 3, 1])))
    # Of the three labelled responses, the safe ones have rewards 2 and 1, and the unsafe one 0: not below 0.
    assert means["safety_accuracy"] == pytest.approx(2 / 3)
    assert means["safety_loss"] == pytest.approx(np.mean(np.logaddexp(0, [-2, -1, 0])))


def test_swapping_every_pair_flips_the_signs():
    rewards, strengths, weights, labels, label_weights = inputs()
    there, _ = run(rewards, strengths, weights, labels, label_weights, margins=(0,) * 4)
    back, _ = run(rewards[..., ::-1], strengths, weights, labels, label_weights, margins=(0,) * 4)
    weight = weights.sum()
    assert float(back.metrics["reward_gap"].total) == -float(there.metrics["reward_gap"].total) != 0
    assert float(back.metrics["accuracy"].total) == weight - float(there.metrics["accuracy"].total)
    # -log sigmoid(-x) = -log sigmoid(x) + x
    np.testing.assert_allclose(back.total, there.total + there.metrics["reward_gap"].total, rtol=1e-5)


def test_the_order_of_pairs_does_not_matter_and_microbatches_add_up():
    arrays = inputs()
    options = {"margins": RewardLossConfig(margin="small").margins, "coefficient": 0.5}
    output, _ = run(*arrays, **options)
    other, _ = run(*(array[::-1, ::-1] for array in arrays), **options)
    halves = [run(*(array[rows] for array in arrays), **options)[0] for rows in (slice(0, 1), slice(1, B))]
    added = jax.tree.map(jnp.add, *halves)
    for same in (other, added):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6), output, same)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_stands_where_no_pair_is_does_not_matter(value):
    rewards, strengths, weights, labels, label_weights = inputs()
    weights[1, 2] = 0.0
    options = {"margins": RewardLossConfig(margin="small").margins, "coefficient": 1.0}
    expected, expected_gradient = run(rewards, strengths, weights, labels, label_weights, **options)
    rewards[1, 2], strengths[1, 2], label_weights[1, 2] = value, 0, 1.0
    output, gradient = run(rewards, strengths, weights, labels, label_weights, **options)
    jax.tree.map(np.testing.assert_array_equal, expected, output)
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert not gradient[1, 2].any()


def test_without_any_pair_the_loss_is_zero():
    rewards, strengths, weights, *labels = inputs()
    output, gradient = run(rewards, strengths, 0 * weights, *labels, margins=(0,) * 4, coefficient=1.0)
    assert float(output.total) == float(output.weight) == 0 and not gradient.any()
    assert float(output.metrics["safety_loss"].mean()) == 0


def test_bad_input():
    rewards, strengths, weights, labels, label_weights = inputs()
    with pytest.raises(UserError, match=r"rewards \(3, 4, 1\)"):
        run(rewards[..., :1], strengths, weights, labels, label_weights, margins=(0,) * 4)
    with pytest.raises(UserError, match=r"margin='smal' is not one of none, small, large; did you mean 'small'"):
        RewardLossConfig(margin="smal")
    with pytest.raises(UserError, match="safety_coefficient=-1"):
        RewardLossConfig(safety_coefficient=-1)
