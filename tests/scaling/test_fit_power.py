"""L(C) = a*C^b + L_inf: against brute force and other optimisers, its invariances, its refusals."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import optimize

from llm_jax.errors import UserError
from llm_jax.scaling import fit, fit_huber, fit_noise, fit_profile, fit_terms

TRUTH = (2.0, -0.15, 1.7)  # at compute 1
SIZES = np.geomspace(1e12, 1e15, 7)


def fit_methods() -> tuple[str, ...]:
    return ("least_squares", "huber")


def law(compute, a=TRUTH[0] * 1e12**0.15, b=TRUTH[1], l_inf=TRUTH[2]):
    return a * np.asarray(compute) ** b + l_inf


def sweep(seed: int = 0, noise: float = 0.004, seeds: int = 1) -> tuple[np.ndarray, np.ndarray]:
    compute = np.repeat(SIZES, seeds)
    return compute, law(compute) * np.exp(np.random.default_rng(seed).normal(size=compute.size) * noise)


def brute_force(x, loss, weight, exponents):
    """Least squares over a grid of exponents, each a linear problem of its own."""
    best = None
    for b in exponents:
        design = np.stack([np.exp(b * x), np.ones_like(x)], axis=1) * weight[:, None]
        solution, *_ = np.linalg.lstsq(design, loss * weight, rcond=None)
        squares = np.sum((design @ solution - loss * weight) ** 2)
        if best is None or squares < best[0]:
            best = (squares, solution[0], b, solution[1])
    return best


@pytest.mark.parametrize("method", ["least_squares", "huber"])
def test_exact_points_give_their_law(method):
    found = fit.fit_power_law(SIZES, law(SIZES), method=method, draws=50)
    assert found.b == pytest.approx(TRUTH[1], rel=1e-5)
    assert found.l_inf == pytest.approx(TRUTH[2], rel=1e-5)
    assert found.a == pytest.approx(TRUTH[0] * 1e12**0.15, rel=1e-4)
    assert found.predict(1e17) == pytest.approx(law(1e17), rel=1e-6)
    assert found.r_squared == pytest.approx(1)
    low, high = found.predict_interval(1e17)
    assert low <= high and high - low < 1e-4


def test_least_squares_is_the_best_of_a_grid_of_exponents():
    compute, loss = sweep(seed=3)
    found = fit.fit_power_law(compute, loss)
    x = np.log(compute) - np.log(compute).mean()
    first = brute_force(x, loss, np.ones_like(x), np.linspace(-1, -0.005, 4001))
    fitted = first[1] * np.exp(first[2] * x) + first[3]
    _, _, b, l_inf = brute_force(x, loss, 1 / fitted, np.linspace(-1, -0.005, 4001))
    assert found.b == pytest.approx(b, abs=3e-4)  # the grid's step
    assert found.l_inf == pytest.approx(l_inf, abs=4e-3)


def test_profile_interval_is_where_constrained_fits_cross_the_limit():
    """The interval of L_inf by another road: fix it, optimise a and b, and find where the F limit is crossed."""
    compute, loss = sweep(seed=1)
    x = np.log(compute) - np.log(compute).mean()
    found = fit_profile.profile(x, loss, np.arange(7), 0.95)

    def squares(l_inf):
        def residuals(p):
            return (p[0] * np.exp(p[1] * x) + l_inf - loss) / found.scale_N

        return 2 * optimize.least_squares(residuals, (1.0, -0.15), xtol=1e-12, ftol=1e-12).cost

    least = optimize.minimize_scalar(squares, bounds=(0.5, 2.0), method="bounded", options={"xatol": 1e-9})
    limit = least.fun * (1 + 2.7764451**2 / 4)  # t of 97.5 % with 7 - 3 degrees of freedom
    low = optimize.brentq(lambda value: squares(value) - limit, -3.0, least.x)
    high = optimize.brentq(lambda value: squares(value) - limit, least.x, 2.4)
    one = np.ones_like(found.b_B)
    assert found.interval(np.stack([0 * one, one], axis=-1)) == pytest.approx((low, high), abs=2e-3)


def test_interval_of_a_new_run_is_that_of_one_more_trial():
    """A new loss is allowed where adding it as an eighth trial costs no more than t^2 times the noise."""
    compute, loss = sweep(seed=2, noise=0.002)
    target = 1e16
    found = fit.fit_power_law(compute, loss)
    low, high = found.predict_interval(target)
    x = np.log([*compute, target]) - np.log(compute).mean()
    profile = found._profile
    weight = 1 / np.array([*profile.scale_N, found.predict(target)])
    for value in (low, high):
        squares = brute_force(x, np.array([*loss, value]), weight, np.linspace(profile.b_B[0], profile.b_B[-1], 4001))
        assert squares[0] == pytest.approx(profile.limit, rel=5e-3)
    inner = found.law_interval(target)
    assert low < inner[0] < found.predict(target) < inner[1] < high


def test_huber_solver_finds_what_a_simplex_finds():
    compute, loss = sweep(seed=5, seeds=2)
    x = np.log(compute) - np.log(compute).mean()
    terms = fit_terms.power_terms(x)

    def objective(theta):
        predicted = np.log(np.exp(theta[0] + theta[1] * x) + np.exp(theta[2]))
        return 1e4 * np.sum(optimize_huber(np.log(loss) - predicted))

    def optimize_huber(r, delta=1e-3):
        return np.where(np.abs(r) < delta, r**2 / 2, delta * np.abs(r) - delta**2 / 2)

    start = np.array([0.0, -0.15, 0.5])
    oracle = optimize.minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-13})
    oracle = optimize.minimize(objective, oracle.x, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-13})
    theta, value = fit_huber.minimise(terms, np.log(loss)[None], start[None], 1e-3)
    assert 1e4 * value[0] <= oracle.fun + 1e-8
    found = fit.fit_power_law(compute, loss, method="huber", draws=50)
    assert found.b == pytest.approx(theta[0, 1], abs=1e-4)


def test_gradient_of_terms_matches_differences():
    x = np.linspace(-3, 3, 5)
    theta = np.array([[0.3, -0.2, 0.4]])
    terms = fit_terms.power_terms(x)
    _, jacobian = fit_huber._linearise(terms, theta, np.zeros((1, 5)))
    for index in range(3):
        step = np.eye(3)[index] * 1e-6
        slope = (fit_huber.log_loss(terms, theta + step) - fit_huber.log_loss(terms, theta - step)) / 2e-6
        np.testing.assert_allclose(jacobian[0, :, index], slope[0], rtol=1e-6)


def test_one_run_gone_wrong_bends_the_huber_fit_less():
    compute, loss = sweep(noise=0.0005, seeds=2)
    loss[3] *= 1.05
    errors = {m: abs(fit.fit_power_law(compute, loss, method=m, draws=100).l_inf - TRUTH[2]) for m in fit_methods()}
    assert errors["huber"] < 0.25 * errors["least_squares"]


@pytest.mark.parametrize("method", fit_methods())
def test_unit_of_compute_changes_only_a(method):
    compute, loss = sweep(seeds=2)
    one = fit.fit_power_law(compute, loss, method=method, draws=60)
    other = fit.fit_power_law(compute * 1e6, loss, method=method, draws=60)
    assert other.b == pytest.approx(one.b, rel=1e-5)
    assert other.l_inf == pytest.approx(one.l_inf, rel=1e-5)
    assert other.a == pytest.approx(one.a * 1e6**-one.b, rel=1e-4)
    for name in ("b", "l_inf"):
        assert other.intervals[name] == pytest.approx(one.intervals[name], rel=1e-4)
    assert other.predict_interval(1e22) == pytest.approx(one.predict_interval(1e16), rel=1e-5)


@pytest.mark.parametrize("method", fit_methods())
def test_order_of_trials_does_not_matter_and_seeds_repeat(method):
    compute, loss = sweep(seeds=3)
    order = np.random.default_rng(1).permutation(loss.size)
    one = fit.fit_power_law(compute, loss, method=method, draws=60)
    assert fit.fit_power_law(compute[order], loss[order], method=method, draws=60) == one
    again = fit.fit_power_law(compute, loss, method=method, draws=60)
    assert again.predict_interval(1e17) == one.predict_interval(1e17)
    if method == "huber":
        assert fit.fit_power_law(compute, loss, method=method, draws=60, seed=1).intervals != one.intervals


def test_more_seeds_narrow_the_interval_by_their_root():
    """Four times the seeds, of noise that seeds do not share: half the width, on average over sweeps."""
    widths = {}
    for seeds in (3, 12):
        laws = [fit.fit_power_law(*sweep(seed, 0.003, seeds)) for seed in range(12)]
        widths[seeds] = np.median([law.intervals["l_inf"][1] - law.intervals["l_inf"][0] for law in laws])
    assert 0.38 < widths[12] / widths[3] < 0.62


def test_seeds_do_not_narrow_an_error_that_they_share():
    """When whole sizes are off, more seeds of them tell nothing; runs taken one by one would seem to."""
    shared = 0.01 * np.random.default_rng(4).normal(size=SIZES.size)
    ratios, naive = [], []
    for seed in range(5):
        few, many = (np.repeat(law(SIZES) * np.exp(shared), n) for n in (1, 9))
        many = many * np.exp(1e-4 * np.random.default_rng(seed).normal(size=many.size))
        width = {}
        for name, compute, loss, groups in (
            ("few", SIZES, few, None),
            ("many", np.repeat(SIZES, 9), many, None),
            ("naive", np.repeat(SIZES, 9), many, range(many.size)),
        ):
            low, high = fit.fit_power_law(compute, loss, groups=groups).intervals["l_inf"]
            width[name] = high - low
        ratios.append(width["many"] / width["few"])
        naive.append(width["naive"] / width["few"])
    assert 0.95 < np.mean(ratios) < 1.05
    assert np.mean(naive) < 0.3


def test_whitener_is_the_inverse_root_of_the_covariance():
    group = np.array([0, 0, 1, 2, 2, 2])
    covariance = np.eye(6) + 0.7 * (group[:, None] == group)
    values, vectors = np.linalg.eigh(covariance)
    np.testing.assert_allclose(fit_noise.whitener(group, 0.7), vectors @ np.diag(values**-0.5) @ vectors.T, atol=1e-12)


def test_variances_are_found_in_much_data():
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(2000), 3)
    residual = 0.3 * generator.normal(size=2000)[group] + 0.2 * generator.normal(size=6000)
    noise = fit_noise.estimate(residual, group, 3)
    assert noise.between == pytest.approx(0.09, rel=0.08)
    assert noise.within == pytest.approx(0.04, rel=0.08)
    drawn = noise.draw(generator, 400, others=1)
    assert drawn.shape == (400, 6001)
    assert drawn.var() == pytest.approx(0.13, rel=0.05)
    same = np.mean(drawn[:, 0:6000:3] * drawn[:, 1:6000:3])
    assert same == pytest.approx(0.09, rel=0.08)


def test_noise_is_drawn_with_the_tails_of_t():
    noise = fit_noise.Noise(0.0, 1.0, 4, np.arange(1))
    drawn = noise.draw(np.random.default_rng(0), 200_000)[:, 0]
    assert np.quantile(drawn, 0.975) == pytest.approx(2.776, rel=0.03)


def test_result_is_json():
    for method in fit_methods():
        found = fit.fit_power_law(*sweep(), method=method, draws=50)
        again = json.loads(json.dumps(dataclasses.asdict(found)))
        assert again["intervals"]["b"] == list(found.intervals["b"])
        np.testing.assert_allclose(again["residuals"], sweep()[1] - [found.predict(c) for c in SIZES], atol=1e-9)


def changed(index: int, value: float) -> np.ndarray:
    loss = law(SIZES).copy()
    loss[index] = value
    return loss


ROUNDED = np.array([1e13, 1.01e13, 1.02e13, 1.03e13, 1e17, 1.01e17, 1.02e17])  # whole steps of two budgets

REFUSALS = {
    "not-finite": ((SIZES, changed(2, np.nan)), {}, "the loss of point 2 is nan"),
    "not-positive": ((SIZES, changed(1, -1.0)), {}, "the loss of point 1 is -1.0"),
    "compute": (([0.0, *SIZES[1:]], law(SIZES)), {}, "the compute of point 0 is 0.0"),
    "lengths": ((SIZES, law(SIZES)[1:]), {}, "lists of one length, not of 7 and 6"),
    "ragged": (([[1e12, 2e12], [3e12]], law(SIZES)), {}, "compute must be a list of numbers, not [[1000000000000.0"),
    "text": ((SIZES, ["a"] * 7), {}, "loss must be a list of numbers, not ['a', 'a'"),
    "table": (([SIZES, SIZES], law(SIZES)), {}, "compute must be a list of numbers, not of shape (2, 7)"),
    "few": ((SIZES[:4], law(SIZES[:4])), {}, "4 distinct budgets of compute"),
    "few-in-seeds": ((np.repeat(SIZES[:3], 4), law(np.repeat(SIZES[:3], 4))), {}, "3 distinct budgets of compute"),
    "few-but-rounded": ((ROUNDED, law(ROUNDED)), {}, "2 distinct budgets of compute"),
    "narrow": ((np.geomspace(1e12, 5e12, 6), law(np.geomspace(1e12, 5e12, 6))), {}, "spans a factor of 5"),
    "rising": ((SIZES, law(SIZES)[::-1]), {}, "do not fall with compute"),
    "empty": (([], []), {}, "0 distinct budgets of compute"),
    "method": ((SIZES, law(SIZES)), {"method": "magic"}, "least_squares, huber"),
    "confidence": ((SIZES, law(SIZES)), {"confidence": 1.0}, "must be in (0, 1)"),
    "draws": ((SIZES, law(SIZES)), {"draws": 3}, "draws=3"),
    "delta": ((SIZES, law(SIZES)), {"huber_delta": 0.0}, "huber_delta=0.0"),
    "groups": ((SIZES, law(SIZES)), {"groups": [1, 2]}, "2 groups name 7 points"),
    "one-group": ((SIZES, law(SIZES)), {"groups": [1, 1, 2, 2, 3, 3, 3]}, "3 groups of runs"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_why_in_one_line(case):
    data, options, message = REFUSALS[case]
    with pytest.raises(UserError) as error:
        fit.fit_power_law(*data, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", fit_methods())
def test_a_law_without_a_floor_is_refused(method):
    """Losses that fall ever faster in log-log: the best L_inf is 0 or less."""
    loss = 10.0 - 0.2 * np.log(SIZES) - 0.004 * np.log(SIZES / SIZES[0]) ** 2
    with pytest.raises(UserError, match=r"L_inf is at its bound"):
        fit.fit_power_law(SIZES, loss, method=method, draws=50)


@pytest.mark.parametrize("method", fit_methods())
def test_noise_that_hides_the_floor_is_refused_or_the_interval_holds_it(method):
    refused, missed, unseen = 0, 0, 0
    for seed in range(12):
        noise = 0.01 * np.random.default_rng(seed).normal(size=7)
        loss = (3.0 * (SIZES / 1e12) ** -0.05 + 0.3) * np.exp(noise)
        try:
            found = fit.fit_power_law(SIZES, loss, method=method, draws=100)
            low, high = found.intervals["l_inf"]
            missed += not low <= 0.3 <= high
            unseen += not found.floor_seen
            assert found.floor_seen == (low > 0)
        except UserError as error:
            refused += 1
            assert "bound" in str(error)
    assert refused >= 4
    assert missed <= 1


@pytest.mark.parametrize("method", fit_methods())
def test_a_law_with_a_bounded_exponent_stands_though_its_floor_may_be_zero(method):
    """Losses of a pure power law but for a small floor: b is known well, and that it levels off is not."""
    compute = np.repeat(np.geomspace(1e10, 1e16, 9), 2)
    loss = (3.0 * (compute / 1e10) ** -0.1 + 0.15) * np.exp(0.02 * np.random.default_rng(0).normal(size=18))
    found = fit.fit_power_law(compute, loss, method=method, draws=200)
    assert found.intervals["l_inf"][0] == 0.0 and not found.floor_seen
    assert found.intervals["b"][0] < -0.1 < found.intervals["b"][1] < 0


STEPS = (
    np.array([4.0, 3.0, 3.001, 2.999, 3.0005, 2.9995, 3.0]),
    np.array([5.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]),
)


@pytest.mark.parametrize("method", fit_methods())
@pytest.mark.parametrize("loss", STEPS, ids=("noisy", "exact"))
def test_an_exponent_without_bound_is_refused(method, loss):
    with pytest.raises(UserError, match="the exponent b has no bound"):
        fit.fit_power_law(SIZES, loss, method=method, draws=50)


def test_one_outlier_that_least_squares_refuses_is_none_to_huber():
    loss = law(SIZES) * np.exp(0.002 * np.random.default_rng(0).normal(size=7))
    loss[3] *= 1.05
    with pytest.raises(UserError, match="L_inf has no lower bound"):
        fit.fit_power_law(SIZES, loss)
    assert fit.fit_power_law(SIZES, loss, method="huber", draws=50).l_inf == pytest.approx(TRUTH[2], abs=0.1)
    loss[3] *= 2
    with pytest.raises(UserError, match="the exponent b has no bound: draws of the noise put it between"):
        fit.fit_power_law(SIZES, loss, method="huber", draws=50)


@pytest.mark.parametrize("seed", range(5))
def test_an_interval_holds_its_estimate_though_there_is_no_noise(seed):
    compute = SIZES * np.exp(np.random.default_rng(seed).normal(size=7))
    found = fit.fit_power_law(compute, law(compute))
    for name, (low, high) in found.intervals.items():
        assert low <= getattr(found, name) <= high
    for low, high in (found.law_interval(1e17), found.predict_interval(1e17)):
        assert low <= found.predict(1e17) <= high


@pytest.mark.parametrize("compute", [0.0, -1.0, np.inf, np.nan])
def test_prediction_needs_a_compute(compute):
    with pytest.raises(UserError, match="to predict for"):
        fit.fit_power_law(*sweep()).predict(compute)
