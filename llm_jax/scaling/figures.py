"""Draws panels: as PNG files in the house style, and as one interactive HTML page that works offline."""

import html
from collections.abc import Callable, Iterator, Sequence
from math import inf
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.axis import Axis as DrawnAxis
from matplotlib.colors import to_rgb
from matplotlib.legend_handler import HandlerTuple
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter

from llm_jax.evaluation.figures import figure
from llm_jax.evaluation.tables import quantity
from llm_jax.scaling.panels import Axis, Panel, Series

WIDTH, HEIGHT = 9.0, 4.8  # of a PNG, inches
BAND_OPACITY = 0.15
LINES = {"solid": "-", "dashed": "--", "dotted": ":", "": "none"}
MARKERS = {"circle": "o", "star": "*", "diamond": "D", "": ""}
MARKER_SIZES = {"circle": 4.0, "star": 14.0, "diamond": 7.0, "": 0.0}  # points
NUMBERS: dict[str, Callable[[float], str]] = {"plain": "{:g}".format, "quantity": quantity}
PLOTLY_SYMBOLS = {"circle": "circle", "star": "star", "diamond": "diamond-open", "": "circle"}
PLOTLY_SIZES = {"circle": 6, "star": 16, "diamond": 10, "": 0}  # pixels
ORDER = {"": 2, "circle": 2.1, "star": 4, "diamond": 5}
PLOTLY_DASHES = {"solid": "solid", "dashed": "dash", "dotted": "dot", "": "solid"}
PLOTLY_TICKS = {
    "plain": {"tickformat": "~g"},
    "power": {"exponentformat": "power"},
    "quantity": {"exponentformat": "B"},
}
PLOTLY_HEIGHT = 560  # pixels
PAGE_STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans", sans-serif; color: #1d1d1f; max-width: 75rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 0; }
nav a { margin-right: 1.2rem; }
.note { color: #555; font-size: 0.9rem; max-width: 60rem; }
"""


def png(panel: Panel, path: Path) -> None:
    """Draw a panel to a PNG file."""
    with figure(path, WIDTH, HEIGHT, panel.title) as axes:
        draw(panel, axes)


def draw(panel: Panel, axes: Axes) -> None:
    """Draw a panel's series on Matplotlib axes, with scales, labels and a legend beside them."""
    entries: dict[str, list] = {}
    for series in panel.series:
        entries.setdefault(series.label, []).append(_draw_series(series, axes))
    _scale(axes.xaxis, panel.x, axes.set_xscale)
    _scale(axes.yaxis, panel.y, axes.set_yscale)
    entries.pop("", None)
    legend = axes.legend(
        [tuple(handles[-1]) for handles in entries.values()], entries, frameon=False, loc="center left",
        bbox_to_anchor=(1, 0.5), handler_map={tuple: HandlerTuple()},
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a size may be called what it likes


def _draw_series(series: Series, axes: Axes) -> list:
    """Draw one series; returns what stands for it in the legend."""
    (line,) = axes.plot(
        series.x, series.y, color=series.colour, alpha=series.opacity, linestyle=LINES[series.line], linewidth=1.4,
        marker=MARKERS[series.marker], markersize=MARKER_SIZES[series.marker], zorder=ORDER[series.marker],
    )  # fmt: skip
    if series.marker == "diamond":  # hollow, so that a star beneath it shows
        line.set(markerfacecolor="none", markeredgewidth=1.4)
    if not series.low:
        return [line]
    if series.line:
        band = axes.fill_between(
            series.x, series.low, series.high, color=series.colour, alpha=BAND_OPACITY, linewidth=0
        )
        return [band, line]
    errors = np.abs(np.array([series.low, series.high]) - np.array(series.y))
    axes.errorbar(series.x, series.y, yerr=errors, fmt="none", ecolor=series.colour, capsize=4, zorder=3)
    return [line]


def _scale(drawn: DrawnAxis, axis: Axis, set_scale: Callable[[str], None]) -> None:
    """Label an axis; a logarithmic one has ticks at round numbers however short it is."""
    drawn.set_label_text(axis.label)
    if not axis.log:
        return
    set_scale("log")
    low, high = drawn.get_view_interval()
    if high < 10 * low:
        drawn.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    elif high < 100 * low:
        drawn.set_major_locator(LogLocator(subs=(1, 2, 5)))
    drawn.set_minor_formatter(NullFormatter())
    if axis.numbers == "power":
        drawn.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(inf, inf)))
    else:
        drawn.set_major_formatter(FuncFormatter(lambda value, _: NUMBERS[axis.numbers](value)))


def interactive(panel: Panel) -> go.Figure:
    """A panel as a Plotly figure: hovering names the trial, a click in the legend hides a size."""
    drawn = go.Figure()
    labelled: set[str] = set()
    for series in panel.series:
        for trace in _traces(series):
            trace.update(legendgroup=series.label, showlegend=trace.showlegend and series.label not in labelled)
            drawn.add_trace(trace)
        labelled.add(series.label)
    drawn.update_layout(
        title=_text(panel.title), template="plotly_white", height=PLOTLY_HEIGHT, hovermode="closest",
        xaxis=_plotly_axis(panel.x), yaxis=_plotly_axis(panel.y), legend={"groupclick": "togglegroup"},
    )  # fmt: skip
    return drawn


def _traces(series: Series) -> Iterator[go.Scatter]:
    """The series as a trace; a band's ends are two further ones beneath it."""
    line = {"color": series.colour, "dash": PLOTLY_DASHES[series.line], "width": 1.8}
    band = bool(series.low and series.line)
    if band:
        edge = {"x": series.x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        yield go.Scatter(y=series.low, **edge)
        red, green, blue = (round(255 * part) for part in to_rgb(series.colour))
        yield go.Scatter(y=series.high, fill="tonexty", fillcolor=f"rgba({red},{green},{blue},{BAND_OPACITY})", **edge)
    bars = {}
    if series.low and not band:
        up, down = np.subtract(series.high, series.y), np.subtract(series.y, series.low)
        bars = {"type": "data", "symmetric": False, "array": up.tolist(), "arrayminus": down.tolist()}
    mode = "+".join(kind for kind, drawn in (("lines", series.line), ("markers", series.marker)) if drawn)
    marker = {
        "symbol": PLOTLY_SYMBOLS[series.marker],
        "size": PLOTLY_SIZES[series.marker],
        "color": series.colour,
        "line": {"width": 2 if series.marker == "diamond" else 0},
    }
    yield go.Scatter(
        x=series.x, y=series.y, mode=mode, name=_text(series.label), opacity=series.opacity, line=line, marker=marker,
        error_y=bars, hovertext=[_text(text) for text in series.hover], hoverinfo="text" if series.hover else "skip",
        showlegend=bool(series.label),
    )  # fmt: skip


def _plotly_axis(axis: Axis) -> dict[str, object]:
    kind = "log" if axis.log else "linear"
    return {"title": {"text": _text(axis.label)}, "type": kind, "ticks": "outside", **PLOTLY_TICKS[axis.numbers]}


def _text(text: str) -> str:
    """Plotly takes text for a kind of HTML."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def page(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Write one HTML page with all panels, interactive; everything it needs is inside, so that it works offline."""
    sections = []
    for number, panel in enumerate(panels):
        drawn = interactive(panel).update_layout(title=None, margin={"t": 20})
        figure_html = drawn.to_html(full_html=False, include_plotlyjs=number == 0, div_id=f"figure-{panel.name}")
        sections.append(
            f'<section id="{panel.name}"><h2>{_text(panel.title)}</h2>{figure_html}'
            f'<p class="note">{_text(panel.caption)}</p></section>'
        )
    links = "".join(f'<a href="#{panel.name}">{_text(panel.title)}</a>' for panel in panels)
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{PAGE_STYLE}</style>'
    body = "\n".join([f"<h1>{_text(title)}</h1><nav>{links}</nav>", *sections])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n', encoding="utf-8"
    )
    partial.replace(path)
