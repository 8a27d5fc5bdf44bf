"""Best and median of n samples against every subset there is, and the figures."""

import itertools
import math
import statistics

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.evaluation import best_of, tables

SAMPLES = 6
REWARDS = np.random.default_rng(0).normal(size=(3, SAMPLES)).astype(np.float32)


@pytest.mark.parametrize("drawn", range(1, SAMPLES + 1))
def test_expectations_are_the_means_over_all_subsets(drawn):
    for row, best, median in zip(REWARDS, best_of.best(REWARDS, drawn), best_of.median(REWARDS, drawn)):
        subsets = list(itertools.combinations(row.tolist(), drawn))
        assert math.isclose(best, statistics.fmean(map(max, subsets)), rel_tol=1e-6)
        assert math.isclose(median, statistics.fmean(map(statistics.median, subsets)), rel_tol=1e-6, abs_tol=1e-7)


def test_weights_are_probabilities():
    for drawn in range(1, SAMPLES + 1):
        weights = [best_of.order_weights(SAMPLES, drawn, place) for place in range(1, drawn + 1)]
        np.testing.assert_allclose([each.sum() for each in weights], 1)
        np.testing.assert_allclose(sum(weights), drawn / SAMPLES)  # each sample is drawn as often as any other


def test_a_curve_has_powers_of_two_and_all():
    found = best_of.curve(REWARDS)
    assert found.counts == (1, 2, 4, 6)
    assert found.best[0] == found.median[0]
    assert math.isclose(found.best[-1].mean, REWARDS.max(axis=1).mean(), rel_tol=1e-6)
    assert math.isclose(found.best[-1].error, REWARDS.max(axis=1).std(ddof=1) / math.sqrt(3), rel_tol=1e-6)
    means = [each.mean for each in found.best]
    assert means == sorted(means)


def test_more_than_there_are_is_refused():
    with pytest.raises(UserError, match="best of 7 cannot be told from 6"):
        best_of.best(REWARDS, 7)


def test_table_and_figures(tmp_path):
    curves = {name: {t: best_of.curve(REWARDS + shift) for t in (0.7, 1.0)} for name, shift in (("a", 0), ("b", 1))}
    table = best_of.table("Rewards", {f"{name} {t}": each for name, by in curves.items() for t, each in by.items()})
    assert len(table.rows) == 2 * 2 * 4 and "| b 1.0 | 6 |" in tables.as_markdown(table)
    best_of.draw_best_and_median({name: by[1.0] for name, by in curves.items()}, tmp_path / "best.png")
    best_of.draw_by_temperature(curves, tmp_path / "temperature.png")
    assert all((tmp_path / name).read_bytes()[1:4] == b"PNG" for name in ("best.png", "temperature.png"))
