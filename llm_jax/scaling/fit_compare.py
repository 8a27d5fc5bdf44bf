"""Which form of law predicts best: each is fitted to the smaller trials and scored on the best of the larger ones.

Shapes: N trials.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from llm_jax.errors import UserError, require
from llm_jax.scaling import fit_curves
from llm_jax.scaling.fit_budgets import budget_numbers, seeds
from llm_jax.scaling.fit_isoflop import parameters_of
from llm_jax.scaling.fit_parametric import parametric
from llm_jax.scaling.fit_power import fit_power_law
from llm_jax.scaling.trial import TrialResult

Predict = Callable[[TrialResult], float]
MIN_POINTS = 3  # of a straight line


@dataclasses.dataclass(frozen=True)
class Score:
    """What a form predicted for a held-out trial, and what it came to."""

    form: str
    trial: str
    compute: float
    predicted: float
    actual: float
    relative_error: float  # predicted over actual, less one


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scores by form and trial; `errors` has each form's mean |relative error|; `problems` a line for each refusal."""

    scores: tuple[Score, ...]
    errors: dict[str, float]
    fitted: int  # trials that the forms were fitted to
    problems: tuple[str, ...]


def compare(results: Sequence[TrialResult], *, held_out_above: float, embeddings: bool = True) -> Comparison:
    """Fit every form to trials with at most `held_out_above` FLOPs, and predict the compute-efficient ones above.

    All forms are scored on the same trials: a law of compute speaks of efficient trials alone, and could not know that
    a size is a bad choice for its budget, as L(N, D) does.

    Laws of compute alone are fitted to the ends of compute-efficient trials with all their seeds: those that no other
    trial beats with less compute. "frontier of curves" is fitted to the points of all curves on their lower envelope.

    Args:
        results: trials.
        held_out_above: FLOPs; the compute-efficient of the trials with more are predicted.
        embeddings: which N the parametric law counts.

    Raises:
        UserError: no trial is held out, or no form can be fitted.
    """
    small = [result for result in results if result.compute <= held_out_above]
    large = [result for result in results if result.compute > held_out_above]
    require(bool(large), f"no trial has more than {held_out_above:.3g} FLOPs: there is nothing to score the laws on")
    require(bool(small), f"no trial has {held_out_above:.3g} FLOPs or fewer: there is nothing to fit the laws to")
    targets = efficient(large)
    forms: dict[str, Callable[[], Predict]] = {
        "power law": lambda: _power_law(small),
        "power law without L_inf": lambda: _straight(small, np.log, np.exp),
        "parametric L(N, D)": lambda: _parametric(small, embeddings),
        "frontier of curves": lambda: _frontier(small),
        "linear in log C": lambda: _straight(small, np.asarray, np.asarray),
    }
    scores: list[Score] = []
    problems = []
    for form, fit in forms.items():
        try:
            predict = fit()
            scores += [_score(form, each, predict(each)) for each in targets]
        except UserError as error:
            problems.append(f"{form}: {error}")
    require(bool(scores), "no form of law can be fitted to the smaller trials: " + "; ".join(problems))
    errors = {
        form: float(np.mean([abs(score.relative_error) for score in scores if score.form == form]))
        for form in dict.fromkeys(score.form for score in scores)
    }
    return Comparison(tuple(scores), errors, len(small), tuple(problems))


def efficient(results: Sequence[TrialResult]) -> list[TrialResult]:
    """The trials, with all their seeds, whose mean end no other trial reaches with less compute."""
    names = set(fit_curves.frontier(results, ends_only=True).groups)
    return [member for members in seeds(results) for member in members if members[0].name in names]


def _score(form: str, trial: TrialResult, predicted: float) -> Score:
    return Score(form, trial.name, trial.compute, predicted, trial.loss, predicted / trial.loss - 1)


def _power_law(results: Sequence[TrialResult]) -> Predict:
    ends = efficient(results)
    law = fit_power_law([each.compute for each in ends], [each.loss for each in ends])
    return lambda trial: law.predict(trial.compute)


def _frontier(results: Sequence[TrialResult]) -> Predict:
    envelope = fit_curves.frontier(results)
    law = fit_power_law(envelope.compute, envelope.loss, groups=envelope.groups)
    return lambda trial: law.predict(trial.compute)


def _parametric(results: Sequence[TrialResult], embeddings: bool) -> Predict:
    law = parametric(results, embeddings=embeddings)
    repeats = law.repetitions is not None
    return lambda trial: law.predict(
        parameters_of(trial, embeddings), trial.tokens, trial.unique_tokens if repeats else None
    )


def _straight(results: Sequence[TrialResult], scale: Callable, unscale: Callable) -> Predict:
    """A straight line in log compute through the scaled losses."""
    ends = efficient(results)
    compute = [each.compute for each in ends]
    budgets = len(set(budget_numbers(compute)))
    require(
        budgets >= MIN_POINTS,
        f"{budgets} budgets of compute are too few for a line: train at {MIN_POINTS} or more",
    )
    slope, level = np.polyfit(np.log(compute), scale([each.loss for each in ends]), 1)
    return lambda trial: float(unscale(level + slope * np.log(trial.compute)))
