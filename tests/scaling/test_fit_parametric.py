"""L(N, D): published constants, the compute optimum by calculus, repeated data, refusals; and forms compared."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from scipy import optimize

from llm_jax.errors import UserError
from llm_jax.scaling import fit, fit_huber, fit_terms, recovery

KNOWN = recovery.ParametricScenario("known", noise=0.0)
NOISY = recovery.ParametricScenario("noisy", noise=0.004)
GENERATOR = np.random.default_rng(0)
EXACT = fit.parametric(recovery.trials(KNOWN, GENERATOR), draws=50)


def repeated(worth: float, noise: float = 0.0, seed: int = 0):
    """Trials that read their data 1, 4, 16 and 40 times, by the formula of Muennighoff et al."""
    generator = np.random.default_rng(seed)
    results = []
    for size in np.geomspace(1e7, 3e9, 4):
        for tokens in np.geomspace(2e8, 6e10, 3):
            for epochs in (1, 4, 16, 40):
                unique = tokens / epochs
                effective = unique + unique * worth * (1 - np.exp(-(epochs - 1) / worth))
                loss = KNOWN.loss(size, effective) * np.exp(noise * generator.normal())
                result = recovery.trial(size, tokens, float(loss))
                results.append(dataclasses.replace(result, unique_tokens=round(unique), name=f"{result.name}-{epochs}"))
    return results


def test_published_constants_come_back():
    for name in ("e", "a", "b", "alpha", "beta"):
        assert getattr(EXACT, name) == pytest.approx(getattr(KNOWN, name), rel=1e-5), name
    assert EXACT.repetitions is None
    assert EXACT.predict(7e10, 1.4e12) == pytest.approx(KNOWN.loss(7e10, 1.4e12), rel=1e-6)


def test_solver_finds_what_lbfgs_finds_from_many_starts():
    """Hoffmann et al.'s own way: L-BFGS from a grid of starts, on a log-sum-exp and the Huber loss."""
    results = recovery.trials(NOISY, np.random.default_rng(1))
    n, d, loss = (np.log([getattr(r, name) for r in results]) for name in ("parameters", "tokens", "loss"))

    def objective(theta):
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * (n - n.mean()), b - beta * (d - d.mean()), np.full_like(n, e)])
        top = terms.max(axis=0)
        r = np.abs(loss - top - np.log(np.exp(terms - top).sum(axis=0)))
        return 1e3 * np.sum(np.where(r < 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)))

    starts = [
        (a, b, e, x, y) for a in (-1, 0) for b in (-1, 0) for e in (0, 0.5) for x in (0.2, 0.6) for y in (0.2, 0.6)
    ]
    best = min(optimize.minimize(objective, start, method="L-BFGS-B").fun for start in starts)
    found = fit.parametric(results, draws=50)
    mine = 1e3 * fit_huber.huber(np.array(found.residuals), 1e-3).sum()
    assert mine <= best * (1 + 1e-6)


@functools.cache
def costing(k: float, s: float):
    """The law of trials that cost k N^(1 + s) D FLOPs."""
    results = recovery.trials(KNOWN, GENERATOR)
    return fit.parametric(
        [dataclasses.replace(r, compute=k * r.parameters ** (1 + s) * r.tokens) for r in results], draws=40
    )


@pytest.mark.parametrize("compute", [1e18, 5.76e23])
@pytest.mark.parametrize("cost", [(6.0, 0.0), (90.0, -0.13), (2.0, 0.05)])
def test_optimum_is_the_numeric_minimum(compute, cost):
    k, s = cost
    law = costing(k, s)
    assert law.cost == (pytest.approx(k, rel=1e-6), pytest.approx(s, abs=1e-8))
    found = law.optimum(compute)
    numeric = optimize.minimize_scalar(
        lambda log_n: law.predict(float(np.exp(log_n)), float(compute / k / np.exp(log_n * (1 + s)))),
        bounds=(np.log(1e5), np.log(1e14)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert found.parameters == pytest.approx(np.exp(numeric.x), rel=1e-4)
    assert found.loss == pytest.approx(numeric.fun, rel=1e-9)
    assert k * found.parameters ** (1 + s) * found.tokens == pytest.approx(compute)
    ratio = law.optimum(100 * compute).parameters / found.parameters
    assert ratio == pytest.approx(100**law.parameters_exponent)
    low, high = law.intervals["parameters_exponent"]
    assert low - 1e-6 <= law.parameters_exponent <= high + 1e-6


def test_optimum_at_six_flops_is_hoffmanns():
    """Equation 4: G (C / 6)^(beta / (alpha + beta)), G = (alpha A / (beta B))^(1 / (alpha + beta))."""
    g = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    found = EXACT.optimum(5.76e23)
    assert found.parameters == pytest.approx(g * (5.76e23 / 6) ** (0.28 / 0.62), rel=1e-4)
    assert found.tokens == pytest.approx((5.76e23 / 6) ** (0.34 / 0.62) / g, rel=1e-4)


@pytest.mark.parametrize("compute", [0, -1.0, float("nan"), float("inf")])
def test_optimum_of_no_compute_is_refused(compute):
    with pytest.raises(UserError, match="must be positive and finite"):
        EXACT.optimum(compute)


def test_more_compute_goes_to_size_by_its_exponent():
    ratio = EXACT.optimum(1e22).parameters / EXACT.optimum(1e20).parameters
    assert ratio == pytest.approx(100 ** (0.28 / 0.62), rel=1e-4)


def test_order_units_and_seed():
    results = recovery.trials(NOISY, np.random.default_rng(2))
    one = fit.parametric(results, draws=60)
    assert fit.parametric(results[::-1], draws=60) == one
    assert fit.parametric(results, draws=60, seed=1).intervals != one.intervals
    many = [dataclasses.replace(r, parameters=1000 * r.parameters) for r in results]
    scaled = fit.parametric(many, draws=60)
    assert scaled.a == pytest.approx(one.a * 1000**one.alpha, rel=1e-4)
    for name in ("e", "b", "beta", "alpha"):
        assert getattr(scaled, name) == pytest.approx(getattr(one, name), rel=1e-4)
    json.dumps(dataclasses.asdict(one))
    other = fit.parametric(many, draws=60, embeddings=False)
    assert other.convention == "non_embedding" and other.a == pytest.approx(one.a)


def test_interval_of_a_new_run_is_wider_than_its_noise():
    law = fit.parametric(recovery.trials(NOISY, np.random.default_rng(3)), draws=400)
    low, high = law.predict_interval(1e9, 2e10)
    middle = law.predict(1e9, 2e10)
    assert low < middle < high
    assert 0.002 < law.noise < 0.007
    assert high - low > 2 * 1.9 * law.noise * middle
    far = law.predict_interval(1e13, 2e14)
    assert np.log(far[1] / far[0]) > np.log(high / low)


def test_worth_of_repetition_comes_back():
    found = fit.parametric(repeated(15.4), draws=50)
    assert found.repetitions == pytest.approx(15.4, rel=1e-3)
    assert found.alpha == pytest.approx(0.34, rel=1e-3)
    once, often = found.predict(1e9, 1e10), found.predict(1e9, 1e10, 1e8)
    assert once < often < found.predict(1e9, 1e8)
    noisy = fit.parametric(repeated(15.4, 0.003, seed=1), draws=100)
    low, high = noisy.intervals["repetitions"]
    assert low < 15.4 < high and high / low < 4


def test_effective_tokens_at_their_limits():
    unique = np.array([1e6])
    assert fit_terms.effective_tokens(unique, unique, 15.0)[0] == 1e6
    assert fit_terms.effective_tokens(1e12 * unique, unique, 15.0)[0] == pytest.approx(16e6)
    # A first repetition is worth nearly as much as new data.
    assert fit_terms.effective_tokens(1.01 * unique, unique, 15.0)[0] == pytest.approx(1.01e6, rel=1e-5)


def test_derivatives_match_differences():
    n, d = np.array([1e7, 1e8, 1e9]), np.array([1e9, 3e9, 1e9])
    terms = fit_terms.parametric_terms(n, d, d / np.array([1, 5, 30]), (18.0, 21.0), True)
    theta = np.array([[0.5, -1.0, 0.3, -0.5, 0.25, np.log(8.0)]])
    _, slope = fit_huber._linearise(terms, theta, np.zeros((1, 3)))
    for index in range(6):
        step = np.eye(6)[index] * 1e-6
        numeric = (fit_huber.log_loss(terms, theta + step) - fit_huber.log_loss(terms, theta - step)) / 2e-6
        np.testing.assert_allclose(slope[0, :, index], numeric[0], rtol=1e-5, atol=1e-9)


def refused(results, message: str, **options) -> None:
    with pytest.raises(UserError) as error:
        fit.parametric(results, **{"draws": 60, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_refusals():
    results = recovery.trials(KNOWN, np.random.default_rng(0))
    refused([r for r in results if r.parameters < 4e7], "2 sizes cannot tell")
    refused([r for r in results if r.tokens < 2e9], "2 token counts cannot tell")
    refused([], "0 sizes cannot tell")
    refused([dataclasses.replace(r, loss=float("nan")) for r in results], "has the loss nan, which is not positive")
    refused(results, "draws=3", draws=3)
    refused(results, "confidence 2 must", confidence=2)
    refused(results, "huber_delta=0", huber_delta=0)
    refused([dataclasses.replace(r, compute=0.0) for r in results], "the compute of 40 trials")
    refused([dataclasses.replace(r, compute=6.0 * r.tokens / r.parameters) for r in results], "costs no more")
    line = [recovery.trial(n, 20 * n, KNOWN.loss(n, 20 * n)) for n in np.geomspace(1e7, 1e9, 9)]
    refused(line, "tokens follow the size too closely")
    few = [r for r in results if r.parameters > 3e8 and r.tokens > 1e9 and r.seed == 0][:5]
    refused([*few[:2], few[4]], "sizes cannot tell")
    floorless = [dataclasses.replace(r, loss=r.loss - 1.69) for r in results]
    refused(floorless, "its bound")


@pytest.mark.parametrize("seed", range(6))
def test_losses_that_do_not_fall_are_refused(seed):
    """Where a term is absent, rounding alone says what its exponent is; with noise, chance does."""
    results = recovery.trials(KNOWN, np.random.default_rng(0))
    rounding = 1 + (2e-16, 1e-3)[seed % 2] * np.random.default_rng(seed).standard_normal(len(results))
    for name, constant, axis, exponent in (("alpha", 410.7, "tokens", 0.28), ("beta", 406.4, "parameters", 0.34)):
        losses = [1.69 + constant / getattr(result, axis) ** exponent for result in results]
        flat = [dataclasses.replace(r, loss=loss * f) for r, loss, f in zip(results, losses, rounding)]
        refused(flat, f"{name} may be 0")


def test_repetition_that_is_not_seen_is_refused():
    """Two epochs at most, of one size: noise hides what the second is worth."""
    results = recovery.trials(NOISY, np.random.default_rng(4))
    results[0] = dataclasses.replace(results[0], unique_tokens=results[0].tokens // 2)
    refused(results, "R_D")


def test_a_little_repetition_counts_as_new_data():
    results = recovery.trials(NOISY, np.random.default_rng(4))
    little = [dataclasses.replace(r, unique_tokens=round(r.tokens / 1.2)) for r in results]
    assert fit.parametric(little, draws=50) == fit.parametric(results, draws=50)


def test_prediction_is_refused_for_what_was_not_fitted():
    for arguments in ((0.0, 1e9), (1e9, float("nan")), (1e9, 1e9, 2e9), (1e9, 1e9, 1e8)):
        with pytest.raises(UserError):
            EXACT.predict(*arguments)


def efficient_sweep(noise: float = 0.002, seed: int = 0):
    """Compute-optimal trials over four decades, and at each compute one too small and one too large."""
    generator = np.random.default_rng(seed)
    results = []
    for compute in np.geomspace(1e17, 1e21, 9):
        best = EXACT.optimum(compute)
        for factor in (0.3, 1.0, 3.0):
            size, tokens = best.parameters * factor, best.tokens / factor
            loss = KNOWN.loss(size, tokens) * np.exp(noise * generator.normal())
            result = recovery.trial(size, tokens, float(loss))
            half = (result.tokens // 2, float(KNOWN.loss(size, tokens / 2) * 1.02))
            results.append(dataclasses.replace(result, curve=(half, (result.tokens, result.loss))))
    return results


def test_forms_are_scored_on_what_they_have_not_seen():
    results = efficient_sweep()
    found = fit.compare(results, held_out_above=5e19)
    assert found.problems == ()
    assert found.fitted == 18 and len({score.trial for score in found.scores}) == 3
    assert found.errors["parametric L(N, D)"] < 0.01
    assert found.errors["power law"] < found.errors["power law without L_inf"] < found.errors["linear in log C"]
    names = {r.name: r for r in results}
    for score in found.scores:
        assert score.actual == names[score.trial].loss and score.compute > 5e19
        assert score.relative_error == pytest.approx(score.predicted / score.actual - 1)
    json.dumps(dataclasses.asdict(found))


def test_all_forms_are_scored_on_the_best_size_of_each_larger_budget():
    """A law of compute alone says nothing of sizes that are a bad choice."""
    results = efficient_sweep(noise=0.0)
    found = fit.compare(results, held_out_above=5e19)
    best = {min((r for r in results if r.compute == pytest.approx(c, rel=0.05)), key=lambda r: r.loss).name
            for c in np.geomspace(1e17, 1e21, 9)[6:]}  # fmt: skip
    for form in found.errors:
        assert {score.trial for score in found.scores if score.form == form} == best
    assert found.errors["power law"] < 1e-4


def test_straight_forms_are_polynomials():
    results = efficient_sweep()
    found = fit.compare(results, held_out_above=5e19)
    ends = fit.efficient([r for r in results if r.compute <= 5e19])
    assert len(ends) == 6
    x, y = np.log([r.compute for r in ends]), np.array([r.loss for r in ends])
    target = next(score for score in found.scores if score.form == "power law without L_inf")
    # An independent straight line, by its normal equations.
    slope = np.sum((x - x.mean()) * (np.log(y) - np.log(y).mean())) / np.sum((x - x.mean()) ** 2)
    expected = np.exp(np.log(y).mean() + slope * (np.log(target.compute) - x.mean()))
    assert target.predicted == pytest.approx(expected, rel=1e-9)


def test_held_out_trials_do_not_move_the_fit():
    results = efficient_sweep()
    spoiled = [dataclasses.replace(r, loss=3 * r.loss) if r.compute > 5e19 else r for r in results]
    one, other = (fit.compare(each, held_out_above=5e19) for each in (results, spoiled))
    assert [score.predicted for score in one.scores] == [score.predicted for score in other.scores]


def test_forms_that_cannot_be_fitted_are_named_and_the_rest_goes_on():
    results = [r for r in efficient_sweep() if r.compute > 4e18]
    found = fit.compare(results, held_out_above=2e20)
    assert any(problem.startswith("power law: ") for problem in found.problems)
    assert "linear in log C" in found.errors
    with pytest.raises(UserError, match="nothing to score"):
        fit.compare(results, held_out_above=1e30)
    with pytest.raises(UserError, match="nothing to fit"):
        fit.compare(results, held_out_above=1.0)


def test_a_worse_variant_of_a_size_does_not_move_the_law():
    results = recovery.trials(NOISY, np.random.default_rng(2))
    worse = [dataclasses.replace(r, name=f"{r.name}-x", varied=("a=1",), loss=r.loss * 1.2) for r in results[::3]]
    one, other = fit.parametric(results, draws=40), fit.parametric([*results, *worse], draws=40)
    assert dataclasses.replace(other, problems=()) == one
    assert "variant or learning rate" in other.problems[0]
