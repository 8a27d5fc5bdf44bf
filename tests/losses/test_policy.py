"""PPO's formulas against loops and numpy, region by region, and what must not matter to them."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.config import MeshConfig
from llm_jax.errors import UserError
from llm_jax.losses import policy
from llm_jax.parallel import mesh as mesh_lib

B, T = 6, 9
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def ragged(seed=0, rows=B, length=T):
    """A mask of one response a row, of every length from 1 on, beginning anywhere, and a generator."""
    draw = np.random.default_rng(seed)
    mask = np.zeros((rows, length), np.float32)
    for row in range(rows):
        count = 1 + row % length
        begin = draw.integers(0, length - count + 1)
        mask[row, begin : begin + count] = 1
    return mask, draw


def normal(draw, count, shape=(B, T)):
    return draw.normal(size=(count, *shape)).astype(np.float32)


def with_garbage(mask, *arrays):
    """The arrays with NaN where the mask is 0, which must not matter."""
    return [np.where(mask > 0, x, np.nan).astype(np.float32) for x in arrays]


# Generalised advantage estimation.


def gae_by_sums(rewards, values, mask, gamma, lam):
    """Definition (16) of the paper: every advantage is its own sum of discounted deltas, a trajectory at a time."""
    advantages = np.zeros(mask.shape)
    for row in range(len(mask)):
        t = 0
        while t < mask.shape[1]:
            end = t
            while end < mask.shape[1] and mask[row, end]:
                end += 1
            r, v = (list(x[row, t:end].astype(np.float64)) for x in (rewards, values))
            v.append(0.0)
            deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
            for i in range(len(r)):
                advantages[row, t + i] = sum((gamma * lam) ** (k - i) * deltas[k] for k in range(i, len(r)))
            t = end + 1
    return advantages, np.where(mask > 0, advantages + values, 0.0)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 1.0), (0.8, 0.7), (1.0, 0.0), (0.0, 0.5)])
def test_gae_is_a_loop_over_ragged_trajectories(gamma, lam):
    mask, draw = ragged()
    mask[4] = [1, 1, 0, 1, 0, 0, 1, 1, 1]  # three trajectories of a row
    mask[5] = 0
    rewards, values = normal(draw, 2)
    actual = jax.jit(lambda *x: policy.gae(*x, gamma, lam))(*with_garbage(mask, rewards, values), mask)
    for a, e in zip(actual, gae_by_sums(rewards, values, mask, gamma, lam), strict=True):
        close(a, e)
        assert a.dtype == jnp.float32


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_a_loop_for_any_mask(seed, gamma, lam):
    draw = np.random.default_rng(seed)
    mask = draw.integers(0, 2, (B, T)).astype(np.float32)
    rewards, values = normal(draw, 2)
    for a, e in zip(
        policy.gae(rewards, values, mask, gamma, lam), gae_by_sums(rewards, values, mask, gamma, lam), strict=True
    ):
        close(a, e)


def test_returns_without_discount_are_sums_of_rewards_whatever_the_values():
    mask, draw = ragged()
    rewards, values = normal(draw, 2)
    _, returns = policy.gae(rewards, values, mask, 1.0, 1.0)
    close(returns, np.cumsum((rewards * mask)[:, ::-1], 1)[:, ::-1] * mask)


def test_a_padded_trajectory_has_the_advantages_that_it_has_alone_bit_for_bit():
    _, draw = ragged()
    rewards, values = normal(draw, 2, (1, 4))
    alone = policy.gae(rewards, values, np.ones((1, 4), np.float32), 0.9, 0.8)
    padded = [np.pad(x, ((0, 0), (3, 2)), constant_values=np.nan) for x in (rewards, values)]
    mask = np.pad(np.ones((1, 4), np.float32), ((0, 0), (3, 2)))
    for a, b in zip(alone, policy.gae(*padded, mask, 0.9, 0.8), strict=True):
        np.testing.assert_array_equal(a, b[:, 3:7])
        assert not np.any(np.delete(np.asarray(b), range(3, 7), axis=1))


# Divergence.


def test_kl_estimates_token_by_token():
    draw = np.random.default_rng(0)
    a, b = normal(draw, 2)
    kl = policy.kl_estimates(a, b)
    difference = a.astype(np.float64) - b
    close(kl.k1, difference)
    close(kl.k2, difference**2 / 2)
    close(kl.k3, np.exp(-difference) - 1 + difference)
    assert np.min(kl.k3) >= 0
    for k in policy.kl_estimates(a, a):
        assert not np.any(k)
    tiny = policy.kl_estimates(jnp.full((1, 1), 1e-3), jnp.zeros((1, 1))).k3  # exp(-1e-3) - 1 would be off by 6%
    np.testing.assert_allclose(tiny, 1e-6 / 2 - 1e-9 / 6, rtol=1e-3)


# Rewards.


def test_fractional_rewards_survive_and_the_score_is_earned_by_the_last_token():
    mask, draw = ragged()
    (kl,), scores = normal(draw, 1), np.float32([0.25, -0.125, 0.7, 1 / 3, 2.5, -3])
    expected = -0.1 * kl.astype(np.float64) * mask
    for row in range(B):
        expected[row, np.nonzero(mask[row])[0][-1]] += scores[row]
    close(policy.token_rewards(scores, *with_garbage(mask, kl), mask, 0.1), expected)
    alone = policy.token_rewards(scores, 0 * kl, mask, 0.1)
    np.testing.assert_array_equal(np.sum(alone, 1), scores)
    assert not np.any(policy.token_rewards(scores, kl, 0 * mask, 0.1))


def test_integer_rewards_are_refused():
    mask, _ = ragged()
    with pytest.raises(UserError, match=r"scores int32\[6\] must be floating point"):
        policy.token_rewards(jnp.arange(B), mask, mask, 0.1)
    with pytest.raises(UserError, match="one for each of the 6 rows"):
        policy.token_rewards(jnp.zeros(B - 1), mask, mask, 0.1)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_whitening_against_numpy(offset):
    mask, draw = ragged()
    x = (normal(draw, 1)[0] * 3 + offset).astype(np.float32)
    kept = x[mask > 0].astype(np.float64)
    expected = np.zeros((B, T))
    expected[mask > 0] = (kept - kept.mean()) / kept.std()
    (garbage,) = with_garbage(mask, x)
    close(policy.whiten(garbage, mask), expected, atol=1e-4)
    expected[mask > 0] += kept.mean()
    close(policy.whiten(garbage, mask, shift_mean=False), expected, atol=1e-4)


def test_whitening_of_equal_or_no_values_is_zero():
    mask, _ = ragged()
    for value in (0.1, 1e4 + 0.1):
        np.testing.assert_allclose(policy.whiten(np.full((B, T), value, np.float32), mask), 0, atol=1e-3)
    np.testing.assert_array_equal(policy.whiten(np.full((B, T), np.nan), 0 * mask), 0)


def test_whitening_on_a_mesh_is_over_the_whole_batch():
    mask, draw = ragged(rows=16)
    (x,) = normal(draw, 1, mask.shape)
    x += np.arange(16)[:, None]  # every device's own mean would differ
    mesh = mesh_lib.build(MeshConfig())
    rows = NamedSharding(mesh, P(("replica", "data")))
    split = jax.jit(policy.whiten, in_shardings=rows, out_shardings=rows)(x, mask)
    close(split, policy.whiten(x, mask))


# Clipping.

CLIP, LIMIT = 0.2, 3.0


def one_token(log_ratio, advantage, **options):
    """Loss, its gradient for the logprob, and the metrics of a single token."""
    old = jnp.full((1, 1), -1.5)

    def total(logprob):
        output = policy.policy_loss(
            logprob, old, jnp.full((1, 1), advantage), jnp.ones((1, 1)), clip=CLIP, max_log_ratio=LIMIT, **options
        )
        return output.total, output.metrics

    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(old + log_ratio)
    return float(loss), float(gradient[0, 0]), {name: float(m.total) for name, m in metrics.items()}


@pytest.mark.parametrize("advantage", [1.7, -0.6])
@pytest.mark.parametrize("ratio", [0.01, 0.4, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0, 19.0, 50.0])
def test_the_ratio_is_clipped_piecewise(ratio, advantage):
    """A token is held where it has gone far enough in the direction of its advantage, and only there."""
    loss, gradient, metrics = one_token(np.log(ratio), advantage)
    held = ratio > 1 + CLIP if advantage > 0 else ratio < 1 - CLIP
    beyond = abs(np.log(ratio)) > LIMIT
    limited = np.exp(np.clip(np.log(ratio), -LIMIT, LIMIT))
    bound = 1 + CLIP if advantage > 0 else 1 - CLIP
    expected = -advantage * (bound if held else limited)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, 0.0 if held or beyond else -advantage * ratio, rtol=1e-5)
    assert metrics["clip_fraction"] == held and metrics["log_ratio_clamped"] == beyond
    np.testing.assert_allclose(metrics["ratio"], limited, rtol=1e-5)
    np.testing.assert_allclose(metrics["approximate_kl"], limited - 1 - np.log(limited), rtol=1e-4)
    np.testing.assert_allclose(metrics["policy_loss"], loss)


def test_without_a_clip_every_ratio_counts():
    output = policy.policy_loss(*jnp.log(jnp.array([[[5.0]], [[1.0]]])), jnp.ones((1, 1)), jnp.ones((1, 1)),
                                clip=0.0, max_log_ratio=LIMIT)  # fmt: skip
    np.testing.assert_allclose(output.total, -5.0, rtol=1e-6)
    assert output.metrics["clip_fraction"].total == 0


def test_an_enormous_difference_stays_finite():
    for difference in (-1e4, 1e4):
        for value in one_token(difference, -1.0, reference=jnp.full((1, 1), 2e4), kl_coefficient=0.1)[:2]:
            assert np.isfinite(value)


CHANGES = [-2.0, -0.31, -0.29, 0.0, 0.29, 0.31, 2.0]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("target", [-5.0, -1.0, 0.1, 1.0, 5.0])
def test_the_value_is_clipped_piecewise(change, target):
    """Against the formula in numpy; the gradient is 0 exactly where the clipped square is the larger one."""
    old, clip = 0.4, 0.3
    value = old + change

    def total(value):
        arrays = (jnp.full((1, 1), x) for x in (old, target, 1.0))
        output = policy.value_loss(jnp.reshape(value, (1, 1)), *arrays, clip=clip)
        return output.total, output.metrics

    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(value)
    clipped = old + np.clip(change, -clip, clip)
    held = (clipped - target) ** 2 > (value - target) ** 2
    np.testing.assert_allclose(loss, max((value - target) ** 2, (clipped - target) ** 2) / 2, rtol=1e-5)
    np.testing.assert_allclose(gradient, 0.0 if held else value - target, rtol=1e-5)
    assert float(metrics["value_clip_fraction"].total) == held
    assert held == (abs(change) > clip and (change > 0) == (target > (value + clipped) / 2))
    unclipped = policy.value_loss(*(jnp.full((1, 1), x) for x in (value, old, target, 1.0)), clip=0.0)
    np.testing.assert_allclose(unclipped.total, (value - target) ** 2 / 2, rtol=1e-5)


def test_explained_variance_against_numpy():
    mask, draw = ragged()
    returns, noise = normal(draw, 2)
    values = returns + 0.5 * noise
    output = policy.value_loss(*with_garbage(mask, values, values, returns), mask, clip=0.2)
    means = [output.metrics[name].mean() for name in ("return", "return_squared", "value_error", "value_error_squared")]
    kept = mask > 0
    close(policy.explained_variance(*means), 1 - (returns - values)[kept].var() / returns[kept].var())
    assert policy.explained_variance(*(jnp.float32(x) for x in (2.0, 4.0, 1.0, 1.0))) == 0
    close(output.metrics["value_loss"].mean(), np.mean((returns - values)[kept] ** 2) / 2)


# The whole loss.


def loss_inputs(seed=0):
    mask, draw = ragged(seed)
    logprobs, old, advantages, reference = normal(draw, 4)
    return mask, old + 0.2 * logprobs, old, advantages, old + 0.3 * reference, np.abs(normal(draw, 1)[0])


OPTIONS = {"clip": 0.2, "max_log_ratio": 20.0, "entropy_coefficient": 0.03, "kl_coefficient": 0.4}


def whole_loss(mask, logprobs, old, advantages, reference, entropies, weights=None):
    weights = mask if weights is None else weights
    return policy.policy_loss(logprobs, old, advantages, weights, entropies=entropies, reference=reference, **OPTIONS)


def test_loss_metrics_and_both_averages_against_numpy():
    mask, logprobs, old, advantages, reference, entropies = loss_inputs()
    ratio, difference = np.exp(logprobs - old), logprobs - reference
    k3 = np.exp(-difference) - 1 + difference
    losses = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages) - 0.03 * entropies + 0.4 * k3
    kept = mask > 0
    garbage = with_garbage(mask, logprobs, old, advantages, reference, entropies)
    output = whole_loss(mask, *garbage)
    close(output.total / output.weight, losses[kept].mean())
    for name, value in {"entropy": entropies, "reference_kl": k3, "ratio": ratio}.items():
        close(output.metrics[name].mean(), value[kept].mean())
    per_sequence = whole_loss(mask, *garbage, weights=policy.mean_per_sequence(mask))
    close(per_sequence.total / per_sequence.weight, np.mean([l[m > 0].mean() for l, m in zip(losses, mask)]))
    empty_row = mask * (np.arange(B) != 2)[:, None]
    assert float(jnp.sum(policy.mean_per_sequence(empty_row))) == pytest.approx(B - 1)


def test_what_is_masked_has_no_gradient_and_gives_no_nan():
    mask, *arrays = loss_inputs()
    plain = jax.grad(lambda x: whole_loss(mask, x, *arrays[1:]).total)(arrays[0])
    garbage = with_garbage(mask, *arrays)
    gradient = jax.grad(lambda x: whole_loss(mask, x, *garbage[1:]).total)(garbage[0])
    np.testing.assert_array_equal(gradient, plain)
    assert not np.any(gradient[mask == 0])
    critic = jax.grad(lambda x: policy.value_loss(x, *garbage[1:3], mask, clip=0.1).total)(garbage[0])
    assert np.all(np.isfinite(critic)) and not np.any(critic[mask == 0])


def test_a_batch_without_responses_is_zero():
    mask, *arrays = loss_inputs()
    output = whole_loss(0 * mask, *arrays)
    assert output.total == output.weight == 0 and output.metrics["ratio"].mean() == 0


def test_only_the_logprobs_and_entropies_of_now_have_gradients():
    mask, *arrays = loss_inputs()
    gradients = jax.grad(lambda x: whole_loss(mask, *x).total)(arrays)
    assert [bool(np.any(g)) for g in gradients] == [True, False, False, False, True]
    critic = jax.grad(lambda x: policy.value_loss(*x, mask, clip=0.1).total)(arrays[:3])
    assert [bool(np.any(g)) for g in critic] == [True, False, False]


def test_the_first_minibatch_has_ratio_one_and_kl_zero_exactly():
    mask, logprobs, _, advantages, *_ = loss_inputs()
    output = policy.policy_loss(logprobs, logprobs, advantages, mask, reference=logprobs, **OPTIONS)
    means = {name: float(m.mean()) for name, m in output.metrics.items()}
    assert means["ratio"] == 1.0
    for name in ("approximate_kl", "reference_kl", "clip_fraction", "log_ratio_clamped"):
        assert means[name] == 0.0, name


# Groups.


def test_group_advantages_against_numpy():
    scores = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32) + 100
    centred = scores.astype(np.float64) - scores.mean(1, keepdims=True, dtype=np.float64)
    close(policy.group_advantages(scores, "grpo"), centred / scores.std(1, keepdims=True, dtype=np.float64), rtol=1e-3)
    others = [[np.delete(row, i).mean(dtype=np.float64) for i in range(4)] for row in scores]
    close(policy.group_advantages(scores, "rloo"), scores - np.array(others), rtol=1e-3)


@pytest.mark.parametrize("kind", policy.GROUP_KINDS)
def test_equal_scores_of_a_group_teach_nothing(kind):
    scores = np.float32([[0.1] * 7, [1000.1] * 7, [0, 0, 0, 0, 0, 0, 1]])
    advantages = policy.group_advantages(scores, kind)
    assert not np.any(advantages[:2]) and np.all(advantages[2] != 0)


def test_mistakes_are_one_line():
    x, short = jnp.ones((2, 3)), jnp.ones((2, 2))
    with pytest.raises(UserError, match=r"gae: arrays of shapes \(2, 3\), \(2, 2\)"):
        policy.gae(x, short, x, 1.0, 1.0)
    with pytest.raises(UserError, match="clip=-1"):
        policy.policy_loss(x, x, x, x, clip=-1, max_log_ratio=1.0)
    with pytest.raises(UserError, match="must not be negative"):
        policy.value_loss(x, x, x, x, clip=-1)
    with pytest.raises(UserError, match="at least 2 responses"):
        policy.group_advantages(jnp.ones((3, 1)), "rloo")
    with pytest.raises(UserError, match="kind='gpro' is not one of grpo, rloo"):
        policy.group_advantages(x, "gpro")
