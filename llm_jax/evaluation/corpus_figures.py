"""The figures of a corpus run, as PNG files: one function a figure, from the stages' reports to a path.

They are narrow and their letters large, to be read on a telephone too. What is kept is blue, what is dropped orange.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from llm_jax.evaluation.corpus_tables import size
from llm_jax.evaluation.figures import SERIES, figure, panels
from llm_jax.evaluation.tables import quantity

Report = Mapping[str, Any]  # of a stage, as the factory writes it
Composition = Mapping[str, Mapping[str, float]]  # a row's name -> how much of each language
WIDTH = 6.4  # inches
KEPT, DROPPED, CUT, ADDED = "#0072B2", "#D55E00", "#E69F00", "#009E73"
PALETTE = (*SERIES[1:], "#56B4E9", "#F0E442", "#999999")
NAMES = 0.66  # of the width of a side: what lies between the two sides of the flow, for the stages' names
STRIP = 0.004  # of the width of a side: a thinner ribbon is drawn so thick, to be seen
LANGUAGES = len(PALETTE) - 1  # that have colours of their own


def flow(reports: Sequence[Report], path: Path) -> None:
    """Bytes to the left and documents to the right, from the top down, with what leaves at every stage."""
    with figure(path, WIDTH, 1.0 + 0.42 * len(reports), "Through the stages") as axes:
        for side, measure in ((-1, "bytes"), (1, "documents")):
            scale = max(report[measure]["in"] + report[measure]["added"] for report in reports)
            for row, report in enumerate(reports):
                _stage(axes, row, report, measure, side, scale)
        for row, report in enumerate(reports):
            axes.text(0, row + 0.5, report["name"], ha="center", va="center", fontsize=10)
        for report, place, end in ((reports[0], -0.12, "in"), (reports[-1], len(reports) + 0.5, "kept")):
            for side, text in ((-1, size(report["bytes"][end])), (1, f"{report['documents'][end]:,} documents")):
                axes.text(side * NAMES / 2, place, text, ha=("right", "left")[side > 0], color=KEPT)
        axes.set_xlim(-1.95, 1.95)
        axes.set_ylim(len(reports) + 0.7, -0.7)
        axes.axis("off")


def _stage(axes: Axes, row: int, report: Report, measure: str, side: int, scale: float) -> None:
    """The trunk of what a stage keeps, and ribbons of what leaves it or comes to it."""
    counted = report[measure]
    dropped = sum(reason[measure] for reason in report["dropped"].values())
    cut = counted["in"] + counted["added"] - counted["kept"] - dropped  # out of documents that stay
    left = NAMES / 2
    kept = counted["kept"] / scale
    axes.fill_betweenx([row + 0.02, row + 1], side * left, side * (left + kept), color=KEPT, linewidth=0, alpha=0.85)
    inner = left + min(counted["in"], counted["kept"]) / scale
    texts = []
    for amount, colour, sign in ((dropped, DROPPED, "−"), (cut, CUT, "−"), (counted["added"], ADDED, "+")):
        if amount > 0:
            _ribbon(axes, row, side, inner, amount / scale, colour, sign == "+")
            inner += amount / scale
            texts.append((colour, sign + (size(amount) if measure == "bytes" else f"{amount:,}")))
    for place, (colour, text) in enumerate(texts):
        height = row + 0.5 + (place - (len(texts) - 1) / 2) * 0.42
        axes.text(side * 1.45, height, text, ha=("right", "left")[side > 0], va="center", fontsize=9, color=colour)


def _ribbon(axes: Axes, row: int, side: int, start: float, width: float, colour: str, inward: bool) -> None:
    """A band that leaves the trunk at the top of a row and bends outward, or one that comes in at its bottom."""
    steps = np.linspace(0, 1, 40)
    bend = steps**2 * (3 - 2 * steps)
    inner = start + bend * (1.42 - start)
    outer = inner + max(width, STRIP) * (1 - bend) + STRIP * bend
    heights = row + (1 - 0.5 * steps if inward else 0.5 * steps)
    axes.fill_betweenx(heights, side * inner, side * outer, color=colour, linewidth=0, alpha=0.8)


def composition(languages: Composition, sources: Mapping[str, tuple[str, float, float]], path: Path) -> None:
    """Shares of the languages, a bar for each row; and MB of each source that were read and that are kept.

    `sources` maps a name to its language, the bytes read and the bytes kept.
    """
    order = _largest(languages)
    colours = {name: PALETTE[i] for i, name in enumerate(order[:LANGUAGES])}
    titles = ("Share of the languages", "Sources: read (light) and kept, MB")
    heights = (0.8 + 0.45 * len(languages), 0.8 + 0.24 * len(sources))
    with panels(path, WIDTH, sum(heights) + 0.8, titles, height_ratios=heights) as (shares, sizes):
        for label, amounts in languages.items():
            left, total = 0.0, sum(amounts.values())
            for name in order:
                share = 100 * amounts.get(name, 0.0) / total
                shares.barh(label, share, left=left, color=colours.get(name, PALETTE[-1]), label=name)
                left += share
        shares.invert_yaxis()
        shares.set_xlabel("% of the bytes" + ("; of what is drawn, % of the tokens" if "drawn" in languages else ""))
        handles = dict(zip(shares.get_legend_handles_labels()[1], shares.get_legend_handles_labels()[0]))
        shares.legend(handles.values(), handles, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
        for row, (language, before, after) in enumerate(sources.values()):
            colour = colours.get(language, PALETTE[-1])
            sizes.barh(row, before / 1e6, color=colour, alpha=0.3)
            sizes.barh(row, after / 1e6, color=colour)
        sizes.set_yticks(range(len(sources)), list(sources), fontsize=9)
        sizes.set_ylim(len(sources) - 0.4, -0.6)


def _largest(languages: Composition) -> list[str]:
    """The names of all languages, that with most in any row first."""
    shares: dict[str, float] = {}
    for amounts in languages.values():
        for name, amount in amounts.items():
            shares[name] = max(shares.get(name, 0.0), amount / sum(amounts.values()))
    return sorted(shares, key=lambda name: (-shares[name], name))


def scores(histograms: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Documents by their scores, those that the stage kept and those that it dropped; the ends hold all beyond."""
    rows = -(-len(histograms) // 2)
    with panels(path, WIDTH, 0.3 + 2.1 * rows, list(histograms), columns=2) as grid:
        for axes, found in zip(grid, histograms.values()):
            axes.stairs(found["kept"], found["edges"], fill=True, color=KEPT, alpha=0.35)
            axes.stairs(found["kept"], found["edges"], color=KEPT, label="kept")
            if any(found["dropped"]):
                axes.stairs(found["dropped"], found["edges"], color=DROPPED, linewidth=1.6, label="dropped")
            axes.locator_params("x", nbins=4)  # more of a score's digits would run into each other
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.7)
            axes.set_ylabel("documents")
            axes.legend(frameon=False, fontsize=8)


def cluster_sizes(sizes: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """How many clusters there are of each number of documents, a series for each kind of cluster."""
    with figure(path, WIDTH, 3.4, "Clusters of duplicates by size") as axes:
        for (name, found), colour, marker in zip(sizes.items(), _colours(), itertools.cycle("os^")):
            points = sorted((int(size), number) for size, number in found.items())
            label = f"{name}: {quantity(sum(number for _, number in points))} clusters"
            axes.plot(*zip(*points), marker, color=colour, markersize=5, alpha=0.8, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        largest = max(int(size) for found in sizes.values() for size in found)
        marks = [digit * 10**power for power in range(len(str(largest))) for digit in (1, 2, 5)]
        axes.set_xticks([mark for mark in marks if 1 < mark < 2 * largest])
        axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("documents in a cluster")
        axes.set_ylabel("clusters")
        axes.legend(frameon=False)


def s_curve(facts: Report, path: Path) -> None:
    """The share of pairs that have a band of their MinHash signatures in common, by their Jaccard similarity."""
    title = f"Pairs that MinHash finds: {facts['bands']} bands of {facts['rows']} rows"
    with figure(path, WIDTH, 3.2, title) as axes:
        points = [(float(similarity), 100 * share) for similarity, share in facts["found by similarity"].items()]
        axes.plot(*zip(*points), "o-", color=KEPT, markersize=4)
        axes.axvline(facts["threshold"], color="#333333", linewidth=0.9, linestyle=":")
        axes.set_xlabel("Jaccard similarity; the dotted line is the threshold that pairs are verified against")
        axes.set_ylabel("found (%)")
        axes.set_ylim(0, 103)


def costs(reports: Sequence[Report], path: Path) -> None:
    """Seconds and peak memory of each stage."""
    names = [report["name"] for report in reports]
    with panels(path, WIDTH, 0.9 + 0.27 * len(names), ("Seconds", "Peak memory, MB"), columns=2) as grid:
        for axes, field, colour in zip(grid, ("seconds", "peak_mb"), (KEPT, ADDED)):
            values = [report[field] for report in reports]
            bars = axes.barh(range(len(names)), values, color=colour)
            axes.bar_label(bars, fmt="{:,.1f}" if field == "seconds" else "{:,.0f}", padding=3, fontsize=8)
            axes.set_xlim(0, 1.25 * max(values))
            axes.set_yticks(range(len(names)), names if field == "seconds" else [""] * len(names))
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.grid(visible=False, axis="y")


def _colours() -> Iterator[str]:
    return itertools.cycle((KEPT, DROPPED, ADDED))
