"""What is said of rewards, against SciPy, brute force, and rewards whose answer is known."""

import math

import numpy as np
import pytest
from scipy import stats

from llm_jax.errors import UserError
from llm_jax.evaluation import rewards
from llm_jax.evaluation.rewards import Accuracies, CalibrationBin, PairScores, Proportion, Trained


def scores(chosen, rejected, strengths=None, lengths=None):
    count = len(chosen)
    lengths = np.ones((2, count)) if lengths is None else np.array(lengths)
    strengths = np.ones(count, int) if strengths is None else np.array(strengths)
    return PairScores(np.array(chosen, np.float32), np.array(rejected, np.float32), strengths, *lengths)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize("right, total", [(0, 1), (1, 1), (0, 40), (40, 40), (7, 9), (545, 1000), (81_500, 100_000)])
def test_wilsons_interval_is_scipys(right, total, confidence):
    expected = stats.binomtest(right, total).proportion_ci(confidence, method="wilson")
    np.testing.assert_allclose(Proportion(right, total).interval(confidence), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("total", range(1, 60))
def test_wilsons_interval_holds_the_share_where_all_or_none_are_right(total):
    for right in (0, total):
        low, high = Proportion(right, total).interval()
        assert low <= right / total <= high


def test_nothing_has_no_share():
    assert math.isnan(Proportion(0, 0).share) and all(map(math.isnan, Proportion(0, 0).interval()))


def test_accuracy_by_strength_is_a_count():
    found = scores([3, 1, 5, 5, 0, 2], [1, 3, 5, 4, 1, 1], [1, 1, 3, 3, 3, 4])
    assert rewards.accuracy(found.gaps_N) == Proportion(3.5, 6)
    assert rewards.accuracy_by_strength(found) == {1: Proportion(1, 2), 3: Proportion(1.5, 3), 4: Proportion(1, 1)}


def test_swapping_all_pairs_turns_accuracy_around():
    draw = np.random.default_rng(0)
    chosen, rejected = draw.integers(0, 4, (2, 200)).astype(np.float32)
    there, back = scores(chosen, rejected), scores(rejected, chosen)
    np.testing.assert_array_equal(there.gaps_N, -back.gaps_N)
    assert rewards.accuracy(there.gaps_N).right + rewards.accuracy(back.gaps_N).right == 200
    for one, other in zip(rewards.calibration(there.gaps_N), rewards.calibration(back.gaps_N)):
        assert one.confidence == other.confidence and one.accuracy.share == pytest.approx(1 - other.accuracy.share)


def test_rewards_close_together_are_told_apart():
    """1 + 2^-20 and 1 differ in float32, and their difference must not be lost."""
    assert rewards.accuracy(scores([1 + 2**-20], [1]).gaps_N).share == 1


def test_length_bias():
    """A reward that is the length itself is right exactly where the longer response is better."""
    lengths = np.array([[3, 9, 4, 7, 7], [5, 2, 8, 7, 1]])
    bias = rewards.length_bias(scores(*lengths, lengths=lengths))
    assert bias.shorter_better == Proportion(0, 2)
    assert bias.longer_better == Proportion(2, 2)
    assert bias.same_length == Proportion(0.5, 1)


def brute_force_calibration(gaps, bins):
    found = {}
    for gap in gaps:
        confidence = 1 / (1 + math.exp(-abs(gap)))
        bin_ = next(i for i in range(bins) if confidence < 0.5 + (i + 1) * 0.5 / bins or i == bins - 1)
        found.setdefault(bin_, []).append((confidence, 0.5 if gap == 0 else float(gap > 0)))
    return [found[i] for i in sorted(found)]


def test_calibration_is_that_of_brute_force():
    gaps = np.concatenate([np.random.default_rng(1).normal(0, 3, 500), [0.0, 0.0, 50.0, -50.0]])
    curve, expected = rewards.calibration(gaps, 7), brute_force_calibration(gaps, 7)
    assert len(curve) == len(expected) == 7
    for one, members in zip(curve, expected):
        assert one.confidence == pytest.approx(np.mean([confidence for confidence, _ in members]))
        assert one.accuracy.right == sum(right for _, right in members)
        assert one.accuracy.total == len(members)
    error = sum(abs(sum(confidence - right for confidence, right in members)) for members in expected) / len(gaps)
    assert rewards.calibration_error(curve) == pytest.approx(error)


def test_rewards_that_the_preferences_were_drawn_by_are_calibrated():
    draw = np.random.default_rng(2)
    gaps = draw.normal(0, 2, 40_000)
    gaps = np.where(draw.random(len(gaps)) < 1 / (1 + np.exp(-gaps)), gaps, -gaps)
    for one in rewards.calibration(gaps):
        low, high = one.accuracy.interval(0.9999)
        assert low < one.confidence < high
    assert rewards.calibration_error(rewards.calibration(gaps)) < 0.01
    boasting = rewards.calibration(3 * gaps)
    assert all(one.accuracy.interval(0.9999)[1] < one.confidence for one in boasting[2:])
    assert rewards.calibration_error(boasting) > 0.1


def test_empty_bins_are_left_out():
    assert [one.accuracy.total for one in rewards.calibration(np.array([0.0, 100.0, 0.1]))] == [2, 1]


def test_histogram_counts_every_score_once_in_common_bins():
    groups = {"chosen": np.array([0.0, 1.0, 1.5, 4.0]), "rejected": np.array([-1.0, 0.1, 0.2])}
    found = rewards.histogram(groups, 5)
    assert found.edges.tolist() == [-1, 0, 1, 2, 3, 4]
    assert {name: counts.tolist() for name, counts in found.counts.items()} == {
        "chosen": [0, 1, 2, 0, 1], "rejected": [1, 2, 0, 0, 0],
    }  # fmt: skip


def test_spearman_is_scipys_with_ties():
    draw = np.random.default_rng(3)
    ratings = draw.integers(-4, 5, 300) / 2
    given = np.round(ratings + draw.normal(0, 2, 300), 1)
    found = rewards.spearman(given, ratings, draws=400)
    assert found.rho == pytest.approx(stats.spearmanr(given, ratings).statistic, abs=1e-12)
    assert found.texts == 300
    expected = stats.bootstrap(
        (given, ratings), lambda a, b: stats.spearmanr(a, b).statistic, paired=True, vectorized=False, n_resamples=400,
        method="percentile", rng=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.02)
    assert rewards.spearman(given, ratings, draws=400) == found
    narrow = rewards.spearman(given, ratings, draws=400, confidence=0.5)
    assert found.low < narrow.low < found.rho < narrow.high < found.high


def test_spearman_of_a_monotone_reward_is_one():
    ratings = np.arange(20.0)
    assert rewards.spearman(np.exp(ratings), ratings, draws=20)[:3] == pytest.approx((1, 1, 1))
    assert rewards.spearman(-ratings, ratings, draws=20)[:3] == pytest.approx((-1, -1, -1))


@pytest.mark.parametrize("threshold", [0.15, 0.5, 0.9])
def test_unsafe_recall_and_precision(threshold):
    draw = np.random.default_rng(5)
    unsafe = draw.random(200) < 0.3
    given = draw.normal(np.where(unsafe, -1.5, 1.0), 1.5).astype(np.float32)
    table = np.zeros((2, 2), int)
    for reward, label in zip(given.tolist(), unsafe):
        table[int(1 / (1 + math.exp(-reward)) < threshold), int(label)] += 1
    found = rewards.unsafe_detection(given, unsafe, threshold)
    assert found.recall == Proportion(table[1, 1], table[:, 1].sum())
    assert found.precision == Proportion(table[1, 1], table[1].sum())


def test_where_nothing_is_found_precision_is_unknown():
    found = rewards.unsafe_detection(np.array([3.0, 4.0]), np.array([True, False]), 0.15)
    assert found.recall == Proportion(0, 1) and math.isnan(found.precision.share)
    table = rewards.detection_table({"rule": [found]})
    assert table.rows == (("rule", "0.15", "0.0 (0.0 to 79.3)", ""),)


def accuracies(*by_strength):
    found = {strength: Proportion(right, total) for strength, right, total in by_strength}
    overall = Proportion(sum(p.right for p in found.values()), sum(p.total for p in found.values()))
    return Accuracies(overall, found)


RUNS = [accuracies((1, 50, 100), (2, 60, 100), (4, 90, 100)), accuracies((1, 54, 100), (2, 60, 100), (4, 80, 100))]


def test_accuracies_of_pairs():
    found = Accuracies.of(scores([1, 0, 2], [0, 1, 0], [1, 2, 2]))
    assert found == Accuracies(Proportion(2, 3), {1: Proportion(1, 1), 2: Proportion(1, 2)})


def test_llama2s_table():
    table = rewards.llama2_table({"no margin": RUNS[:1], "small": RUNS, "other": [accuracies((1, 5, 10))]})
    assert table.headings == ("reward", "Significantly Better", "Slightly Better", "Negligibly Better / Unsure", "Avg")
    assert table.rows == (
        ("no margin", "90.0 (82.6 to 94.5)", "60.0 (50.2 to 69.1)", "50.0 (40.4 to 59.6)", "66.7 (61.2 to 71.8)"),
        ("small", "85.0 ± 5.0", "60.0 ± 0.0", "52.0 ± 2.0", "65.7 ± 1.0"),
        ("other", "", "", "50.0 (23.7 to 76.3)", "50.0 (23.7 to 76.3)"),
    )
    assert table.notes[0].startswith(
        "Held-out pairs: 100 Significantly Better, 100 Slightly Better, 100 Negligibly Better / Unsure."
    )


def test_baichuan2s_table():
    table = rewards.baichuan2_table({"ours": [accuracies(*((gap, gap, 5) for gap in range(1, 6)))]})
    assert table.headings == ("reward", "gap 1", "gap 2", "gap 3", "gap 4", "gap 5", "all")
    assert [cell.split()[0] for cell in table.rows[0]] == ["ours", "20.0", "40.0", "60.0", "80.0", "100.0", "60.0"]
    with pytest.raises(UserError, match=r"no column for \[5\]"):
        rewards.llama2_table({"ours": [accuracies((5, 1, 2))]})


def test_scaling_table():
    models = [
        Trained("large", 5_000_000, 1000, Proportion(70, 100)),
        Trained("small", 1_000_000, 1000, Proportion(60, 100)),
        Trained("small", 1_000_000, 1000, Proportion(64, 100)),
        Trained("small", 1_000_000, 250, Proportion(55, 100)),
    ]
    table = rewards.scaling_table(models)
    assert table.headings == ("model", "parameters", "250 pairs", "1k pairs")
    assert table.rows == (
        ("small", "1M", "55.0 (45.2 to 64.4)", "62.0 ± 2.0"),
        ("large", "5M", "", "70.0 (60.4 to 78.1)"),
    )


def test_length_bias_table():
    lengths = np.array([[3, 9], [5, 2]])
    table = rewards.length_bias_table({"length": rewards.length_bias(scores(*lengths, lengths=lengths))})
    assert table.rows == (("length", "0.0 (0.0 to 79.3)", "100.0 (20.7 to 100.0)", ""),)


NAN, INFINITE = np.array([0.0, np.nan, 1.0]), np.array([0.0, 1.0, np.inf])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: scores(NAN, [0, 0, 0]), r"PairScores.chosen_N: 1 of 3 are not finite, the first at index 1"),
        (lambda: scores([0, 0, 0], INFINITE), r"PairScores.rejected_N: 1 of 3 .* index 2"),
        (lambda: scores([1, 2], [1, 2, 3]), r"rejected_N has the shape \(3,\); it must be \(2,\)"),
        (lambda: scores([1, 2], [0, 1], [0, 1]), "the steps of preference begin with 1"),
        (lambda: scores([], []), "no pairs of responses"),
        (lambda: rewards.accuracy(NAN), "accuracy: gaps of rewards: 1 of 3"),
        (lambda: rewards.calibration(NAN), "calibration: gaps of rewards: 1 of 3"),
        (lambda: rewards.histogram({"a": NAN}), "histogram: scores: 1 of 3"),
        (lambda: rewards.histogram({}), "no scores for a histogram"),
        (lambda: rewards.spearman(NAN, np.arange(3.0)), "Spearman: rewards: 1 of 3"),
        (lambda: rewards.spearman(np.arange(3.0), NAN), "Spearman: ratings: 1 of 3"),
        (lambda: rewards.spearman(np.ones(3), np.arange(3.0)), "all 3 rewards are the same"),
        (lambda: rewards.spearman(np.arange(2.0), np.arange(2.0)), "3 or more"),
        (lambda: rewards.spearman(np.arange(4.0), np.arange(3.0)), r"\(4,\) rewards and \(3,\) ratings"),
        (lambda: rewards.unsafe_detection(NAN, np.zeros(3, bool), 0.5), "unsafe detection: rewards: 1 of 3"),
        (lambda: rewards.unsafe_detection(np.zeros(3), np.zeros(2, bool), 0.5), r"\(3,\) rewards for \(2,\) labels"),
        (lambda: rewards.unsafe_detection(np.zeros(2), np.zeros(2, bool), 1.0), r"threshold 1\.0 is a probability"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_calibration_error_weighs_bins_by_their_pairs():
    curve = [CalibrationBin(0.9, Proportion(8, 10)), CalibrationBin(0.6, Proportion(24, 30))]
    assert rewards.calibration_error(curve) == pytest.approx((10 * 0.1 + 30 * 0.2) / 40)
