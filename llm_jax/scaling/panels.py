"""What the figures of a scaling study show, as plain data: `figures` draws the same panel as PNG and as HTML."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from llm_jax.evaluation.tables import quantity
from llm_jax.scaling.fit import Budget, IsoFlop, PowerLaw
from llm_jax.scaling.learning_rate import Choice
from llm_jax.scaling.report import Prediction
from llm_jax.scaling.trial import TrialResult

LAW_COLOUR = "#222222"
PREDICTED_COLOUR = "#D55E00"  # of Wong's palette, like the next; neither is among `SIZE_COLOURS` for any eye
ACTUAL_COLOUR = "#000000"
SIZE_COLOURS = colormaps["viridis"]
DARKEST, LIGHTEST = 0.05, 0.82  # of them; the yellow end hardly shows on white
LAW_POINTS = 200
LOSS_LABEL = "held-out loss (nats per token)"
COMPUTE_LABEL = "training compute (FLOPs)"


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of a panel."""

    label: str
    log: bool = True
    numbers: str = "plain"  # plain: 0.003; power: 10^15; quantity: 1.2M


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of one kind: a line, markers, or both. With `low` and `high`, a line has a band and markers have bars."""

    label: str  # its entry in the legend; series of one label share it, "" has none
    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: str
    hover: tuple[str, ...] = ()  # one text per point
    line: str = ""  # solid, dashed, dotted; "" = none
    marker: str = ""  # circle, star, diamond; "" = none
    opacity: float = 1.0
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
    """One figure."""

    name: str  # of its file
    title: str
    caption: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]


LOSS = Axis(LOSS_LABEL)
COMPUTE = Axis(COMPUTE_LABEL, numbers="power")


def frontier(results: Sequence[TrialResult], law: PowerLaw, predictions: Sequence[Prediction] = ()) -> Panel:
    """Loss by compute of every run, the fitted law, and what it predicts beside what came of it.

    The form of figure 4 of the Baichuan-2 report. The law is solid over the compute that it was fitted to.
    """
    curves = _curves([*results, *_actual(predictions)], lambda run: run.compute / run.tokens)
    return Panel(
        name="frontier",
        title="Loss by training compute, and the fitted law",
        caption="Every thin line is a run, from its first evaluation to its end (dot). The black line is the law, with "
        f"its {law.confidence:.0%} interval; where it is dashed it predicts. The star was predicted from smaller runs "
        "alone, its bar is the interval for one new run; the diamonds are what came of it.",
        x=COMPUTE,
        y=LOSS,
        series=(*curves, *_law(law, predictions), *_predictions(predictions)),
    )


def loss_by_tokens(results: Sequence[TrialResult]) -> Panel:
    """Every run's held-out loss by the tokens it had seen."""
    return Panel(
        name="loss_by_tokens",
        title="Loss by training tokens, by size",
        caption="Held-out loss during training. Learning rates decay over the whole of a run, so that only its end "
        "(dot) shows what its tokens are worth.",
        x=Axis("training tokens", numbers="quantity"),
        y=LOSS,
        series=tuple(_curves(results, lambda run: 1.0)),
    )


def residuals(results: Sequence[TrialResult], law: PowerLaw, predictions: Sequence[Prediction] = ()) -> Panel:
    """How far the points that the law was fitted to lie from it, and the predicted runs, in per cent of its loss.

    A point takes the colour and the name of the run in `results` that has its compute and its loss.
    """
    actual = _actual(predictions)
    ends = (min(law.compute), max([*law.compute, *(run.compute for run in actual)]))
    series = [Series("the law", ends, (0.0, 0.0), LAW_COLOUR, line="solid")]
    left = collections.Counter(zip(law.compute, law.loss))
    for size in _sizes([*results, *actual]):
        own, texts = [], []
        for run, tokens, point in _points(size.runs):
            if left[point]:
                left[point] -= 1
                own.append(point)
                texts.append(_hover(run, tokens, point[1]))
        series += _residuals(law, own, size.label, size.colour, tuple(texts), "circle")
    others = list(left.elements())
    hovers = tuple(f"{c:.3g} FLOPs: loss {loss:.4f}" for c, loss in others)
    series += _residuals(law, others, "fitted points", LAW_COLOUR, hovers, "circle")
    ends_of_actual = [(run.compute, run.loss) for run in actual]
    series += _residuals(law, ends_of_actual, "predicted runs", PREDICTED_COLOUR, _hovers(actual), "diamond")
    return Panel(
        name="residuals",
        title="How far each point is from the law",
        caption="Above zero, a run is worse than the law says. A trend or a bend along the compute would say that the "
        "law has the wrong form. Diamonds had no part in the fit.",
        x=COMPUTE,
        y=Axis("(loss - law) / law (%)", log=False),
        series=tuple(series),
    )


def isoflop(results: Sequence[TrialResult], found: IsoFlop) -> Panel:
    """Loss by size for every budget of compute, the parabolas through them, and their lowest points."""
    shades = np.linspace(DARKEST, LIGHTEST, len(found.budgets))
    series: list[Series] = []
    for budget, shade in zip(found.budgets, shades):
        series += _budget(results, budget, to_hex(SIZE_COLOURS(shade)))
    sizes = tuple(budget.parameters_optimum for budget in found.budgets)
    losses = tuple(budget.loss_minimum for budget in found.budgets)
    hover = tuple(_optimum_hover(budget) for budget in found.budgets)
    series.append(Series("best size", sizes, losses, PREDICTED_COLOUR, hover, line="dotted", marker="star"))
    counted = "parameters" if found.convention == "all" else "parameters without embedding and output head"
    return Panel(
        name="isoflop",
        title="Loss by size, for the same compute",
        caption="Every colour is a budget of compute: dots are runs, the curve is a parabola in the logarithm of the "
        f"size. The best size grows as compute to the power {found.parameters_law.exponent:.2f}."
        + "".join(f"\nLeft out: {problem}." for problem in found.problems),
        x=Axis(counted, numbers="quantity"),
        y=LOSS,
        series=tuple(series),
    )


def learning_rates(tried: Sequence[TrialResult], choices: Sequence[Choice]) -> Panel:
    """What each peak learning rate costs against the best one that the size tried, and the chosen rate; seeds averaged.

    Differences, because sizes differ in loss by more than rates do.
    """
    chosen = {choice.size: choice.rate for choice in choices}
    lines, stars = [], []
    for size in _sizes(tried):
        losses = _mean_by_rate(size.runs)
        best = min(losses.values())
        hover = tuple(f"{size.label}\nlearning rate {rate:.3g}: mean loss {y:.4f}" for rate, y in losses.items())
        above = tuple(loss - best for loss in losses.values())
        lines.append(Series(size.label, tuple(losses), above, size.colour, hover, line="solid", marker="circle"))
        if size.name in chosen:
            stars.append(_star(size, chosen[size.name], lines[-1]))
    return Panel(
        name="learning_rates",
        title="What a learning rate costs, by size",
        caption="Runs that differ in nothing but the peak learning rate: their loss less that of the best rate tried "
        "for the size. The star is the rate that the size takes; it need not be one of those tried.",
        x=Axis("peak learning rate"),
        y=Axis("loss above the best rate's (nats per token)", log=False),
        series=(*lines, *stars),
    )


@dataclasses.dataclass(frozen=True)
class _Size:
    """The runs of one size, and how they look in a panel."""

    name: str
    label: str
    colour: str
    runs: tuple[TrialResult, ...]


def _sizes(runs: Sequence[TrialResult]) -> list[_Size]:
    """The runs by size, from the smallest, dark, to the largest, light."""
    by_size: dict[tuple[int, str], list[TrialResult]] = {}
    for run in runs:
        by_size.setdefault((run.parameters, run.size), []).append(run)
    shades = np.linspace(DARKEST, LIGHTEST, len(by_size))
    return [
        _Size(name, f"{name} ({quantity(parameters)})", to_hex(SIZE_COLOURS(shade)), tuple(members))
        for ((parameters, name), members), shade in zip(sorted(by_size.items()), shades)
    ]


def _actual(predictions: Sequence[Prediction]) -> list[TrialResult]:
    return [run for prediction in predictions for run in prediction.actual]


def _curves(runs: Sequence[TrialResult], per_token: Callable[[TrialResult], float]) -> Iterator[Series]:
    """A line per run over tokens times `per_token`, and a dot at its end."""
    for size in _sizes(runs):
        for run in size.runs:
            tokens, losses = zip(*run.curve)
            x = tuple(t * per_token(run) for t in tokens)
            hover = tuple(_hover(run, t, loss) for t, loss in run.curve)
            yield Series(size.label, x, losses, size.colour, hover, line="solid", opacity=0.6)
            yield Series(size.label, x[-1:], losses[-1:], size.colour, hover[-1:], marker="circle")


def _hover(run: TrialResult, tokens: float, loss: float) -> str:
    """What a reader wants to know of a point."""
    return (
        f"{run.name}\nloss {loss:.4f} after {quantity(tokens)} tokens\n{run.compute * tokens / run.tokens:.3g} FLOPs, "
        f"{quantity(run.parameters)} parameters\nlearning rate {run.learning_rate:.3g}, seed {run.seed}"
    )


def _hovers(runs: Sequence[TrialResult]) -> tuple[str, ...]:
    return tuple(_hover(run, run.tokens, run.loss) for run in runs)


def _law(law: PowerLaw, predictions: Sequence[Prediction]) -> Iterator[Series]:
    """The law over the points that it was fitted to, and dashed from there to the predictions."""
    least, most = min(law.compute), max(law.compute)
    yield _law_between(law, least, most, "fitted law", "solid")
    furthest = max([most, *(prediction.compute for prediction in predictions)])
    if furthest > most:
        yield _law_between(law, most, furthest, "law, extrapolated", "dashed")


def _law_between(law: PowerLaw, start: float, end: float, label: str, line: str) -> Series:
    compute = _floats(np.geomspace(start, end, LAW_POINTS))
    loss = tuple(law.predict(c) for c in compute)
    low, high = zip(*(law.law_interval(c) for c in compute))
    hover = tuple(
        f"{label}\n{c:.3g} FLOPs: loss {y:.4f} ({bottom:.4f} to {top:.4f})"
        for c, y, bottom, top in zip(compute, loss, low, high)
    )
    return Series(label, compute, loss, LAW_COLOUR, hover, line, low=low, high=high)


def _predictions(predictions: Sequence[Prediction]) -> Iterator[Series]:
    """A star with its interval, and the actual runs' ends as diamonds."""
    for prediction in predictions:
        hover = (
            f"predicted for {prediction.size}\n{prediction.compute:.3g} FLOPs: loss {prediction.predicted:.4f} "
            f"({prediction.low:.4f} to {prediction.high:.4f})"
        )
        yield Series(
            "predicted", (prediction.compute,), (prediction.predicted,), PREDICTED_COLOUR, (hover,), marker="star",
            low=(prediction.low,), high=(prediction.high,),
        )  # fmt: skip
        runs = prediction.actual
        if runs:
            compute, losses = tuple(run.compute for run in runs), tuple(run.loss for run in runs)
            yield Series("actual", compute, losses, ACTUAL_COLOUR, _hovers(runs), marker="diamond")


def _points(runs: Sequence[TrialResult]) -> Iterator[tuple[TrialResult, int, tuple[float, float]]]:
    """Every run's end, then what lies before it: the run, its tokens so far, and (compute, loss)."""
    for run in runs:
        yield run, run.tokens, (run.compute, run.loss)
    for run in runs:
        for tokens, loss in run.curve[:-1]:
            yield run, tokens, (run.compute * tokens / run.tokens, loss)


def _residuals(
    law: PowerLaw,
    points: Sequence[tuple[float, float]],
    label: str,
    colour: str,
    hover: tuple[str, ...],
    marker: str,
) -> list[Series]:
    """Per cent above the law of points of (compute, loss); no series where there are none."""
    if not points:
        return []
    compute = tuple(c for c, _ in points)
    above = tuple(100 * (loss / law.predict(c) - 1) for c, loss in points)
    return [Series(label, compute, above, colour, hover, marker=marker)]


def _budget(results: Sequence[TrialResult], budget: Budget, colour: str) -> Iterator[Series]:
    """The runs of one budget, and the parabola over their sizes."""
    label = f"{budget.compute:.2g} FLOPs"
    hovers = {run.name: _hover(run, run.tokens, run.loss) for run in results}
    hover = tuple(hovers.get(name, f"{name}\nloss {loss:.4f}") for name, loss in zip(budget.names, budget.loss))
    yield Series(label, budget.parameters, budget.loss, colour, hover, marker="circle")
    sizes = np.geomspace(min(budget.parameters), max(budget.parameters), LAW_POINTS)
    losses = np.polyval(budget.parabola[::-1], np.log(sizes))
    yield Series(label, _floats(sizes), _floats(losses), colour, line="solid")


def _optimum_hover(budget: Budget) -> str:
    between = ""
    if budget.intervals:
        low, high = budget.intervals["parameters_optimum"]
        between = f" ({quantity(low)} to {quantity(high)})"
    return (
        f"best for {budget.compute:.2g} FLOPs\n{quantity(budget.parameters_optimum)} parameters{between}\n"
        f"{quantity(budget.tokens_optimum)} tokens, loss {budget.loss_minimum:.4f}"
    )


def _mean_by_rate(runs: Sequence[TrialResult]) -> dict[float, float]:
    """Learning rate -> mean loss over its runs, ascending."""
    rates = sorted({run.learning_rate for run in runs})
    return {rate: statistics.fmean(run.loss for run in runs if run.learning_rate == rate) for rate in rates}


def _star(size: _Size, rate: float, line: Series) -> Series:
    """The chosen rate, on the line through the tried ones."""
    height = float(np.interp(math.log(rate), np.log(line.x), line.y))
    hover = (f"{size.label}\nchosen learning rate {rate:.3g}",)
    return Series("chosen", (rate,), (height,), PREDICTED_COLOUR, hover, marker="star")


def _floats(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
