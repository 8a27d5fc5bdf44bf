"""Frontiers and IsoFLOP parabolas: against brute force and against a law whose optimum is known by calculus."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import optimize

from llm_jax.errors import UserError
from llm_jax.scaling import fit, recovery
from llm_jax.scaling.trial import TrialResult

CHINCHILLA = recovery.ParametricScenario("known", noise=0.0)


def curve_of(result: TrialResult, losses: list[float]) -> TrialResult:
    """The trial with these losses at even steps."""
    count = len(losses)
    curve = tuple((result.tokens * (index + 1) // count, loss) for index, loss in enumerate(losses))
    return dataclasses.replace(result, curve=curve, loss=losses[-1])


def crossing() -> list[TrialResult]:
    """A small model, better at first, and a large one, better from some compute on; 100 to 400 and 200 to 800."""
    small = curve_of(recovery.trial(1, 400 / 6 * 6, 3.2), [4.0, 3.5, 3.4, 3.38])
    large = curve_of(recovery.trial(2, 800 / 6 * 3, 2.9), [4.2, 3.45, 3.1, 2.9])
    return [small, large]


def test_frontier_is_the_envelope_of_two_crossing_curves():
    found = fit.frontier(crossing())
    # Computes 600 n for the small model's quarters and 1200 n for the large one's: by hand, interpolating in log C.
    assert [(point.size, point.loss) for point in found.points] == [
        ("n1", 4.0),
        ("n1", 3.5),
        ("n1", 3.4),
        ("n1", 3.38),
        ("n2", 3.1),
        ("n2", 2.9),
    ]
    assert [point.at_end for point in found.points] == [False, False, False, True, False, True]
    assert "learning rate that had not decayed" in found.bias
    assert found.groups[-1] == found.points[-1].name


def test_frontier_of_many_curves_is_what_brute_force_keeps():
    generator = np.random.default_rng(0)
    results = []
    for size in range(6):
        losses = 2 + 3 * np.exp(-np.arange(1, 9) / (2 + size)) + 0.3 / (size + 1) + 0.05 * generator.random(8)
        results.append(curve_of(recovery.trial(3**size, 8000, 1.0), sorted(losses.tolist(), reverse=True)))
    kept = []
    for mine in results:
        for tokens, loss in mine.curve:
            at = np.log(mine.compute * tokens / mine.tokens)
            beaten = False
            for other in results:
                x = np.log([other.compute * t / other.tokens for t, _ in other.curve])
                y = np.array([value for _, value in other.curve])
                beaten |= bool(np.any((x <= at + 1e-12) & (y < loss)))
                beaten |= bool(x[0] <= at <= x[-1] and np.interp(at, x, y) < loss - 1e-9)
            if not beaten:
                kept.append((float(np.exp(at)), loss))
    found = fit.frontier(results)
    np.testing.assert_allclose([(p.compute, p.loss) for p in found.points], sorted(kept), rtol=1e-9)
    assert len(kept) < 48


def test_ends_only_compares_ends_with_ends():
    found = fit.frontier(crossing(), ends_only=True)
    assert [point.loss for point in found.points] == [3.38, 2.9]
    assert found.bias == ""
    worse = curve_of(recovery.trial(3, 4000, 3.0), [3.6, 3.0])
    assert [p.loss for p in fit.frontier([*crossing(), worse], ends_only=True).points] == [3.38, 2.9]


def test_frontier_averages_seeds_and_ignores_order():
    lucky = dataclasses.replace(curve_of(crossing()[0], [3.0, 2.5, 2.4, 2.38]), seed=1, name="other")
    found = fit.frontier([lucky, *crossing()])
    assert found.points[0].loss == pytest.approx((4.0 + 3.0) / 2)
    assert found == fit.frontier([*crossing(), lucky])


def test_frontier_of_nothing_is_refused():
    with pytest.raises(UserError, match="no trials"):
        fit.frontier([])


def budgets(noise: float = 0.0, sizes: int = 7, seed: int = 0, seeds: int = 1) -> list[TrialResult]:
    """Trials of known L(N, D) at four budgets about their best sizes."""
    generator = np.random.default_rng(seed)
    results = []
    for compute in np.geomspace(1e19, 1e21, 4):
        best, _ = lagrange(compute)
        for size in best * np.geomspace(0.25, 4, sizes):
            for each in range(seeds):
                loss = CHINCHILLA.loss(size, compute / 6 / size) * np.exp(noise * generator.normal())
                results.append(recovery.trial(size, compute / 6 / size, float(loss), each))
    return results


def lagrange(compute: float) -> tuple[float, float]:
    """The best N and D under 6ND = C, by numeric minimisation over log N."""
    found = optimize.minimize_scalar(
        lambda log_n: CHINCHILLA.loss(np.exp(log_n), compute / 6 / np.exp(log_n)),
        bounds=(np.log(1e6), np.log(1e13)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return float(np.exp(found.x)), float(found.fun)


def test_parabolas_find_the_known_optima():
    found = fit.isoflop(budgets())
    assert found.problems == () and found.convention == "all"
    for budget in found.budgets:
        size, loss = lagrange(budget.compute)
        assert budget.parameters_optimum == pytest.approx(size, rel=0.05)  # the law is no exact parabola
        assert budget.tokens_optimum == pytest.approx(budget.compute / 6 / budget.parameters_optimum, rel=1e-3)
        assert budget.loss_minimum == pytest.approx(loss, rel=1e-3)
    exponent = CHINCHILLA.beta / (CHINCHILLA.alpha + CHINCHILLA.beta)
    assert found.parameters_law.exponent == pytest.approx(exponent, abs=0.005)
    assert found.tokens_law.exponent == pytest.approx(1 - exponent, abs=0.005)
    assert found.parameters_law.at(1e20) * found.tokens_law.at(1e20) == pytest.approx(1e20 / 6, rel=0.01)


def test_exact_parabolas_are_recovered():
    results = []
    for compute, best in ((1e18, 1e8), (1e20, 1e9)):
        for size in best * np.array([0.3, 0.7, 1.5, 4.0]):
            loss = 2.5 + 0.02 * np.log(size / best) ** 2
            results.append(recovery.trial(size, compute / 6 / size, float(loss)))
    found = fit.isoflop(results)
    assert [budget.parameters_optimum for budget in found.budgets] == pytest.approx([1e8, 1e9], rel=1e-6)
    assert [budget.loss_minimum for budget in found.budgets] == pytest.approx([2.5, 2.5])
    assert found.parameters_law.exponent == pytest.approx(0.5)
    low, high = found.parameters_law.interval
    assert low <= 0.5 + 1e-6 and high - low < 1e-4


def test_intervals_of_the_exponent_cover():
    """60 sweeps: the share of 95 % intervals that hold the exponent, within a binomial's four standard errors."""
    exponent = fit.isoflop(budgets()).parameters_law.exponent
    held = 0
    for seed in range(60):
        low, high = fit.isoflop(budgets(0.002, seed=seed), draws=200).parameters_law.interval
        held += low <= exponent <= high
    assert held / 60 > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 60)


def test_intervals_are_the_seeds_own_and_trials_may_come_in_any_order():
    results = budgets(0.002)
    one = fit.isoflop(results, draws=100)
    assert fit.isoflop(results[::-1], draws=100) == one
    assert fit.isoflop(results, draws=100, seed=1).parameters_law.interval != one.parameters_law.interval
    json.dumps(dataclasses.asdict(one))


def test_embeddings_can_be_left_out():
    results = [dataclasses.replace(each, parameters=2 * each.parameters) for each in budgets()]
    found = fit.isoflop(results, embeddings=False)
    assert found.convention == "non_embedding"
    assert found.budgets == fit.isoflop(budgets()).budgets


def test_three_sizes_have_no_intervals_and_say_so():
    found = fit.isoflop(budgets(sizes=3))
    assert found.parameters_law.interval is None and found.budgets[0].intervals == {}
    assert "three sizes" in found.problems[0]


def test_budgets_without_a_minimum_inside_are_left_out_and_named():
    results = budgets()
    low = min(each.compute for each in results)
    inner = [r for r in results if r.compute > 2 * low or r.parameters > 1.5 * lagrange(low)[0]]
    found = fit.isoflop(inner)
    assert len(found.budgets) == 3
    assert "is not between" in found.problems[0]
    with pytest.raises(UserError, match=r"^two budgets"):
        fit.isoflop([r for r in results if r.compute < 2 * low])
    with pytest.raises(UserError, match="2 sizes, of 3"):
        fit.isoflop(budgets(sizes=2))
    with pytest.raises(UserError, match="there are no trials"):
        fit.isoflop([])


def worse(trial: TrialResult) -> TrialResult:
    """The trial at a bad learning rate."""
    return dataclasses.replace(trial, name=f"{trial.name}-worse", learning_rate=1.0, loss=trial.loss * 1.2)


def test_a_worse_variant_of_a_size_does_not_bend_the_parabolas():
    results = budgets(0.002)
    one, two = fit.isoflop(results, draws=50), fit.isoflop([*results, *map(worse, results[::3])], draws=50)
    assert two.budgets == one.budgets
    assert "variant or learning rate" in two.problems[0]


@pytest.mark.parametrize(
    "change, options, message",
    [({"loss": float("nan")}, {}, "has the loss nan"), ({"loss": 0.0}, {}, "has the loss 0.0"),
     ({}, {"confidence": 2}, "confidence 2 must"), ({}, {"confidence": float("nan")}, "confidence nan must")],
)  # fmt: skip
def test_what_parabolas_cannot_be_fitted_to_is_refused_in_one_line(change, options, message):
    results = budgets(0.002)
    results[3] = dataclasses.replace(results[3], **change)
    with pytest.raises(UserError, match=message) as error:
        fit.isoflop(results, draws=50, **options)
    assert "\n" not in str(error.value)
