"""KL coefficients against their formulas, moments and shaped scores against numpy in float64, bad settings refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.alignment import controllers, policy_config
from llm_jax.alignment.policy_config import AdvantageConfig, KlConfig, PolicyLossConfig, RewardShapingConfig
from llm_jax.errors import UserError

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
update_kl = jax.jit(controllers.update_kl, static_argnums=0)
update_moments = jax.jit(controllers.update_moments)
shape = jax.jit(controllers.shape_scores, static_argnums=0)


def coefficients(config, kls):
    """The coefficient of every iteration, the first one included."""
    current, found = controllers.init_kl(config), []
    for kl in kls:
        found.append(float(current.coefficient))
        current = update_kl(config, current, jnp.float32(kl))
    assert int(current.iteration) == len(kls) and current.coefficient.dtype == jnp.float32
    return [*found, float(current.coefficient)]


def test_a_fixed_coefficient_stays():
    close(coefficients(KlConfig(coefficient=0.04), [1e3, 0.0, np.nan]), [0.04] * 4)


def test_a_schedule_is_a_line_to_its_end_and_stays_there():
    """Baichuan-2's: from 0.2 to 0.005 over 350 iterations."""
    config = KlConfig(kind="scheduled", coefficient=0.2, end=0.005, iterations=350)
    close(coefficients(config, [1.0] * 400), np.interp(range(401), [0, 350], [0.2, 0.005]))


def test_an_adaptive_coefficient_follows_the_papers_formula():
    config = KlConfig(kind="adaptive", coefficient=0.2, target=6.0, gain=0.1)
    kls, expected = [6.0, 9.0, 7.0, 5.5, 0.0, -1.0, np.inf, np.nan, 6.6], [0.2]
    for kl in kls:
        error = 0.0 if np.isnan(kl) else min(max((kl - 6.0) / 6.0, -0.2), 0.2)
        expected.append(expected[-1] * (1 + 0.1 * error))
    close(coefficients(config, kls), expected)
    assert len(set(expected)) == 8  # what the target is met by, and what is no number, change nothing


def test_an_adaptive_coefficient_reaches_the_target():
    """Of a policy whose KL falls with its coefficient, as 1 / coefficient."""
    config = KlConfig(kind="adaptive", coefficient=5.0, target=4.0, gain=0.5)
    current = controllers.init_kl(config)
    for _ in range(300):
        current = update_kl(config, current, 1.0 / current.coefficient)
    np.testing.assert_allclose(1.0 / current.coefficient, 4.0, rtol=1e-2)


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_running_moments_are_those_of_all_scores(offset):
    """However they are divided into batches, and far from 0, where float32 sums of squares would have no digit left."""
    draw = np.random.default_rng(0)
    scores = (draw.normal(size=6000) * 2 + offset).astype(np.float32)
    for sizes in ([6000], [1] * 50 + [5950], [16] * 375):
        moments = controllers.init_moments()
        for batch in np.split(scores, np.cumsum(sizes)[:-1]):
            moments = update_moments(moments, batch)
        assert moments.number == 6000
        np.testing.assert_allclose(moments.mean, scores.mean(dtype=np.float64), rtol=1e-6, atol=1e-4)
        np.testing.assert_allclose(moments.variance, scores.var(dtype=np.float64), rtol=2e-3)


def test_moments_of_bfloat16_scores_are_kept_in_float32():
    moments = update_moments(controllers.init_moments(), jnp.linspace(0, 1, 100, dtype=jnp.bfloat16))
    assert {x.dtype for x in moments} == {np.dtype("float32")}


def scores_and_ends(seed=0):
    draw = np.random.default_rng(seed)
    return draw.uniform(0.01, 0.99, 32).astype(np.float32), draw.integers(0, 2, 32).astype(bool)


def earlier():
    """Moments of two earlier batches, and their scores."""
    batches = [scores_and_ends(seed)[0] * 3 for seed in (1, 2)]
    moments = functools.reduce(update_moments, batches, controllers.init_moments())
    return moments, np.concatenate(batches).astype(np.float64)


FORMULAS = {
    "none": lambda s, seen: s,
    "whiten": lambda s, seen: (s - s.mean()) / s.std(),
    "running_mean": lambda s, seen: s - seen.mean(),
    "running_std": lambda s, seen: s / seen.std(),
    "running_both": lambda s, seen: (s - seen.mean()) / seen.std(),
}


@pytest.mark.parametrize("logit", [False, True])
@pytest.mark.parametrize("normalization", policy_config.NORMALIZATIONS)
def test_scores_are_shaped_by_formula(normalization, logit):
    config = RewardShapingConfig(logit=logit, normalization=normalization, limit=1.1, missing_end_penalty=0.7)
    (scores, ended), (moments, seen) = scores_and_ends(), earlier()
    own = scores.astype(np.float64)
    own = np.log(own / (1 - own)) if logit else own
    expected = np.clip(FORMULAS[normalization](own, np.concatenate([seen, own])), -1.1, 1.1) - 0.7 * ~ended
    actual, after = shape(config, moments, scores, ended)
    close(actual, expected, atol=1e-4)
    assert actual.dtype == jnp.float32 and after.number == 96
    close(after.mean, np.concatenate([seen, own]).mean())


def test_normalizations_differ():
    """So that none of the formulas above stands for another."""
    (scores, _), (_, seen) = scores_and_ends(), earlier()
    results = [formula(scores, np.concatenate([seen, scores])) for formula in FORMULAS.values()]
    assert all(np.max(np.abs(a - b)) > 0.1 for i, a in enumerate(results) for b in results[:i])


def test_certain_scores_have_logits_of_one_size():
    """A reward model's sigmoid is exactly 0 or 1 in float32 where it is sure enough."""
    scores, ended = np.float32([0.0, 1.0, 0.5, 1e-30]), np.ones(4, bool)
    shaped, _ = shape(RewardShapingConfig(logit=True), controllers.init_moments(), scores, ended)
    close(shaped, [-np.log(2.0**24 - 1), np.log(2.0**24 - 1), 0.0, -np.log(2.0**24 - 1)])


@pytest.mark.parametrize("normalization", policy_config.NORMALIZATIONS)
def test_equal_scores_are_not_blown_up(normalization):
    """As at the beginning, where no response or every one is right."""
    for value in (0.0, 0.1, 1.0, 700.1):
        scores = np.full(7, value, np.float32)
        config = RewardShapingConfig(normalization=normalization)
        shaped, _ = shape(config, controllers.init_moments(), scores, np.ones(7, bool))
        kept = value if normalization in ("none", "running_std") else 0.0
        np.testing.assert_allclose(shaped, kept, atol=1e-3)


def test_fractional_scores_survive_and_integers_are_refused():
    scores, ended = scores_and_ends()
    shaped, _ = shape(RewardShapingConfig(), controllers.init_moments(), scores, ended)
    np.testing.assert_array_equal(shaped, scores)
    with pytest.raises(UserError, match=r"scores int32\[32\] .* must be floating point"):
        shape(RewardShapingConfig(), controllers.init_moments(), jnp.arange(32), ended)
    with pytest.raises(UserError, match="one for each response"):
        shape(RewardShapingConfig(), controllers.init_moments(), scores, ended[1:])


BAD = {
    "is not one of fixed, scheduled, adaptive; did you mean 'adaptive'": lambda: KlConfig(kind="adaptiv"),
    "a schedule needs its length": lambda: KlConfig(kind="scheduled"),
    "nothing else has one": lambda: KlConfig(iterations=5),
    "would stay 0": lambda: KlConfig(kind="adaptive", coefficient=0.0),
    "KlConfig.coefficient=-1 must not be negative": lambda: KlConfig(coefficient=-1),
    "KlConfig.target=0 must be positive": lambda: KlConfig(kind="adaptive", target=0),
    "did you mean 'whiten'": lambda: RewardShapingConfig(normalization="whitened"),
    "missing_end_penalty=-1 must not be negative": lambda: RewardShapingConfig(missing_end_penalty=-1),
    "clip=1.5 must be below 1": lambda: PolicyLossConfig(clip=1.5),
    "max_log_ratio=0 must be positive": lambda: PolicyLossConfig(max_log_ratio=0),
    "AdvantageConfig.lam=1.1 must be in": lambda: AdvantageConfig(lam=1.1),
    "is not one of gae, grpo, rloo": lambda: AdvantageConfig(kind="reinforce"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_are_refused(message):
    with pytest.raises(UserError) as error:
        BAD[message]()
    assert message in str(error.value) and "\n" not in str(error.value)
