"""The figures of rewards, as PNG files: one function a figure, from what `evaluation/rewards.py` computes to a path."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from llm_jax.evaluation.figures import SERIES, figure, legend_beside
from llm_jax.evaluation.rewards import (
    CONFIDENCE,
    Accuracies,
    CalibrationBin,
    Histogram,
    LengthBias,
    Proportion,
    Trained,
)
from llm_jax.evaluation.tables import quantity

WIDTH, HEIGHT = 7.5, 4.2  # inches
GROUP = 0.8  # of the distance between two groups of bars that the bars take up
CHANCE = 50.0  # percent
REFERENCE = "#333333"
INTERVALS = f"{CONFIDENCE:.0%} interval (Wilson),\nor seeds' standard error"


def accuracy_by_strength(rows: Mapping[str, Sequence[Accuracies]], names: Mapping[int, str], path: Path) -> None:
    """Accuracy over the strength of preference, a line for each reward; `names` are those of the strengths."""
    with figure(path, WIDTH, HEIGHT, "Accuracy by strength of preference") as axes:
        for offset, (name, runs), colour in zip(_offsets(len(rows), 0.2), rows.items(), _colours()):
            strengths = sorted(set.intersection(*(set(run.by_strength) for run in runs)))
            points = [_estimate([run.by_strength[strength] for run in runs]) for strength in strengths]
            _error_line(axes, [strength + offset for strength in strengths], points, colour, name)
        shown = sorted({strength for runs in rows.values() for run in runs for strength in run.by_strength})
        axes.set_xticks(
            shown, [names[strength].replace(" / ", " /\n").replace(" Better", "\nBetter") for strength in shown]
        )
        _percent_axis(axes)


def calibration(curves: Mapping[str, Sequence[CalibrationBin]], path: Path) -> None:
    """How often rewards are right by how sure they are; on the dotted line they are as sure as they should be."""
    with figure(path, WIDTH, HEIGHT, "Calibration of rewards") as axes:
        axes.plot([50, 100], [50, 100], color=REFERENCE, linewidth=0.8, linestyle=":")
        for (name, curve), colour in zip(curves.items(), _colours()):
            points = [_estimate([one.accuracy]) for one in curve]
            _error_line(axes, [100 * one.confidence for one in curve], points, colour, name)
        axes.set_xlabel("confidence, sigmoid(|gap of rewards|) (%)")
        _percent_axis(axes)


def score_histogram(scores: Histogram, path: Path, *, threshold: float | None = None) -> None:
    """How the scores of each group are distributed; `threshold` is a reward to mark."""
    with figure(path, WIDTH, HEIGHT, "Distribution of rewards") as axes:
        for (name, counts), colour in zip(scores.counts.items(), _colours()):
            axes.stairs(counts, scores.edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(counts, scores.edges, color=colour, linewidth=1.4, label=f"{name} ({int(sum(counts)):,})")
        if threshold is not None:
            axes.axvline(threshold, color=REFERENCE, linewidth=0.8, linestyle=":")
        axes.set_xlabel("reward" + ("; the dotted line is the threshold" if threshold is not None else ""))
        axes.set_ylabel("responses")
        axes.set_ylim(bottom=0)
        legend_beside(axes)


def length_bias(rows: Mapping[str, LengthBias], path: Path) -> None:
    """Accuracy by which response is longer: bars of one height are a reward that does not count words."""
    with figure(path, WIDTH, HEIGHT, "Accuracy by length of the better response") as axes:
        width = GROUP / len(rows)
        for offset, (name, found), colour in zip(_offsets(len(rows), GROUP), rows.items(), _colours()):
            points = [_estimate([one]) for one in found]
            heights = [point[0] for point in points]
            places = [place + offset for place in range(len(points))]
            axes.bar(places, heights, width, color=colour, label=name)
            axes.errorbar(places, heights, yerr=_errors(points), fmt="none", ecolor=REFERENCE, capsize=3, linewidth=1)
        labels = ("shorter is better", "longer is better", "same length")
        totals = [next(iter(rows.values()))[i].total for i in range(len(labels))]
        axes.set_xticks(range(len(labels)), [f"{label}\n({total:,} pairs)" for label, total in zip(labels, totals)])
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, 100)
        _percent_axis(axes)


def scaling(models: Sequence[Trained], path: Path, *, baselines: Mapping[str, float] | None = None) -> None:
    """Accuracy over training pairs, a line for each size, as in LLaMA-2's figure 6; models of one name are seeds.

    `baselines` are the shares of other rewards, as level lines.
    """
    runs: dict[tuple[int, str], dict[int, list[Proportion]]] = {}
    for one in models:
        runs.setdefault((one.parameters, one.model), {}).setdefault(one.pairs, []).append(one.accuracy)
    with figure(path, WIDTH, HEIGHT, "Accuracy by training pairs and size of the model") as axes:
        for ((parameters, name), found), colour in zip(sorted(runs.items()), _colours()):
            amounts = sorted(found)
            _error_line(
                axes, amounts, [_estimate(found[n]) for n in amounts], colour, f"{name} ({quantity(parameters)})"
            )
        for (name, share), style in zip((baselines or {}).items(), itertools.cycle((":", "--", "-."))):
            axes.axhline(100 * share, color=REFERENCE, linewidth=0.9, linestyle=style, label=name)
        amounts = sorted({one.pairs for one in models})
        axes.set_xscale("log", base=2)
        axes.set_xticks(amounts, [quantity(amount) for amount in amounts])
        axes.minorticks_off()
        axes.set_xlabel("training pairs")
        _percent_axis(axes)


def _colours() -> itertools.cycle:
    return itertools.cycle(SERIES[1:])


def _offsets(count: int, width: float) -> list[float]:
    """Where `count` things stand about a place so that they share `width` evenly."""
    return [(index - (count - 1) / 2) * width / count for index in range(count)]


def _estimate(runs: Sequence[Proportion]) -> tuple[float, float, float]:
    """(share, lower end, upper end) in percent: of one run with Wilson's interval, of several their mean."""
    shares = [100 * run.share for run in runs]
    if len(runs) == 1:
        low, high = runs[0].interval()
        return shares[0], 100 * low, 100 * high
    mean, error = statistics.fmean(shares), statistics.stdev(shares) / math.sqrt(len(shares))
    return mean, mean - error, mean + error


def _errors(points: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    return [share - low for share, low, _ in points], [high - share for share, _, high in points]


def _error_line(
    axes: Axes, places: Sequence[float], points: Sequence[tuple[float, float, float]], colour: str, name: str
) -> None:
    heights = [point[0] for point in points]
    axes.errorbar(places, heights, yerr=_errors(points), fmt="o-", color=colour, capsize=3, label=name)


def _percent_axis(axes: Axes) -> None:
    axes.axhline(CHANCE, color="#bbbbbb", linewidth=0.8)
    axes.set_ylabel("accuracy (%)")
    legend_beside(axes, INTERVALS)
