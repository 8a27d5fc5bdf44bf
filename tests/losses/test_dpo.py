"""The DPO losses against their formulas in float64, their gradients, and what must not matter to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.alignment.config import DPO_LOSSES, DpoLossConfig
from llm_jax.errors import UserError
from llm_jax.losses.preference import dpo_loss

B, P = 3, 4
OPTIONS = {"sigmoid": {"beta": 0.3}, "ipo": {"beta": 0.2}, "normalised": {"beta": 4.0}}
KINDS = pytest.mark.parametrize("kind", DPO_LOSSES)


def inputs(seed=0):
    """Log-probabilities of whole responses (some pairs far apart), lengths, and weights (some 0)."""
    draw = np.random.default_rng(seed)
    references = draw.uniform(-60, -5, (B, P, 2)).astype(np.float32)
    moved = draw.normal(size=(B, P, 2)) * np.array([0.01, 1, 5, 40])[:, None]
    lengths = draw.integers(1, 40, (B, P, 2)).astype(np.float32)
    weights = draw.choice([0.0, 0.5, 1.0], (B, P)).astype(np.float32)
    return (references + moved).astype(np.float32), references, lengths, weights


def oracle(logprobs, references, lengths, weights, kind, beta, smoothing):
    """The total and its gradient for the policy's log-probabilities, a pair at a time."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    total, gradient = 0.0, np.zeros(logprobs.shape)
    for b, p in np.ndindex(B, P):
        scales = 1 / lengths[b, p].astype(np.float64) if kind == "normalised" else np.ones(2)
        ratios = scales * (logprobs[b, p].astype(np.float64) - references[b, p])
        for sign, share in ((1, 1 - smoothing), (-1, smoothing)):
            gap = sign * (ratios[0] - ratios[1])
            if kind == "ipo":
                loss, slope = (gap - 1 / (2 * beta)) ** 2, 2 * (gap - 1 / (2 * beta))
            else:
                loss, slope = np.logaddexp(0, -beta * gap), -beta * sigmoid(-beta * gap)
            total += weights[b, p] * share * loss
            gradient[b, p] += weights[b, p] * share * slope * sign * scales * [1, -1]
    return total, gradient


def run(*arrays, **options):
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(logprobs, *rest):
        output = dpo_loss(logprobs, *rest, **options)
        return output.total, output

    (_, output), gradient = jax.jit(total)(*arrays)
    return output, np.asarray(gradient)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@KINDS
def test_total_and_gradient_agree_with_the_formula(kind, smoothing):
    arrays = inputs()
    beta = OPTIONS[kind]["beta"]
    output, gradient = run(*arrays, kind=kind, beta=beta, label_smoothing=smoothing)
    total, expected = oracle(*arrays, kind, beta, smoothing)
    np.testing.assert_allclose(output.total, total, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert float(output.weight) == arrays[3].sum()


@KINDS
def test_a_policy_that_is_its_reference_is_at_chance(kind):
    """log 2 and an accuracy of one half; IPO is as far from its aim of 1 / (2 beta) as that is from 0."""
    _, references, lengths, weights = inputs()
    output, gradient = run(references, references, lengths, weights, kind=kind, **OPTIONS[kind])
    means = {name: float(value.mean()) for name, value in output.metrics.items()}
    aim = 1 / (2 * OPTIONS[kind]["beta"])
    assert float(output.total / output.weight) == pytest.approx(aim**2 if kind == "ipo" else np.log(2))
    assert means["accuracy"] == 0.5
    assert means["margin"] == means["chosen_drift"] == means["rejected_drift"] == means["chosen_reward"] == 0
    assert (gradient[weights > 0] * [1, -1] < 0).all(), "up with the chosen, down with the rejected"


def test_ipo_is_lowest_at_its_aim_and_rises_beyond():
    zeros, ones = np.zeros((1, 1, 2), np.float32), np.ones((1, 1), np.float32)
    losses = [
        float(run(np.array([[[gap, 0]]], np.float32), zeros, zeros + 1, ones, kind="ipo", beta=0.25)[0].total)
        for gap in (1.0, 2.0, 3.0)
    ]
    assert losses == [1.0, 0.0, 1.0]


def test_metrics():
    logprobs = np.array([[[-10, -20], [-8, -30], [-5, -5], [9, 9]]], np.float32)
    references = np.array([[[-12, -19], [-6, -33], [-6, -6], [0, 9]]], np.float32)
    lengths = np.array([[[4, 5], [2, 3], [1, 2], [7, 7]]], np.float32)
    weights = np.array([[1, 1, 1, 0]], np.float32)
    output, _ = run(logprobs, references, lengths, weights, beta=0.5)
    means = {name: float(value.mean()) for name, value in output.metrics.items()}
    assert means.pop("accuracy") == pytest.approx((1 + 0 + 0.5) / 3)
    assert means.pop("margin") == pytest.approx(0.5 * (3 - 5 + 0) / 3)
    assert means.pop("chosen_reward") == pytest.approx(0.5 * (2 - 2 + 1) / 3)
    assert means.pop("rejected_reward") == pytest.approx(0.5 * (-1 + 3 + 1) / 3)
    assert means.pop("chosen_logprob") == pytest.approx(-23 / 3)
    assert means.pop("rejected_logprob") == pytest.approx(-55 / 3)
    assert means.pop("chosen_length") == pytest.approx(7 / 3)
    assert means.pop("rejected_length") == pytest.approx(10 / 3)
    assert means.pop("chosen_drift") == pytest.approx(1 / 7)
    assert means.pop("rejected_drift") == pytest.approx(3 / 10)
    assert not means


@KINDS
def test_the_order_of_pairs_does_not_matter_and_microbatches_add_up(kind):
    arrays = inputs()
    options = {"kind": kind, "label_smoothing": 0.1, **OPTIONS[kind]}
    output, gradient = run(*arrays, **options)
    other, other_gradient = run(*(array[::-1, ::-1] for array in arrays), **options)
    halves = [run(*(array[rows] for array in arrays), **options)[0] for rows in (slice(0, 1), slice(1, B))]
    added = jax.tree.map(jnp.add, *halves)
    for same in (other, added):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), output, same)
    np.testing.assert_allclose(other_gradient[::-1, ::-1], gradient, rtol=1e-6)


@KINDS
def test_smoothing_by_one_half_would_not_know_which_is_better(kind):
    """Just below it, swapping chosen and rejected changes next to nothing."""
    logprobs, references, lengths, weights = inputs()
    options = {"kind": kind, "label_smoothing": 0.5 - 1e-7, **OPTIONS[kind]}
    there, _ = run(logprobs, references, lengths, weights, **options)
    back, _ = run(*(x[..., ::-1] for x in (logprobs, references, lengths)), weights, **options)
    np.testing.assert_allclose(there.total, back.total, rtol=1e-5)
    sharp = [run(logprobs, references, lengths, weights, kind=kind, **OPTIONS[kind])[0].total]
    sharp += [
        run(*(x[..., ::-1] for x in (logprobs, references, lengths)), weights, kind=kind, **OPTIONS[kind])[0].total
    ]
    assert abs(float(sharp[0] - sharp[1])) > 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
@KINDS
def test_what_stands_where_no_pair_is_does_not_matter(kind, value):
    logprobs, references, lengths, weights = inputs()
    weights[1, 2] = 0.0
    expected, expected_gradient = run(logprobs, references, lengths, weights, kind=kind, **OPTIONS[kind])
    logprobs[1, 2], references[1, 2], lengths[1, 2] = value, value, 0
    output, gradient = run(logprobs, references, lengths, weights, kind=kind, **OPTIONS[kind])
    jax.tree.map(np.testing.assert_array_equal, expected, output)
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert not gradient[1, 2].any()


def test_a_reference_that_is_missing_is_seen():
    logprobs, references, lengths, weights = inputs()
    references[0, 0], weights[0, 0] = np.nan, 1.0
    assert np.isnan(run(logprobs, references, lengths, weights)[0].total)


def test_without_any_pair_the_loss_is_zero():
    logprobs, references, lengths, weights = inputs()
    output, gradient = run(logprobs, references, lengths, 0 * weights)
    assert float(output.total) == float(output.weight) == 0 and not gradient.any()
    assert all(float(value.mean()) == 0 for value in output.metrics.values())


def test_bad_input():
    logprobs, references, lengths, weights = inputs()
    with pytest.raises(UserError, match=r"references \(3, 4, 1\)"):
        run(logprobs, references[..., :1], lengths, weights)
    with pytest.raises(UserError, match="there is no loss 'simpo'"):
        run(logprobs, references, lengths, weights, kind="simpo")
    with pytest.raises(
        UserError, match=r"kind='sigmiod' is not one of sigmoid, ipo, normalised; did you mean 'sigmoid'"
    ):
        DpoLossConfig(kind="sigmiod")
    with pytest.raises(UserError, match=r"label_smoothing=0.5 must be in \[0, 0.5\)"):
        DpoLossConfig(label_smoothing=0.5)
    with pytest.raises(UserError, match="beta=0"):
        DpoLossConfig(beta=0.0)
