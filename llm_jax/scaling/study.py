"""A whole study: every law that its trials can tell, what it predicts, and the files that show it."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm_jax.errors import UserError
from llm_jax.evaluation.tables import Table, as_markdown, escaped
from llm_jax.scaling import figures, fit, panels, report
from llm_jax.scaling.config import FitConfig
from llm_jax.scaling.learning_rate import Choice
from llm_jax.scaling.panels import Panel
from llm_jax.scaling.report import Prediction
from llm_jax.scaling.trial import TrialResult

Fitted = TypeVar("Fitted")
LAWS, REPORT, FIGURES, PAGE = "laws.json", "report.md", "figures", "figures.html"
COMPARED_RANGE = 5.0  # the forms of law are scored on trials of more than the largest compute over this


@dataclasses.dataclass(frozen=True)
class Laws:
    """What was fitted to the sweep; None where the trials cannot tell, with a line in `problems` that says why.

    The first is the law: least squares, as Baichuan-2 fits it, on the ends of the compute-efficient trials with all
    their seeds. It alone predicts; the others show how much hangs on that choice.
    """

    power: fit.PowerLaw | None
    robust: fit.PowerLaw | None  # the same points, Huber's loss
    curves: fit.PowerLaw | None  # the lower envelope of all curves
    isoflop: fit.IsoFlop | None
    parametric: fit.Parametric | None
    forms: fit.Comparison | None  # fitted to the smaller trials, scored on the largest
    edges: tuple[str, ...]  # a line for each budget whose best size is not known to be enclosed
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that the report tells."""

    results: tuple[TrialResult, ...]  # of the sweep
    laws: Laws
    predictions: tuple[Prediction, ...] = ()
    choices: tuple[Choice, ...] = ()  # of learning rates
    tried: tuple[TrialResult, ...] = ()  # for these choices
    left_out: tuple[str, ...] = ()  # a line for each trial without a result
    held_out: tuple[TrialResult, ...] = ()  # of a results file: runs that are not the sweep's


def fit_laws(results: Sequence[TrialResult], config: FitConfig) -> Laws:
    """Fit everything to the trials of a sweep; what they cannot tell is refused in a line, and the rest goes on."""
    problems: list[str] = []
    options: dict[str, Any] = {"confidence": config.confidence, "draws": config.draws, "seed": config.seed}

    def attempt(name: str, function: Callable[[], Fitted]) -> Fitted | None:
        try:
            return function()
        except UserError as error:
            problems.append(f"{name}: {error}")
            return None

    def power(method: str) -> fit.PowerLaw:
        ends = fit.efficient(results)
        compute, loss = [each.compute for each in ends], [each.loss for each in ends]
        return fit.fit_power_law(compute, loss, method=method, huber_delta=config.huber_delta, **options)

    def curves() -> fit.PowerLaw:
        envelope = fit.frontier(results)
        return fit.fit_power_law(envelope.compute, envelope.loss, groups=envelope.groups, **options)

    def forms() -> fit.Comparison:
        largest = max((each.compute for each in results), default=0.0)
        return fit.compare(results, held_out_above=largest / COMPARED_RANGE)

    return Laws(
        attempt("the law", lambda: power("least_squares")),
        attempt("the robust law", lambda: power("huber")),
        attempt("the law of the curves", curves),
        attempt("the IsoFLOP parabolas", lambda: fit.isoflop(results, **options)),
        attempt("the parametric law", lambda: fit.parametric(results, huber_delta=config.huber_delta, **options)),
        attempt("the comparison of forms", forms),
        tuple(fit.edges(results)),
        tuple(problems),
    )


def predict(law: fit.PowerLaw, size: str, compute: float) -> Prediction:
    """What the law says of one new run's loss."""
    return Prediction(size, compute, law.predict(compute), *law.predict_interval(compute), law.confidence)


def draw(study: Study) -> list[Panel]:
    """The study's figures, as far as its laws were found."""
    laws, drawn = study.laws, []
    if laws.power:
        drawn.append(panels.frontier(study.results, laws.power, study.predictions))
    if laws.isoflop:
        drawn.append(panels.isoflop(study.results, laws.isoflop))
    predicted = [run for made in study.predictions for run in made.actual]
    drawn.append(panels.loss_by_tokens([*study.results, *predicted]))
    if laws.power:
        drawn.append(panels.residuals(study.results, laws.power, study.predictions))
    if study.tried:
        drawn.append(panels.learning_rates(study.tried, study.choices))
    return drawn


def tables(study: Study) -> list[Table]:
    """The study's tables, the law and its prediction first."""
    laws, shown = study.laws, []
    if laws.power:
        law = report.law(laws.power)
        notes = (f"Perhaps above the frontier, since not enclosed: {line}." for line in laws.edges)
        shown.append(dataclasses.replace(law, notes=(*law.notes, *notes)))
    if study.predictions:
        shown.append(report.predictions(study.predictions))
    if laws.robust:
        shown.append(dataclasses.replace(report.law(laws.robust), title="The same points, fitted robustly"))
    if laws.curves:
        shown.append(dataclasses.replace(report.law(laws.curves), title="The lower envelope of all curves"))
    if laws.isoflop:
        shown.append(report.isoflop(laws.isoflop))
    if laws.parametric:
        shown.append(report.parametric(laws.parametric))
    if laws.forms:
        shown.append(report.forms(laws.forms))
    if study.choices:
        shown.append(report.learning_rates(study.choices))
    return [*shown, report.trials(study.results, study.left_out)]


def write(study: Study, command: str, folder: Path) -> None:
    """Write laws.json, report.md, figures/*.png and figures.html."""
    drawn = draw(study)
    for panel in drawn:
        figures.png(panel, folder / FIGURES / f"{panel.name}.png")
    figures.page("Scaling laws", drawn, folder / PAGE)
    values = {
        "command": command,
        **dataclasses.asdict(study.laws),
        "predictions": [dataclasses.asdict(each) for each in study.predictions],
        "learning_rates": [dataclasses.asdict(each) for each in study.choices],
        "left_out": study.left_out,
    }
    write_json(values, folder / LAWS)
    parts = ["# Scaling laws", f"    {command}"]
    parts += [f"Not fitted: {escaped(line)}." for line in study.laws.problems]
    parts += [f"![{panel.title}]({FIGURES}/{panel.name}.png)" for panel in drawn]
    _write(folder / REPORT, "\n\n".join([*parts, *(as_markdown(table) for table in tables(study))]))


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write a table of values, whole or not at all."""
    _write(path, json.dumps(values, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
