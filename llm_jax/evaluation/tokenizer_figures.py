"""The figure of a comparison of tokenizers: bars by language, lines by vocabulary."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullLocator

from llm_jax.evaluation.figures import COLOURS, SERIES, legend_beside, panels

Rates = Mapping[str, Mapping[str, float]]  # bytes per token by tokenizer and language
LANGUAGE_COLOURS = (*SERIES[1:], "#56B4E9", "#333333", SERIES[0])
MARKERS = "sD^vP*X"


def draw(rates: Rates, pieces: Mapping[str, int], trained: Sequence[str], path: Path) -> None:
    """Bytes per token: bars of every tokenizer for each language, and lines over the vocabulary.

    Args:
        rates: bytes per token by tokenizer and language.
        pieces: the size of each vocabulary.
        trained: which of the tokenizers are of one kind, by size; the others are single points.
    """
    titles = ("Bytes per token of held-out text (more is better)", "By size of the vocabulary: ours as lines")
    with panels(path, 11, 9, titles) as (bars, lines):
        _bars(bars, rates, trained)
        _lines(lines, rates, pieces, trained)


def _bars(axes: Axes, rates: Rates, trained: Sequence[str]) -> None:
    languages = list(next(iter(rates.values())))
    width = 0.84 / len(rates)
    blues = iter(colormaps["Blues"](np.linspace(0.3, 0.95, max(1, len(trained)))))
    others = itertools.cycle((COLOURS["gzip -9"], COLOURS["xz -9e"], COLOURS["zstd -19"], SERIES[5]))
    for number, (name, row) in enumerate(rates.items()):
        places = np.arange(len(languages)) + (number - (len(rates) - 1) / 2) * width
        colour = next(blues) if name in trained else next(others)
        axes.bar(places, [row[language] for language in languages], width, color=colour, label=name)
    axes.set_xticks(range(len(languages)), languages)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("bytes per token")
    legend_beside(axes)


def _lines(axes: Axes, rates: Rates, pieces: Mapping[str, int], trained: Sequence[str]) -> None:
    others = dict(zip([name for name in rates if name not in trained], itertools.cycle(MARKERS)))
    for language, colour in zip(next(iter(rates.values())), itertools.cycle(LANGUAGE_COLOURS)):
        sizes, values = [pieces[name] for name in trained], [rates[name][language] for name in trained]
        axes.plot(sizes, values, "o-", color=colour, markersize=4, label=language)
        for name, marker in others.items():
            axes.plot(pieces[name], rates[name][language], marker, color=colour, markersize=7, fillstyle="none")
    for name, marker in others.items():
        axes.plot([], [], marker, color="#333333", markersize=7, fillstyle="none", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(_apart(sorted(pieces[name] for name in rates)))
    axes.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("pieces in the vocabulary")
    axes.set_ylabel("bytes per token")
    legend_beside(axes)


def _apart(sizes: Sequence[int]) -> list[int]:
    """Those of ascending sizes whose labels have room on the axis."""
    found: list[int] = []
    for size in sizes:
        if not found or size > 1.15 * found[-1]:
            found.append(size)
    return found
