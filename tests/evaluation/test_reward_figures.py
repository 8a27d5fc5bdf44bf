"""The figures of rewards show the numbers that they are given."""

import contextlib

import numpy as np
import pytest
from matplotlib.figure import Figure

from llm_jax.evaluation import figures, reward_figures
from llm_jax.evaluation.rewards import (
    LLAMA2_STRENGTHS,
    Accuracies,
    CalibrationBin,
    LengthBias,
    Proportion,
    Trained,
    histogram,
)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a figure, checks its file, and gives its axes."""
    kept = []

    @contextlib.contextmanager
    def keep(*arguments):
        with figures.figure(*arguments) as axes:
            kept.append(axes)
            yield axes

    monkeypatch.setattr(reward_figures, "figure", keep)

    def draw(function, *arguments, **options):
        path = tmp_path / "figures" / f"{function.__name__}.png"
        function(*arguments, path, **options)
        assert path.read_bytes().startswith(b"\x89PNG")
        return kept.pop()

    return draw


def curves(axes):
    """Of each labelled line with error bars: (x, y, lower end, upper end) of its points."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        ends = np.array(bars.get_segments())[:, :, 1]
        found[container.get_label()] = np.column_stack([line.get_xdata(), line.get_ydata(), ends]).astype(float)
    return found


def of_one_run(x, proportion):
    return [x, 100 * proportion.share, *(100 * end for end in proportion.interval())]


HALF, MOST, ALL = Proportion(50, 100), Proportion(70, 100), Proportion(100, 100)


def test_accuracy_by_strength(drawn):
    rows = {
        "one": [Accuracies(MOST, {1: HALF, 2: MOST, 4: ALL})],
        "seeds": [Accuracies(MOST, {1: HALF, 4: MOST}), Accuracies(MOST, {1: MOST, 4: ALL})],
    }
    axes = drawn(reward_figures.accuracy_by_strength, rows, LLAMA2_STRENGTHS)
    found = curves(axes)
    expected = [of_one_run(strength - 0.05, p) for strength, p in ((1, HALF), (2, MOST), (4, ALL))]
    np.testing.assert_allclose(found["one"], expected)
    np.testing.assert_allclose(found["seeds"], [[1.05, 60, 50, 70], [4.05, 85, 70, 100]])
    assert [label.get_text().split()[0] for label in axes.get_xticklabels()] == [
        "Negligibly",
        "Slightly",
        "Significantly",
    ]


def test_calibration(drawn):
    axes = drawn(reward_figures.calibration, {"model": [CalibrationBin(0.55, HALF), CalibrationBin(0.8, MOST)]})
    np.testing.assert_allclose(curves(axes)["model"], [of_one_run(55, HALF), of_one_run(80, MOST)])


def test_score_histogram(drawn):
    found = histogram({"chosen": np.array([1.0, 2.0, 2.5]), "rejected": np.array([0.0])}, 3)
    axes = drawn(reward_figures.score_histogram, found, threshold=-1.7)
    outlines = [patch for patch in axes.patches if not patch.get_fill()]
    assert [patch.get_data().values.tolist() for patch in outlines] == [[0, 1, 2], [1, 0, 0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chosen (3)", "rejected (1)"]
    assert axes.lines[-1].get_xdata()[0] == -1.7


def test_length_bias(drawn):
    axes = drawn(reward_figures.length_bias, {"a": LengthBias(HALF, MOST, ALL), "b": LengthBias(MOST, HALF, ALL)})
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([50, 70, 100, 70, 50, 100])
    assert [bar.get_center()[0] for bar in axes.patches] == pytest.approx([-0.2, 0.8, 1.8, 0.2, 1.2, 2.2])
    assert axes.get_xticklabels()[0].get_text() == "shorter is better\n(100 pairs)"


def test_scaling(drawn):
    models = [
        Trained("large", 5_000_000, 1000, MOST),
        Trained("small", 1_000_000, 1000, HALF),
        Trained("small", 1_000_000, 1000, MOST),
        Trained("small", 1_000_000, 250, HALF),
    ]
    axes = drawn(reward_figures.scaling, models, baselines={"lexicon": 0.66})
    found = curves(axes)
    np.testing.assert_allclose(found["small (1M)"], [of_one_run(250, HALF), [1000, 60, 50, 70]])
    np.testing.assert_allclose(found["large (5M)"], [of_one_run(1000, MOST)])
    assert [line.get_ydata()[0] for line in axes.lines if line.get_label() == "lexicon"] == [66]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["250", "1k"]


def test_axes_are_the_house_style(drawn):
    axes = drawn(reward_figures.calibration, {"model": [CalibrationBin(0.55, HALF)]})
    assert isinstance(axes.figure, Figure) and not axes.spines["top"].get_visible()
