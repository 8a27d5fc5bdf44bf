"""What the figures of a study show, checked on the data that is drawn: as PNG, as Plotly traces, as a page."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from llm_jax.scaling import figures, fit, panels
from llm_jax.scaling.learning_rate import Choice
from llm_jax.scaling.panels import Axis, Panel, Series
from tests.scaling import studies

RESULTS = studies.sweep()
LAW = studies.law()
PREDICTION = studies.prediction()
RATES = {1e-3: 3.2, 4e-3: 3.0, 1.6e-2: 3.4}
TRIED = [
    studies.run("tiny", 16, 1e10, seed, name=f"tiny-{rate}-s{seed}", learning_rate=rate, loss=loss + 0.1 * (seed - 0.5))
    for rate, loss in RATES.items()
    for seed in (0, 1)
]


def labelled(panel: Panel, label: str) -> list[Series]:
    return [series for series in panel.series if series.label == label]


def by_name(panel: Panel, name: str) -> list[Series]:
    """The series of the trial of this name."""
    return [series for series in panel.series if series.hover and series.hover[0].startswith(f"{name}\n")]


def drawn(panel: Panel):
    axes = Figure(figsize=(9, 5)).subplots()
    figures.draw(panel, axes)
    return axes


BUDGETS = studies.isoflop_sweep()
PARABOLAS = fit.isoflop(BUDGETS)
ALL = [
    panels.frontier(RESULTS, LAW, [PREDICTION]),
    panels.loss_by_tokens(RESULTS),
    panels.residuals(RESULTS, LAW, [PREDICTION]),
    panels.learning_rates(TRIED, [Choice("tiny", 4e-3, "why")]),
    panels.isoflop(BUDGETS, PARABOLAS),
]


def test_every_run_is_a_curve_over_its_compute():
    panel = ALL[0]
    for run in (*RESULTS, *PREDICTION.actual):
        line, *_ = (series for series in by_name(panel, run.name) if series.line)
        # The FLOPs of a token are constant during a run.
        assert line.x == pytest.approx([run.compute / run.tokens * tokens for tokens, _ in run.curve])
        assert line.y == tuple(loss for _, loss in run.curve)
        end, *_ = (series for series in by_name(panel, run.name) if series.marker == "circle")
        assert (end.x, end.y) == (pytest.approx((run.compute,)), (run.loss,))


def test_sizes_are_told_apart_by_colour_and_stay_in_order():
    panel = ALL[1]
    colours = {
        label: {s.colour for s in labelled(panel, label)} for label in dict.fromkeys(s.label for s in panel.series)
    }
    assert [label.split(" ")[0] for label in colours] == list(studies.WIDTHS)
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == len(studies.WIDTHS)


def test_the_law_is_solid_where_it_was_fitted_and_dashed_where_it_predicts():
    (fitted,), (beyond,) = labelled(ALL[0], "fitted law"), labelled(ALL[0], "law, extrapolated")
    assert (fitted.line, beyond.line) == ("solid", "dashed")
    assert (fitted.x[0], fitted.x[-1]) == pytest.approx((min(LAW.compute), max(LAW.compute)))
    assert (beyond.x[0], beyond.x[-1]) == pytest.approx((max(LAW.compute), PREDICTION.compute))
    for series in (fitted, beyond):
        assert series.y == pytest.approx([LAW.a * c**LAW.b + LAW.l_inf for c in series.x])
        for compute, low, high in list(zip(series.x, series.low, series.high))[::50]:
            assert (low, high) == pytest.approx(LAW.law_interval(compute))


def test_without_a_prediction_the_law_ends_with_its_data():
    panel = panels.frontier(RESULTS, LAW)
    assert not labelled(panel, "law, extrapolated") and not labelled(panel, "predicted")


def test_the_star_has_its_interval_and_the_actual_runs_beside_it():
    (star,), (actual,) = labelled(ALL[0], "predicted"), labelled(ALL[0], "actual")
    assert (star.x, star.y) == ((PREDICTION.compute,), (PREDICTION.predicted,))
    assert (star.low, star.high) == ((PREDICTION.low,), (PREDICTION.high,))
    assert actual.y == tuple(run.loss for run in PREDICTION.actual)


def test_a_prediction_that_is_not_trained_yet_is_a_star_alone():
    panel = panels.frontier(RESULTS, LAW, [dataclasses.replace(PREDICTION, actual=())])
    assert labelled(panel, "predicted") and not labelled(panel, "actual")


def test_loss_by_tokens_counts_tokens():
    run = RESULTS[0]
    line, *_ = (series for series in by_name(ALL[1], run.name) if series.line)
    assert line.x == tuple(tokens for tokens, _ in run.curve)


def test_residuals_are_per_cent_of_the_law_for_every_fitted_point():
    marked = [series for series in ALL[2].series if series.marker == "circle"]
    found = sorted((c, y) for series in marked for c, y in zip(series.x, series.y))
    expected = sorted((c, 100 * r / (loss - r)) for c, loss, r in zip(LAW.compute, LAW.loss, LAW.residuals))
    assert np.array(found) == pytest.approx(np.array(expected))
    names = {text.split("\n")[0] for series in marked for text in series.hover}
    assert names == {run.name for run in RESULTS if run.loss in LAW.loss}
    (held_out,) = labelled(ALL[2], "predicted runs")
    assert held_out.y == pytest.approx([100 * (r.loss / LAW.predict(r.compute) - 1) for r in PREDICTION.actual])


def test_runs_of_one_loss_keep_their_names():
    """Two sizes may end with the same loss to the last digit."""
    same = [dataclasses.replace(run, loss=3.0, curve=((run.tokens, 3.0),)) for run in BUDGETS[:5]]
    panel = panels.isoflop([*same, *BUDGETS[5:]], PARABOLAS)
    assert {text.split("\n")[0] for text in panel.series[0].hover} == {run.name for run in same}
    runs = [dataclasses.replace(run, loss=LAW.predict(4e11)) for run in RESULTS[:2]]
    runs = [dataclasses.replace(run, curve=((run.tokens, run.loss),)) for run in runs]
    law = dataclasses.replace(LAW, compute=(runs[0].compute, 2e10), loss=(runs[0].loss, runs[1].loss))
    marked = [series for series in panels.residuals(runs, law).series if series.marker == "circle"]
    assert next(text.split("\n")[0] for series in marked for text in series.hover) == runs[0].name
    assert marked[-1].label == "fitted points" and marked[-1].x == (2e10,)


def test_points_that_are_no_run_are_shown_all_the_same():
    panel = panels.residuals([], LAW)
    (points,) = labelled(panel, "fitted points")
    assert sorted(points.x) == sorted(LAW.compute)


def test_learning_rates_against_the_best_one_seeds_averaged():
    tiny, chosen = ALL[3].series
    assert tiny.x == tuple(RATES)
    assert tiny.y == pytest.approx([loss - 3.0 for loss in RATES.values()])
    assert (chosen.x, chosen.y) == ((4e-3,), pytest.approx((0.0,)))


def test_a_chosen_rate_between_two_is_on_their_line():
    panel = panels.learning_rates(TRIED, [Choice("tiny", 2e-3, "halfway between 1e-3 and 4e-3 in the logarithm")])
    assert panel.series[-1].y == pytest.approx((0.1,))


def test_a_size_without_a_choice_has_no_star():
    assert not labelled(panels.learning_rates(TRIED, [Choice("small", 2e-3, "why")]), "chosen")


def test_isoflop_curves_are_the_runs_their_parabola_and_its_lowest_point():
    *curves, best = ALL[4].series
    for dots, parabola, compute in zip(curves[::2], curves[1::2], (1e10, 1e11, 1e12)):
        runs = [run for run in BUDGETS if run.compute == pytest.approx(compute, rel=0.05)]
        assert sorted(zip(dots.x, dots.y)) == sorted((run.parameters, run.loss) for run in runs)
        assert {text.split("\n")[0] for text in dots.hover} == {run.name for run in runs}
        expected = [
            3 + 0.05 * math.log(n / studies.best_size(compute)) ** 2 - math.log10(compute) / 10 for n in parabola.x
        ]
        assert parabola.y == pytest.approx(expected, rel=1e-6)
    assert best.x == pytest.approx([studies.best_size(compute) for compute in (1e10, 1e11, 1e12)], rel=1e-4)
    assert best.y == pytest.approx([2.0, 1.9, 1.8], rel=1e-6)


def test_budgets_without_a_best_size_are_named():
    few = [run for run in BUDGETS if run.compute > 2e10 or run.size in ("w24", "w40")]
    panel = panels.isoflop(few, fit.isoflop(few))
    assert "Left out: 1e+10 FLOPs: 2 sizes" in panel.caption
    assert len(panel.series) == 5


def test_png_lines_are_the_panels(tmp_path):
    for panel in ALL:
        axes = drawn(panel)
        lines = axes.get_lines()
        for series in panel.series:
            matching = [
                line
                for line in lines
                if np.array_equal(line.get_xdata(), series.x) and np.array_equal(line.get_ydata(), series.y)
            ]
            assert matching, f"{panel.name}: {series.label} is not drawn"
            assert any(to_hex(line.get_color()) == series.colour.lower() for line in matching)
        assert (axes.get_xscale() == "log", axes.get_yscale() == "log") == (panel.x.log, panel.y.log)
        assert (axes.get_xlabel(), axes.get_ylabel()) == (panel.x.label, panel.y.label)
        entries = [text.get_text() for text in axes.get_legend().get_texts()]
        assert entries == list(dict.fromkeys(series.label for series in panel.series))
        figures.png(panel, tmp_path / f"{panel.name}.png")
        assert (tmp_path / f"{panel.name}.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_png_band_and_bar_span_the_intervals():
    axes = drawn(ALL[0])
    bands = [collection.get_paths()[0].vertices for collection in axes.collections if hasattr(collection, "get_paths")]
    (fitted,) = labelled(ALL[0], "fitted law")
    assert any(
        math.isclose(band[:, 1].max(), max(fitted.high)) and math.isclose(band[:, 1].min(), min(fitted.low))
        for band in bands
    )
    bars = [segment for c in axes.collections if hasattr(c, "get_segments") for segment in c.get_segments()]
    assert any(segment[:, 1] == pytest.approx([PREDICTION.low, PREDICTION.high]) for segment in bars)


@pytest.mark.parametrize("low, high, least", [(3.1, 3.4, 3), (2.0, 9.0, 3), (2.0, 60.0, 3), (1.0, 1e6, 3)])
def test_a_logarithmic_axis_has_labels_however_short_it_is(low, high, least):
    series = Series("a", (low, high), (low, high), "#000000", line="solid")
    axes = drawn(Panel("x", "t", "c", Axis("x", numbers="quantity"), Axis("y"), (series,)))
    axes.figure.canvas.draw()
    for axis, (start, end) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        shown = [label for label in axis.get_ticklabels() if start <= max(label.get_position()) <= end]
        assert len({label.get_text() for label in shown} - {""}) >= least


def test_a_size_may_be_called_what_it_likes(tmp_path):
    run = studies.run("$_{<b>$", 32, 1e10, 0, name="<script>&$_{$")
    panel = panels.loss_by_tokens([run])
    figures.png(panel, tmp_path / "a.png")
    figures.page("<script>1", [panel], tmp_path / "a.html")
    assert "<script>&" not in (tmp_path / "a.html").read_text() and "<script>1" not in (tmp_path / "a.html").read_text()


def test_traces_hold_the_values_and_name_the_trials():
    for panel in ALL:
        traces = figures.interactive(panel).data
        shown = [trace for trace in traces if trace.hoverinfo != "skip" or trace.name]
        assert len(shown) == len(panel.series)
        for trace, series in zip(shown, panel.series):
            assert (tuple(trace.x), tuple(trace.y)) == (series.x, series.y)
            assert [text.replace("<br>", "\n") for text in trace.hovertext] == list(series.hover)
        entries = [trace.name for trace in traces if trace.showlegend]
        assert entries == list(dict.fromkeys(series.label for series in panel.series))


def test_an_interactive_star_has_bars_and_the_law_a_band():
    traces = figures.interactive(ALL[0]).data
    star = next(trace for trace in traces if trace.name == "predicted")
    assert star.error_y.array[0] == pytest.approx(PREDICTION.high - PREDICTION.predicted)
    assert star.error_y.arrayminus[0] == pytest.approx(PREDICTION.predicted - PREDICTION.low)
    band = [trace for trace in traces if trace.fill == "tonexty"]
    assert [tuple(trace.y) for trace in band] == [
        series.high for series in ALL[0].series if series.label in ("fitted law", "law, extrapolated")
    ]


class Links(HTMLParser):
    """Everything that a page would load or lead to."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_is_whole_and_works_offline(tmp_path):
    path = tmp_path / "new" / "figures.html"
    figures.page("A study", ALL, path)
    text = path.read_text()
    assert Links(text).found == [f"#{panel.name}" for panel in ALL]  # nothing is loaded from anywhere
    assert text.count("plotly.js v") == 1
    for run in (*RESULTS, *PREDICTION.actual):
        assert run.name in text
    for panel in ALL:
        assert panel.title in text and panel.caption.split(":")[0] in text
        assert re.search(rf'id="{panel.name}"', text)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_a_browser_draws_every_section(tmp_path):
    figures.page("A study", ALL, tmp_path / "figures.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    result = subprocess.run(
        [*command, (tmp_path / "figures.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.count('class="main-svg"') >= len(ALL)
    assert json.dumps(ALL[0].x.label)[1:-1] in result.stdout
