"""The tables of a scaling study, from plain data."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from llm_jax.evaluation.tables import Table, quantity
from llm_jax.scaling.fit import Allocation, Comparison, IsoFlop, Parametric, PowerLaw
from llm_jax.scaling.learning_rate import Choice
from llm_jax.scaling.trial import TrialResult

NO_FLOOR = (
    "The interval of L_inf starts at 0: these runs also allow losses that never level off, so that only b and "
    "predictions near the runs are known."
)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a law, fitted without these runs, said of a larger model, and the runs that showed how right it was."""

    size: str
    compute: float  # training FLOPs of a run
    predicted: float  # loss, nats per token
    low: float  # ends of the interval for one new run
    high: float
    confidence: float  # of the interval, such as 0.95
    actual: tuple[TrialResult, ...] = ()  # one per seed; () = not trained yet

    @property
    def mean(self) -> float:
        """Mean loss of the actual runs; NaN without any."""
        return statistics.fmean(run.loss for run in self.actual) if self.actual else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of that mean over the seeds; NaN for fewer than two."""
        losses = [run.loss for run in self.actual]
        return statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan

    @property
    def relative_error(self) -> float:
        """(predicted - mean) / mean; NaN without runs."""
        return self.predicted / self.mean - 1


def law(fitted: PowerLaw) -> Table:
    """The coefficients with their intervals."""
    span = f"{min(fitted.compute):.3g} to {max(fitted.compute):.3g} FLOPs"
    return Table(
        title="The law: loss = a * compute^b + L_inf",
        headings=_coefficient_headings(fitted.confidence),
        rows=_coefficients({"a": fitted.a, "b": fitted.b, "L_inf": fitted.l_inf}, fitted.intervals),
        numbers=frozenset({"value"}),
        notes=(
            "compute: training FLOPs; loss: nats per token.",
            f"Fitted by {fitted.method.replace('_', ' ')} to {len(fitted.loss)} points of {span}; R² = "
            f"{fitted.r_squared:.4f}, and runs scatter by {fitted.noise:.2%} of their loss about it.",
            *(() if fitted.floor_seen else (NO_FLOOR,)),
        ),
    )


def parametric(fitted: Parametric) -> Table:
    """The constants of L(N, D) with their intervals."""
    values = {"E": fitted.e, "A": fitted.a, "B": fitted.b, "alpha": fitted.alpha, "beta": fitted.beta}
    if fitted.repetitions is not None:
        values["repetitions"] = fitted.repetitions
    low, high = fitted.intervals["parameters_exponent"]
    counted = "all" if fitted.convention == "all" else "without embedding and output head"
    cost = f"{fitted.cost[0]:.3g} * N^{1 + fitted.cost[1]:.3f} * D FLOPs"
    return Table(
        title="The parametric law: loss = E + A / N^alpha + B / D^beta",
        headings=_coefficient_headings(fitted.confidence),
        rows=_coefficients(values, fitted.intervals),
        numbers=frozenset({"value"}),
        notes=(
            f"Loss: nats per token; N: parameters ({counted}); D: tokens. Fitted to {len(fitted.loss)} trials, which "
            f"scatter by {fitted.noise:.2%} of their loss about it.",
            f"By this law and the trials' own cost, {cost}, the best N grows as compute to the power "
            f"{fitted.parameters_exponent:.3f} ({low:.3f} to {high:.3f}).",
            *(f"Left out: {problem}." for problem in fitted.problems),
        ),
    )


def _coefficient_headings(confidence: float) -> tuple[str, ...]:
    return ("coefficient", "value", f"{confidence:.0%} interval")


def _coefficients(
    values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]
) -> tuple[tuple[str, ...], ...]:
    return tuple((name, f"{value:.4g}", _range(intervals[name.lower()])) for name, value in values.items())


def _range(interval: tuple[float, float]) -> str:
    return "{:.4g} to {:.4g}".format(*interval)


def isoflop(found: IsoFlop) -> Table:
    """The best size and tokens of every budget, with the interval of the size."""
    rows = tuple(
        (
            f"{budget.compute:.3g}",
            quantity(budget.parameters_optimum),
            " to ".join(map(quantity, budget.intervals.get("parameters_optimum", ()))),
            quantity(budget.tokens_optimum),
            f"{budget.tokens_optimum / budget.parameters_optimum:.3g}",
            f"{budget.loss_minimum:.4f}",
        )
        for budget in found.budgets
    )
    counted = "all parameters" if found.convention == "all" else "parameters without embedding and output head"
    headings = ("FLOPs", "best size", f"{found.confidence:.0%} interval", "tokens", "tokens per parameter", "loss")
    return Table(
        title="The best size for a budget, by IsoFLOP parabolas",
        headings=headings,
        rows=rows,
        numbers=frozenset({*headings} - {headings[2]}),
        notes=(
            f"Sizes are {counted}. Best size = {_allocation(found.parameters_law)}; best tokens = "
            f"{_allocation(found.tokens_law)}.",
            *(f"Left out: {problem}" for problem in found.problems),
        ),
    )


def _allocation(fitted: Allocation) -> str:
    between = f" (exponent {fitted.interval[0]:.3f} to {fitted.interval[1]:.3f})" if fitted.interval else ""
    return f"{fitted.coefficient:.3g} * compute^{fitted.exponent:.3f}{between}"


def forms(comparison: Comparison) -> Table:
    """How well each form of law, fitted to the smaller trials, predicts the larger ones; the best one first."""
    rows = []
    for form, error in sorted(comparison.errors.items(), key=lambda item: item[1]):
        worst = max((score for score in comparison.scores if score.form == form), key=lambda s: abs(s.relative_error))
        rows.append((form, f"{error:.2%}", f"{worst.relative_error:+.2%}", worst.trial))
    larger = len({score.trial for score in comparison.scores})
    return Table(
        title="Forms of law, by how they predict larger trials",
        headings=("form", "mean error", "largest error", "of trial"),
        rows=tuple(rows),
        numbers=frozenset({"mean error", "largest error"}),
        notes=(
            f"Fitted to the {comparison.fitted} smaller trials, scored on the {larger} compute-efficient ones of the "
            "larger; the mean is of the errors' sizes.",
            *(f"Not fitted: {problem}" for problem in comparison.problems),
        ),
    )


def predictions(made: Sequence[Prediction]) -> Table:
    """What was predicted beside every actual run, and their mean."""
    rows: list[tuple[str, ...]] = []
    for one in made:
        stated = (one.size, f"{one.compute:.3g}", f"{one.predicted:.4f}", f"{one.low:.4f} to {one.high:.4f}")
        rows += [
            (*stated, f"seed {run.seed}", f"{run.loss:.4f}", _error(one.predicted, run.loss)) for run in one.actual
        ]
        spread = f" ± {one.standard_error:.4f}" if len(one.actual) > 1 else ""
        if one.actual:
            rows.append(
                (
                    *stated,
                    "mean ± standard error" if spread else "mean",
                    f"{one.mean:.4f}{spread}",
                    _error(one.predicted, one.mean),
                )
            )
        else:
            rows.append((*stated, "not trained", "", ""))
    confidence = f"{made[0].confidence:.0%} " if made else ""
    return Table(
        title="The prediction against the actual loss",
        headings=("size", "FLOPs", "predicted", f"{confidence}interval", "run", "actual", "error"),
        rows=tuple(rows),
        numbers=frozenset({"FLOPs", "predicted", "actual", "error"}),
        notes=("The law had not seen these runs. The interval is for one new run; error = predicted / actual - 1.",),
    )


def _error(predicted: float, actual: float) -> str:
    return f"{predicted / actual - 1:+.2%}"


def learning_rates(choices: Sequence[Choice]) -> Table:
    """Each size's peak learning rate, and why."""
    return Table(
        title="Learning rates",
        headings=("size", "peak learning rate", "why"),
        rows=tuple((choice.size, f"{choice.rate:.3g}", choice.why) for choice in choices),
        numbers=frozenset({"peak learning rate"}),
    )


def trials(results: Sequence[TrialResult], left_out: Sequence[str] = ()) -> Table:
    """Every trial's size, budget and loss; below it what was left out of the study, and why."""
    ordered = sorted(results, key=lambda run: (run.parameters, run.compute, run.name))
    rows = tuple(
        (
            run.name,
            quantity(run.parameters),
            quantity(run.non_embedding_parameters),
            quantity(run.tokens),
            f"{run.tokens / run.parameters:.3g}",
            f"{run.tokens / run.unique_tokens:.2f}",
            f"{run.compute:.3g}",
            f"{run.learning_rate:.3g}",
            f"{run.loss:.4f}",
        )
        for run in ordered
    )
    headings = ("trial", "parameters", "without embeddings", "tokens", "tokens per parameter", "epochs", "FLOPs",
                "learning rate", "loss")  # fmt: skip
    return Table(
        title="The trials",
        headings=headings,
        rows=rows,
        numbers=frozenset(headings[1:]),
        notes=("Held-out loss in nats per token.", *(f"Left out: {line}" for line in left_out)),
    )
