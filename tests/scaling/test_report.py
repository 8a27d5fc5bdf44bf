"""The tables of a study hold the numbers that they should, and any text that a user's files may bring."""

import dataclasses
import math

import pytest
from rich.console import Console

from llm_jax.evaluation import tables
from llm_jax.evaluation.tables import Table
from llm_jax.scaling import fit, report
from llm_jax.scaling.fit import Comparison, Parametric, Score
from llm_jax.scaling.learning_rate import Choice
from llm_jax.scaling.report import Prediction
from tests.scaling import studies


def cells(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.headings, row, strict=True)) for row in table.rows]


def printed(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(tables.as_rich(table))
    return capture.get()


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (999, "999"), (999.6, "1k"), (1000, "1k"), (11_510_000, "11.5M"), (999_999, "1M"), (3.02e9, "3.02B"),
     (2.6e12, "2.6T"), (0.5, "0.5"), (123_456, "123k")],
)  # fmt: skip
def test_quantities_are_said_as_people_say_them(value, text):
    assert tables.quantity(value) == text


def predicted(losses: list[float]) -> Prediction:
    runs = tuple(studies.run("huge", 64, 1e12, seed, loss=loss) for seed, loss in enumerate(losses))
    return Prediction("huge", 1e12, 2.02, 1.9, 2.1, 0.9, runs)


def test_prediction_against_three_seeds():
    # Mean 2; deviations -0.1, 0, 0.1: variance 0.01, standard error sqrt(0.01 / 3); error 0.02 / 2.
    one = predicted([1.9, 2.0, 2.1])
    assert one.mean == pytest.approx(2.0)
    assert one.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert one.relative_error == pytest.approx(0.01)
    rows = cells(report.predictions([one]))
    assert [row["run"] for row in rows] == ["seed 0", "seed 1", "seed 2", "mean ± standard error"]
    assert [row["error"] for row in rows] == ["+6.32%", "+1.00%", "-3.81%", "+1.00%"]
    assert rows[-1]["actual"] == "2.0000 ± 0.0577"
    assert {row["90% interval"] for row in rows} == {"1.9000 to 2.1000"}


def test_a_single_seed_has_no_standard_error():
    one = predicted([2.0])
    assert math.isnan(one.standard_error)
    assert [(row["run"], row["actual"]) for row in cells(report.predictions([one]))] == [
        ("seed 0", "2.0000"),
        ("mean", "2.0000"),
    ]


def test_a_prediction_stands_before_anything_is_trained():
    one = predicted([])
    assert math.isnan(one.mean) and math.isnan(one.relative_error)
    (row,) = cells(report.predictions([one]))
    assert (row["predicted"], row["run"], row["actual"], row["error"]) == ("2.0200", "not trained", "", "")


def test_the_law_with_its_intervals():
    fitted = studies.law()
    table = report.law(fitted)
    rows = {row["coefficient"]: row for row in cells(table)}
    assert rows["b"]["value"] == f"{fitted.b:.4g}"
    low, high = fitted.intervals["l_inf"]
    assert rows["L_inf"]["95% interval"] == f"{low:.4g} to {high:.4g}"
    assert table.notes[0] == "compute: training FLOPs; loss: nats per token."
    assert f"{len(fitted.loss)} points" in table.notes[1]
    assert len(table.notes) == 2
    unseen = dataclasses.replace(fitted, intervals={**fitted.intervals, "l_inf": (0.0, high)})
    assert "The interval of L_inf starts at 0" in report.law(unseen).notes[2]


def test_the_parametric_law_with_its_intervals():
    constants = {"e": 1.5, "a": 20.0, "b": 300.0, "alpha": 0.3, "beta": 0.6}
    intervals = {name: (value * 0.9, value * 1.1) for name, value in constants.items()}
    fitted = Parametric(
        **constants, repetitions=None, intervals={**intervals, "parameters_exponent": (0.6, 0.7)}, noise=0.002,
        residuals=(0.0,), convention="all", confidence=0.9, draws=100, seed=0, huber_delta=1e-3, parameters=(1.0,),
        tokens=(1.0,), unique_tokens=(1.0,), loss=(2.0,), cost=(20.0, -0.1), problems=("3 trials",),
    )  # fmt: skip
    table = report.parametric(fitted)
    rows = {row["coefficient"]: row for row in cells(table)}
    assert list(rows) == ["E", "A", "B", "alpha", "beta"]
    assert (rows["B"]["value"], rows["B"]["90% interval"]) == ("300", "270 to 330")
    assert "to the power 0.714 (0.600 to 0.700)" in table.notes[1]  # 0.6 / (0.3 + 0.9 * 0.6)
    assert "20 * N^0.900 * D FLOPs" in table.notes[1] and table.notes[2] == "Left out: 3 trials."
    repeated = report.parametric(
        dataclasses.replace(fitted, repetitions=15.0, intervals={**fitted.intervals, "repetitions": (5.0, 40.0)})
    )
    assert cells(repeated)[-1] == {"coefficient": "repetitions", "value": "15", "90% interval": "5 to 40"}


def test_best_sizes_by_isoflop():
    found = fit.isoflop(studies.isoflop_sweep())
    table = report.isoflop(found)
    for row, budget in zip(cells(table), found.budgets, strict=True):
        assert float(row["FLOPs"]) == pytest.approx(budget.compute, rel=0.01)
        assert row["best size"] == tables.quantity(studies.best_size(budget.compute))
        assert float(row["tokens per parameter"]) == pytest.approx(
            budget.tokens_optimum / studies.best_size(budget.compute), rel=0.01
        )
    assert "* compute^0.500" in table.notes[0]  # the square root


def test_forms_are_ranked_by_their_error():
    scores = (
        Score("straight", "big-s0", 1e12, 2.2, 2.0, 0.1),
        Score("straight", "big-s1", 1e12, 1.9, 2.0, -0.05),
        Score("bent", "big-s0", 1e12, 1.98, 2.0, -0.01),
        Score("bent", "big-s1", 1e12, 1.99, 2.0, -0.005),
    )
    table = report.forms(Comparison(scores, {"straight": 0.075, "bent": 0.0075}, 7, ("cubic: too few points",)))
    assert table.rows == (("bent", "0.75%", "-1.00%", "big-s0"), ("straight", "7.50%", "+10.00%", "big-s0"))
    assert "7 smaller trials, scored on the 2 compute-efficient" in table.notes[0]
    assert table.notes[1] == "Not fitted: cubic: too few points"


def test_every_choice_of_learning_rate_says_why():
    (row,) = cells(report.learning_rates([Choice("tiny", 0.00312345, "the best of 5")]))
    assert row == {"size": "tiny", "peak learning rate": "0.00312", "why": "the best of 5"}


def test_trials_are_listed_by_size_and_compute_with_what_was_left_out():
    results = studies.sweep()
    repeated = dataclasses.replace(results[0], name="again", unique_tokens=results[0].tokens // 4)
    table = report.trials([*reversed(results), repeated], ["tiny-x diverged: a loss is not a positive number"])
    rows = cells(table)
    assert len(rows) == len(results) + 1
    assert [row["trial"].split("-")[0] for row in rows[1:]] == sorted(
        [result.size for result in results], key=list(studies.WIDTHS).index
    )
    again = next(row for row in rows if row["trial"] == "again")
    assert float(again["epochs"]) == pytest.approx(4, abs=0.01)
    assert again["loss"] == f"{results[0].loss:.4f}"
    assert table.notes[-1] == "Left out: tiny-x diverged: a loss is not a positive number"


AWKWARD = Table(
    "A | title", ("name", "n"), (("a|b", "1"), ("<b>[red]x\ny*_`", "22")), frozenset({"n"}), ("[/] a note",)
)


def test_markdown_keeps_its_columns_whatever_the_cells_hold():
    lines = tables.as_markdown(AWKWARD).splitlines()
    assert lines[:5] == ["## A \\| title", "", "| name | n |", "| --- | ---: |", "| a\\|b | 1 |"]
    assert lines[5] == "| \\<b>[red]x y\\*\\_\\` | 22 |"
    assert "- [/] a note" in lines


def test_a_terminal_shows_brackets_as_they_are():
    text = printed(AWKWARD)
    assert "<b>[red]x" in text and "[/] a note" in text
