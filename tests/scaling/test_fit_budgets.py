"""Trials grouped by budget, seed and variant, on grids in which the groups are known."""

import dataclasses

import pytest

from llm_jax.scaling import fit, fit_budgets, recovery
from llm_jax.scaling.trial import TrialResult

BEST = {1e18: 3e7, 1e20: 3e8}


def grid(sizes: tuple[float, ...]) -> list[TrialResult]:
    """Two budgets, each with these multiples of its best size."""
    trials = []
    for compute, best in BEST.items():
        for factor in sizes:
            size = best * factor
            trials.append(recovery.trial(size, compute / 6 / size, 2.5 + abs(factor - 1)))
    return trials


def test_a_budget_whose_best_size_lies_between_others_has_no_line():
    assert fit.edges(grid((0.5, 1.0, 2.0))) == []
    assert fit.edges([]) == []


@pytest.mark.parametrize(
    "sizes, words",
    [((1.0, 2.0, 3.0), "is the smallest tried: a smaller"), ((0.3, 0.5, 1.0), "is the largest tried: a larger"),
     ((1.0,), "only one size")],
)  # fmt: skip
def test_a_budget_whose_best_size_is_at_the_edge_is_named(sizes, words):
    lines = fit.edges(grid(sizes))
    assert len(lines) == 2
    for line, compute, size in zip(lines, ("1e+18", "1e+20"), ("n30000000", "n300000000"), strict=True):
        assert words in line and line.startswith(f"{compute} FLOPs") and size in line and "\n" not in line


def test_the_best_size_is_that_of_the_mean_over_seeds_at_any_rounding_of_the_steps():
    trials = [t for t in grid((0.5, 1.0, 2.0)) if t.compute < 1e19]
    lucky = dataclasses.replace(trials[0], name="lucky", seed=1, loss=2.4)  # mean with its other seed: 2.7
    rounded = [dataclasses.replace(t, compute=t.compute * (1 + 0.02 * i)) for i, t in enumerate(trials)]
    assert fit.edges([*trials, lucky]) == []
    assert fit.edges(rounded) == []


def test_budgets_are_told_apart_by_more_than_whole_steps():
    trials = [recovery.trial(n, 1e9, 2.0) for n in (1e7, 1.04e7, 1.06e7, 2e7)]
    assert [len(group) for group in fit_budgets.by_budget(trials[::-1])] == [2, 1, 1]


def variants() -> list[TrialResult]:
    """Two seeds of one size by weight decay: the best single run belongs to the worse one."""
    losses = {("a=0",): (2.0, 2.6), ("a=1",): (2.2, 2.1)}
    trial = recovery.trial(1e8, 1e9, 2.0)
    return [
        dataclasses.replace(trial, name=f"{varied}-s{seed}", varied=varied, seed=seed, loss=loss)
        for varied, own in losses.items()
        for seed, loss in enumerate(own)
    ]


def test_the_best_variant_is_that_of_the_mean_and_the_others_are_counted():
    other = recovery.trial(2e8, 1e9, 3.0)
    kept, lines = fit_budgets.best_variants([*variants(), other])
    assert sorted(trial.loss for trial in kept) == [2.1, 2.2, 3.0]
    assert len(lines) == 1 and lines[0].startswith("2 trials whose size")
    assert fit_budgets.best_variants(kept) == (kept, [])


def test_learning_rates_are_variants_and_repeats_only_if_they_are_not_fitted():
    trial = recovery.trial(1e8, 1e9, 2.0)
    slow = dataclasses.replace(trial, name="slow", learning_rate=1e-5, loss=2.5)
    again = dataclasses.replace(trial, name="again", unique_tokens=trial.tokens // 4, loss=2.2)
    assert fit_budgets.best_variants([slow, again, trial])[0] == [trial]
    assert fit_budgets.best_variants([slow, again, trial], keep_repeats=True)[0] == [trial, again]
