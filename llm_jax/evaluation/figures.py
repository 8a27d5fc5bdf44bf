"""The figures of a report, as PNG files: one function a figure, from plain records to a path."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import mul
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, ScalarFormatter

Records = Sequence[Mapping[str, float]]

# Wong's palette, which stays apart for colour-blind readers; the model is always the first.
COLOURS = {
    "model": "#0072B2",
    "unigram": "#999999",
    "gzip -9": "#E69F00",
    "zstd -19": "#CC79A7",
    "xz -9e": "#009E73",
}
SERIES = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")  # of a table's rows, in their order
HELDOUT_COLOUR = "#D55E00"
DOTS_PER_INCH = 110
SMOOTHING = 0.8  # of the thick training curve: an exponential mean over logged steps


@contextmanager
def figure(path: Path, width: float, height: float, title: str) -> Iterator[Axes]:
    """Axes of the house style, saved to `path` at the end of the block; no window system or notebook is touched."""
    with panels(path, width, height, [title]) as (axes,):
        yield axes


@contextmanager
def panels(
    path: Path,
    width: float,
    height: float,
    titles: Sequence[str],
    columns: int = 1,
    height_ratios: Sequence[float] | None = None,
) -> Iterator[list[Axes]]:
    """Axes beside and below each other, one for each title, likewise; `height_ratios` are those of the rows."""
    canvas = Figure(figsize=(width, height), layout="constrained")
    rows = -(-len(titles) // columns)
    grid = canvas.subplots(rows, columns, squeeze=False, height_ratios=height_ratios).ravel().tolist()
    for axes, title in zip(grid, titles):
        axes.set_title(title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e5e5", linewidth=0.7)
        axes.set_axisbelow(True)
    for axes in grid[len(titles) :]:
        axes.remove()
    yield grid[: len(titles)]
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=DOTS_PER_INCH)


def _tokens_axis(axes: Axes) -> None:
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _column(records: Records, name: str) -> list[float]:
    return [record[name] for record in records]


def smooth(values: Sequence[float], decay: float = SMOOTHING) -> list[float]:
    """Exponential means, corrected for their start, so that the first one is the first value."""
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return means


def loss_curve(train: Records, heldout: Records, path: Path) -> None:
    """Training and held-out cross-entropy in nats per token over the tokens seen."""
    tokens, losses = _column(train, "tokens"), _column(train, "cross_entropy")
    with figure(path, 7.5, 4.2, "Loss by tokens seen") as axes:
        axes.plot(tokens, losses, color=COLOURS["model"], alpha=0.3, linewidth=0.8)
        axes.plot(tokens, smooth(losses), color=COLOURS["model"], label="training, smoothed")
        axes.plot(_column(heldout, "tokens"), _column(heldout, "loss"), "o-", color=HELDOUT_COLOUR, label="held-out")
        axes.set_ylabel("cross-entropy (nats per token)")
        _tokens_axis(axes)
        axes.legend(frameon=False)


def learning_rate(train: Records, path: Path) -> None:
    """The learning rate over the tokens seen."""
    with figure(path, 7.5, 3.0, "Learning rate") as axes:
        axes.plot(_column(train, "tokens"), _column(train, "learning_rate"), color=COLOURS["model"])
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)
        _tokens_axis(axes)


def throughput(train: Records, path: Path) -> None:
    """Tokens per second over the tokens seen and, where the hardware's peak is known, the share of it on the right."""
    with figure(path, 7.5, 3.0, "Throughput") as axes:
        axes.plot(_column(train, "tokens"), _column(train, "tokens_per_second"), color=COLOURS["model"])
        axes.set_ylabel("tokens per second")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        _tokens_axis(axes)
        known = [record for record in train if record.get("mfu") and record["tokens_per_second"]]
        if known:  # both are the same curve up to a constant
            percent = 100 * known[-1]["mfu"] / known[-1]["tokens_per_second"]
            share = axes.secondary_yaxis("right", functions=(partial(mul, percent), partial(mul, 1 / percent)))
            share.set_ylabel("model FLOPs utilisation (%)")


def heldout_bars(rows: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Held-out bits per byte as grouped bars: `rows` maps a source to the figure of every method."""
    methods = [method for method in COLOURS if all(method in row for row in rows.values())]
    thickness = 0.8 / len(methods)
    with figure(path, 8.5, 1.3 + 0.52 * len(rows), "Held-out bits per byte (shorter is better)") as axes:
        for index, method in enumerate(methods):
            centres = [place + (index - (len(methods) - 1) / 2) * thickness for place in range(len(rows))]
            axes.barh(centres, [row[method] for row in rows.values()], thickness, color=COLOURS[method], label=method)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("bits per byte of UTF-8 text")
        axes.legend(frameon=False, ncols=len(methods), loc="upper right", bbox_to_anchor=(1, 0), borderaxespad=3.2)


def legend_beside(axes: Axes, title: str = "") -> None:
    """The legend to the right of the axes, where it hides nothing."""
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title=title, title_fontsize="small")


def perplexity_by_length(rows: Mapping[str, Mapping[int, tuple[float, float]]], path: Path) -> None:
    """Perplexity over the length of the windows: `rows` maps a name to length -> (perplexity, standard error)."""
    with figure(path, 7.5, 4.2, "Held-out perplexity by length of the window") as axes:
        for (name, row), colour in zip(rows.items(), itertools.cycle(SERIES)):
            values, errors = zip(*row.values())
            axes.errorbar(list(row), values, yerr=errors, fmt="o-", color=colour, capsize=3, label=name)
        lengths = list(next(iter(rows.values())))
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.set_xlabel("length in tokens; the first is the trained one")
        axes.set_ylabel("perplexity")
        legend_beside(axes)


def loss_by_position(rows: Mapping[str, Sequence[float]], length: int, trained_length: int, path: Path) -> None:
    """Nats over the position in windows of `length`: each row's values are means of equal stretches of it."""
    with figure(path, 7.5, 4.2, "Held-out loss by position in the longest window") as axes:
        for (name, values), colour in zip(rows.items(), itertools.cycle(SERIES)):
            stretch = length / len(values)
            axes.plot([(i + 0.5) * stretch for i in range(len(values))], values, color=colour, label=name)
        axes.axvline(trained_length, color="#333333", linewidth=0.8, linestyle=":")
        axes.set_xlabel("position in tokens; the dotted line is the trained length")
        axes.set_ylabel("cross-entropy (nats per token)")
        legend_beside(axes)
