"""Best of n against all ways to draw n of the samples, and the means and errors of points."""

import itertools
import math

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.evaluation import frontier
from llm_jax.evaluation.best_of import Estimate
from llm_jax.evaluation.frontier import Point

P, K = 3, 6


def start():
    generator = np.random.default_rng(0)
    paid, other = generator.normal(size=(2, P, K))
    other[1] = np.nan  # a prompt that this referee does not judge
    return {"kl": np.zeros((P, K)), "paid": paid, "other": other, "distinct_2": np.ones(P)}


def test_the_best_of_n_is_that_of_all_draws():
    columns = start()
    for n, found in zip((1, 2, 4, 6), frontier.best_of_n(columns, "paid", (1, 2, 4, 6))):
        for name, prompts in (("paid", (0, 1, 2)), ("other", (0, 2))):
            means = [
                np.mean([
                    columns[name][p, max(drawn, key=lambda k, p=p: columns["paid"][p, k])]
                    for drawn in itertools.combinations(range(K), n)
                ])
                for p in prompts
            ]  # fmt: skip
            error = np.std(means, ddof=1) / math.sqrt(len(means))
            assert found.scores[name] == pytest.approx(Estimate(np.mean(means), error))
        assert found.kl.mean == pytest.approx(math.log(n) - 1 + 1 / n) and set(found.scores) == {"paid", "other"}
    with pytest.raises(UserError, match="best of 7 cannot be told from 6 samples"):
        frontier.best_of_n(columns, "paid", (7,))


def test_prompts_without_a_paid_reward_have_no_best_of_n():
    columns = {
        "kl": np.zeros((2, 2)),
        "paid": np.array([[0.0, 1.0], [np.nan, np.nan]]),
        "other": np.arange(4.0).reshape(2, 2),
    }
    (found,) = frontier.best_of_n(columns, "paid", (2,))
    assert found.scores["other"].mean == 1.0


def test_the_kl_of_the_best_of_n_over_many_equally_likely_samples_is_at_the_bound():
    count, n = 100_000, 16  # the i-th best is the best of n with probability ((i + 1)^n - i^n) / count^n
    edges = (np.arange(count + 1) / count) ** n
    probabilities = np.diff(edges)
    kept = probabilities[probabilities > 0]
    assert frontier.best_of_n_kl(n) == pytest.approx(float(np.sum(kept * np.log(kept * count))), abs=1e-3)


def test_errors_are_over_seeds_or_prompts():
    runs = [{"kl": np.full((2, 2), k), "other": np.array([[0, 2 * k], [np.nan, np.nan]])} for k in (1.0, 2.0, 6.0)]
    found = frontier.point("PPO", "0.1", runs)
    assert found == Point("PPO", "0.1", Estimate(3, pytest.approx(math.sqrt(7 / 3))), {"other": found.kl})
    alone = frontier.point("PPO", "0.1", [{"kl": np.array([[1.0, 3], [4, 4]]), "x": np.array([1.0, 2])}])
    assert alone.kl == Estimate(3, 1) and alone.scores["x"] == Estimate(1.5, 0.5)


def test_the_table_and_the_figure(tmp_path):
    points = [*frontier.best_of_n(start(), "paid", (1, 4)), frontier.point("PPO", "beta 0.1", [start(), start()])]
    names = {"paid": "reward", "distinct_2": "distinct-2"}
    found = frontier.table("Reward by distance", points, names, ("a note",))
    assert found.headings == ("method", "setting", "KL (nats)", "reward", "distinct-2")
    assert [row[:3] for row in found.rows] == [
        ("best of n", "n = 1", "0.00"),
        ("best of n", "n = 4", "0.64"),
        ("PPO", "beta 0.1", "0.00"),
    ]
    assert [row[4] for row in found.rows] == ["", "", "1.00"]
    frontier.draw(points, names, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 5000


def line(*rows):
    return [
        Point("PPO", f"{kl:g}", Estimate(kl, 0), {"paid": Estimate(paid, 0.1), "other": Estimate(other, 0.1)})
        for kl, paid, other in rows
    ]


def test_the_best_within_a_distance():
    points = line((1, 1, 0), (3, 2.5, 0), (4, 2, 0), (9, 5, 0))
    assert frontier.best_within(points, "paid", 4) is points[1] and frontier.best_within(points, "paid", 0.5) is None


def test_over_optimisation_starts_where_what_is_not_paid_is_highest():
    points = line((0, 0, 0), (2, 1, 1), (5, 2, 0.8), (9, 3, 0.2), (12, 3.5, 0.6))
    assert frontier.turn(points, "paid", "other") == (points[1], points[3])
    assert frontier.turn(points[:3], "paid", "other") is None  # 0.2 less, which is not two errors of the difference
    assert frontier.turn(line((0, 3, 1), (2, 1, 0)), "paid", "other") is None  # both fall
