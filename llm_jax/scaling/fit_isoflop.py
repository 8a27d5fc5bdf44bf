"""IsoFLOP parabolas: the best size for a compute, and how it grows (Hoffmann et al. 2022, section 3.2).

Shapes: N points, S draws, B budgets.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jax.errors import require
from llm_jax.scaling import fit_noise
from llm_jax.scaling.fit_budgets import best_variants, by_budget
from llm_jax.scaling.fit_checks import check_confidence, check_losses, percentiles
from llm_jax.scaling.fit_noise import Array
from llm_jax.scaling.trial import TrialResult


@dataclasses.dataclass(frozen=True)
class Budget:
    """The trials of one compute, and the parabola c0 + c1 log N + c2 (log N)^2 through their losses."""

    compute: float
    names: tuple[str, ...]  # of the trials
    parameters: tuple[float, ...]
    tokens: tuple[float, ...]
    loss: tuple[float, ...]
    parabola: tuple[float, float, float]
    parameters_optimum: float
    tokens_optimum: float
    loss_minimum: float
    intervals: dict[str, tuple[float, float]]  # of the last three; empty where the noise is not seen


@dataclasses.dataclass(frozen=True)
class Allocation:
    """optimum = coefficient * compute^exponent."""

    coefficient: float
    exponent: float
    interval: tuple[float, float] | None  # of the exponent; None where the noise is not seen

    def at(self, compute: float) -> float:
        """The optimum at a compute."""
        return float(self.coefficient * compute**self.exponent)


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """The best size for each compute, and how it grows. `problems` has a line for each thing left out, and why."""

    budgets: tuple[Budget, ...]
    parameters_law: Allocation
    tokens_law: Allocation
    convention: str  # which parameters N counts: "all" or "non_embedding"
    confidence: float
    problems: tuple[str, ...]


def parameters_of(result: TrialResult, embeddings: bool) -> float:
    """N by either convention: with or without the input embedding and the output head."""
    return float(result.parameters if embeddings else result.non_embedding_parameters)


def isoflop(
    results: Sequence[TrialResult],
    *,
    embeddings: bool = True,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> IsoFlop:
    """Fit a parabola in log N to the losses of each compute; the optima's power laws N ~ C^x and D ~ C^y.

    Of a size's variants at a budget (learning rates, the grid's further keys) the best counts, by its mean over seeds.

    Args:
        results: trials at two budgets of compute or more (the same within 5 %), each with three sizes or more.
        embeddings: N counts all parameters; False leaves out the input embedding and the output head.
        confidence: of the intervals.
        draws: of the bootstrap, which draws the noise about the parabolas (of trials and of their seeds).
        seed: of the bootstrap.

    Raises:
        UserError: fewer than two budgets have a parabola with its minimum between their sizes, or a loss is not
            positive and finite.
    """
    check_confidence(confidence)
    check_losses(results)
    best, problems = best_variants(results)
    found = []
    for trials in by_budget(best):
        found += _enclosed(trials, embeddings, problems)
    require(
        len(found) >= 2,
        "two budgets of compute are needed whose best size lies between others: "
        + ("; ".join(problems) or "there are no trials"),
    )
    optima_SB3 = _draw_optima(found, draws, seed, confidence, problems)
    intervals = [_intervals(optima_SB3, index, confidence) for index in range(len(found))]
    budgets = tuple(dataclasses.replace(budget, intervals=each) for budget, each in zip(found, intervals))
    log_compute_B = np.log([budget.compute for budget in budgets])
    laws = []
    for quantity, name in enumerate(("parameters_optimum", "tokens_optimum")):
        optimum_B = np.log([getattr(budget, name) for budget in budgets])
        drawn_SB = None if optima_SB3 is None else optima_SB3[:, :, quantity]
        laws.append(_allocation(log_compute_B, optimum_B, drawn_SB, confidence))
    convention = "all" if embeddings else "non_embedding"
    return IsoFlop(budgets, laws[0], laws[1], convention, confidence, tuple(problems))


def _enclosed(trials: Sequence[TrialResult], embeddings: bool, problems: list[str]) -> list[Budget]:
    """The budget of these trials, if its minimum lies between its sizes; else none, and a problem."""
    compute = float(np.exp(np.mean(np.log([trial.compute for trial in trials]))))
    parameters_N = np.array([parameters_of(trial, embeddings) for trial in trials])
    tokens_N = np.array([float(trial.tokens) for trial in trials])
    loss_N = np.array([trial.loss for trial in trials])
    if np.unique(parameters_N).size < 3:
        problems.append(f"{compute:.3g} FLOPs: {np.unique(parameters_N).size} sizes, of 3 that a parabola needs")
        return []
    c2, c1, c0 = np.polyfit(np.log(parameters_N), loss_N, 2)
    optimum = np.exp(-c1 / (2 * c2)) if c2 > 0 else np.nan
    if not parameters_N.min() <= optimum <= parameters_N.max():
        problems.append(f"{compute:.3g} FLOPs: the best size is not between the smallest and the largest tried")
        return []
    budget = Budget(
        compute,
        tuple(trial.name for trial in trials),
        tuple(parameters_N.tolist()),
        tuple(tokens_N.tolist()),
        tuple(loss_N.tolist()),
        (float(c0), float(c1), float(c2)),
        float(optimum),
        float(np.exp(_log_tokens(parameters_N, tokens_N, np.log(optimum)))),
        float(c0 - c1**2 / (4 * c2)),
        {},
    )
    return [budget]


def _log_tokens(parameters_N: Array, tokens_N: Array, log_parameters: Array) -> Array:
    """Log tokens of a size at this compute, by the sizes tried: near-linear, as their product with N is near C."""
    centre = np.log(parameters_N).mean()
    coefficients = np.polyfit(np.log(parameters_N) - centre, np.log(tokens_N), 2)
    result: Array = np.polyval(coefficients, log_parameters - centre)
    return result


def _draw_optima(
    budgets: Sequence[Budget], draws: int, seed: int, confidence: float, problems: list[str]
) -> Array | None:
    """Log N, log D and loss at the optimum of each budget for draws of the noise, [S, B, 3]; None = it is not seen."""
    log_N = [np.log(budget.parameters) for budget in budgets]
    fitted_N = [np.polyval(budget.parabola[::-1], log) for budget, log in zip(budgets, log_N)]
    residual_N = np.concatenate([np.log(budget.loss) - np.log(fit) for budget, fit in zip(budgets, fitted_N)])
    labels = [(index, value) for index, budget in enumerate(budgets) for value in budget.parameters]
    group_N = fit_noise.group_indices(labels)
    if int(group_N.max()) + 1 <= 3 * len(budgets):
        problems.append("no intervals: three sizes a budget fit a parabola exactly; train four at one budget or more")
        return None
    noise_SN = fit_noise.estimate(residual_N, group_N, 3 * len(budgets)).draw(np.random.default_rng(seed), draws)
    ends = np.cumsum([log.size for log in log_N])[:-1]
    optima = []
    for budget, log, fit, noise in zip(budgets, log_N, fitted_N, np.split(noise_SN, ends, axis=1)):
        c2, c1, c0 = np.polyfit(log, (fit * np.exp(noise)).T, 2)
        lost = float(np.mean(c2 <= 0))
        if lost > (1 - confidence) / 2:
            problems.append(f"no intervals: noise bends {lost:.0%} of the parabolas at {budget.compute:.3g} FLOPs down")
            return None
        optimum = np.where(c2 > 0, -c1 / (2 * c2), np.nan)
        tokens = _log_tokens(np.array(budget.parameters), np.array(budget.tokens), optimum)
        optima.append(np.stack([optimum, tokens, c0 + c1 * optimum / 2], axis=-1))
    stacked: Array = np.stack(optima, axis=1)
    return stacked[np.isfinite(stacked).all(axis=(1, 2))]


def _intervals(optima_SB3: Array | None, budget: int, confidence: float) -> dict[str, tuple[float, float]]:
    if optima_SB3 is None:
        return {}
    return {
        "parameters_optimum": percentiles(np.exp(optima_SB3[:, budget, 0]), confidence),
        "tokens_optimum": percentiles(np.exp(optima_SB3[:, budget, 1]), confidence),
        "loss_minimum": percentiles(optima_SB3[:, budget, 2], confidence),
    }


def _allocation(log_compute_B: Array, log_optimum_B: Array, drawn_SB: Array | None, confidence: float) -> Allocation:
    exponent, log_coefficient = np.polyfit(log_compute_B, log_optimum_B, 1)
    interval = None
    if drawn_SB is not None:
        interval = percentiles(np.polyfit(log_compute_B, drawn_SB.T, 1)[0], confidence)
    return Allocation(float(np.exp(log_coefficient)), float(exponent), interval)
