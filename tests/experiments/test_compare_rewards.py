"""Reward models side by side: seeds are joined, and every number of the tables is that of the runs' own files."""

import json
import math
import statistics

import numpy as np
import pytest

from experiments import compare_rewards, reward_report
from experiments.compare_rewards import CompareConfig
from experiments.reward_report import Judgement, Origin
from llm_jax.errors import UserError
from llm_jax.evaluation.rewards import Correlation, Detection, PairScores, Proportion

PAIRS = 40


def write(folder, model, pairs, seed, sources=("ratings_en",)):
    """A judged run with rewards drawn by `seed`; how many of its pairs of strength 1 and 2 are right."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    strengths = np.arange(PAIRS) % 2 + 1
    scores = {}
    for source in sources:
        chosen, rejected = generator.normal(0.5, 1, PAIRS), generator.normal(0, 1, PAIRS)
        scores[source] = PairScores(chosen, rejected, strengths, np.full(PAIRS, 3), 2 + 2 * (np.arange(PAIRS) % 4 > 0))
    detection = [Detection(0.5, Proportion(seed + 1, 10), Proportion(0, 0))]
    judgement = Judgement(scores, detection, {"movies": Correlation(0.1 * seed, 0.0, 1.0, 30)})
    reward_report.write(folder, judgement, Origin(model, {"a": 100, "b": 2000}.get(model[-1], 7), pairs))
    return [
        np.mean([np.mean((s.chosen_N > s.rejected_N)[s.strengths_N == strength]) for s in scores.values()])
        for strength in (1, 2)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compared")
    found = {}
    for seed in range(2):
        found["small", seed] = write(workdir / f"small_{seed}", "bases/a", 100, seed)
        found["large", seed] = write(workdir / f"large_{seed}", "bases/b", 400, seed + 3, ("en", "zh"))
    (workdir / "unfinished_0").mkdir()
    compare_rewards.run(CompareConfig(), workdir)
    return workdir, found


def rows(workdir):
    """The cells of all tables of comparison.md by title and name of the row."""
    found, title = {}, ""
    for line in (workdir / "comparison.md").read_text().replace("\\", "").splitlines():
        if line.startswith("## "):
            title = line
        elif line.startswith("| ") and "---" not in line:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(title, {})[cells[0]] = cells[1:]
    return found


def expected(values):
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def test_seeds_are_means_and_standard_errors(folder):
    workdir, found = folder
    accuracy, others, scaling = rows(workdir).values()
    for column in (0, 1):
        shares = [100 * found["small", seed][column] for seed in range(2)]
        assert accuracy["small"][column] == expected(shares)
    assert set(accuracy) == {"reward", "small", "large", "large, en", "large, zh"}
    # Both halves of the pairs have as many, so the accuracy over all is the mean of two.
    every = [100 * np.mean(found["small", seed]) for seed in range(2)]
    assert accuracy["small"][2] == scaling["a"][1] == expected(every)
    assert scaling["a"][0] == "100" and scaling["a"][2] == "" and scaling["b"][1] == ""
    assert scaling["b"][2] == expected([100 * np.mean(found["large", seed]) for seed in range(2)])
    named = dict(zip(others["reward"], others["small"]))
    assert named["seeds"] == "2" and named["unsafe recall at 0.5"] == expected([10.0, 20.0])
    assert named["Spearman, movies"] == "0.050 ± 0.050" and "unsafe precision at 0.5" not in named  # of nothing found


def test_files_of_a_comparison(folder):
    workdir = folder[0]
    kept = json.loads((workdir / "comparison.json").read_text())
    assert [len(runs) for runs in kept.values()] == [2, 2] and kept["large"][0]["training_pairs"] == 400
    assert all((workdir / f"{name}.png").stat().st_size for name in ("accuracy", "calibration", "scaling"))


def test_only_seeds_are_taken_for_seeds(tmp_path):
    """Not other amounts of data by their names, nor other rewards of one model and amount by the scaling table."""
    for name, pairs, seed in (("pairs_100", 100, 0), ("pairs_400", 400, 1)):
        write(tmp_path / "amounts" / name, "bases/a", pairs, seed)
    with pytest.raises(UserError, match=r"pairs_100 and pairs_400 .* 100 and 400 pairs"):
        compare_rewards.run(CompareConfig(), tmp_path / "amounts")
    for name, pairs, seed in (("none_0", 100, 0), ("large_0", 100, 1), ("more_0", 400, 2)):
        write(tmp_path / "rewards" / name, "bases/a", pairs, seed)
    compare_rewards.run(CompareConfig(), tmp_path / "rewards")
    assert len(rows(tmp_path / "rewards")) == 2 and not (tmp_path / "rewards" / "scaling.png").exists()


def test_seeds_may_begin_with_seeds_of_a_base(tmp_path):
    for name, pairs, seed in (("few_0", 100, 0), ("few_1", 100, 1), ("many_0", 400, 2), ("many_1", 400, 3)):
        write(tmp_path / name, f"base_{seed % 2}/best", pairs, seed)
    compare_rewards.run(CompareConfig(), tmp_path)
    *_, scaling = rows(tmp_path).values()
    assert set(scaling) == {"model", "base"} and scaling["base"][1].count("±") == scaling["base"][2].count("±") == 1


def test_some_runs_only_and_none(folder, tmp_path):
    assert {one.name for one in compare_rewards.runs_of(folder[0], "^la")} == {"large"}
    with pytest.raises(UserError, match="is no regular expression"):
        CompareConfig(only="(")
    with pytest.raises(UserError, match="holds no judged reward model"):
        compare_rewards.run(CompareConfig(), tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", "3"])
def test_a_damaged_evaluation_is_one_line(tmp_path, content):
    (tmp_path / "a_0").mkdir()
    (tmp_path / "a_0" / "evaluation.json").write_text(content)
    with pytest.raises(
        UserError, match=r"a_0/evaluation.json is damaged, or no evaluation of experiments.reward_model"
    ):
        compare_rewards.runs_of(tmp_path)
