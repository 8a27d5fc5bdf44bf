"""Which peak learning rate each size takes, and why: the base's, the best of a small sweep, or muP's."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.errors import UserError
from llm_jax.scaling import flops, sweep
from llm_jax.scaling.config import GridConfig, ScalingConfig, SizeConfig
from llm_jax.scaling.trial import Trial, TrialResult


@dataclasses.dataclass(frozen=True)
class Choice:
    """The peak learning rate of a size and the reason for it."""

    size: str
    rate: float
    why: str


@dataclasses.dataclass(frozen=True)
class _Optimum:
    """The best rate of a size's own sweep; `enclosed` where a lower and a higher rate did worse."""

    size: str
    parameters: int  # without embedding and head
    rate: float
    enclosed: bool
    why: str


def trials(config: ScalingConfig) -> tuple[list[Trial], list[str]]:
    """The trials of the small sweep of learning rates, and a line for each that was left out; see `sweep.expand`."""
    rule = config.learning_rate
    grid = GridConfig(
        sizes=tuple(size for size in _sizes(config) if not rule.sizes or sweep.size_name(size) in rule.sizes),
        tokens_per_parameter=(rule.tokens_per_parameter,),
        vary=(f"optimizer.learning_rate={','.join(map(str, rule.rates))}",),
        seeds=rule.seeds,
    )
    found, problems = sweep.expand(dataclasses.replace(config, grid=grid))
    known = [sweep.size_name(size) for size in _sizes(config)]
    unknown = [f"config.learning_rate.sizes: no size is called {name}" for name in rule.sizes if name not in known]
    return found, unknown + problems


def choose(config: ScalingConfig, results: Sequence[TrialResult] = ()) -> tuple[list[Choice], list[str]]:
    """The learning rate of every size of the grid and of the prediction.

    With the rule `sweep`, a size that was swept takes the vertex of the parabola, in the logarithm of the rate, through
    the best rate tried and its two neighbours (losses averaged over seeds). The others follow the line

        log(rate) = c + s log(parameters without embedding and head)

    fitted to the swept sizes by least squares.

    Args:
      config: the study.
      results: of `trials(config)`; only `sweep` looks at them.

    Returns:
      A choice per size, and a line for every one that stands on weak ground, saying what to change.
    """
    models = _models(config)
    rule, base = config.learning_rate, config.base.optimizer.learning_rate
    if rule.rule == "sweep":
        return _of_sweep(config, models, results)
    why = "the base run's"
    if rule.rule == "mup":
        why += f", which muP keeps at every width: it holds at hidden size {rule.mup_base_width}"
    return [Choice(name, base, why) for name in models], []


def _models(config: ScalingConfig) -> dict[str, ModelConfig]:
    """Every size's model by its name; sizes that make none are `sweep.expand`'s to report."""
    models: dict[str, ModelConfig] = {}
    for size in _sizes(config):
        with contextlib.suppress(UserError):
            models.setdefault(sweep.size_name(size), sweep.sized(config.base.model, size))
    return models


def _of_sweep(
    config: ScalingConfig, models: Mapping[str, ModelConfig], results: Sequence[TrialResult]
) -> tuple[list[Choice], list[str]]:
    base, problems = config.base.optimizer.learning_rate, list[str]()
    optima = {name: _optimum(name, results, config.learning_rate.rates, problems) for name in models}
    known = [optimum for optimum in optima.values() if optimum is not None]
    if not known:
        problems.append(f"no size's sweep of learning rates has a result: all take the base run's {base:g}")
        return [Choice(name, base, "the base run's, for want of a swept one") for name in models], problems
    choices = []
    for name, model in models.items():
        optimum = optima[name]
        if optimum is None:
            choices.append(_from_others(name, flops.count(model).non_embedding, known))
        else:
            choices.append(Choice(name, optimum.rate, optimum.why))
    return choices, problems


def _sizes(config: ScalingConfig) -> list[SizeConfig]:
    """The grid's sizes, and the one to predict."""
    return [*config.grid.sizes, *([config.prediction.size] if config.prediction.compute else [])]


def _optimum(size: str, results: Sequence[TrialResult], tried: Sequence[float], problems: list[str]) -> _Optimum | None:
    """The best rate of one size's results; None without any."""
    own = [result for result in results if result.size == size]
    if not own:
        return None
    rates = sorted({result.learning_rate for result in own})
    losses = [mean(result.loss for result in own if result.learning_rate == rate) for rate in rates]
    best, parameters = int(np.argmin(losses)), own[0].non_embedding_parameters
    if 0 < best < len(rates) - 1:
        rate = _vertex(rates[best - 1 : best + 2], losses[best - 1 : best + 2])
        why = f"the lowest point of a parabola through {', '.join(f'{r:g}' for r in rates[best - 1 : best + 2])}"
        return _Optimum(size, parameters, rate, True, f"its own sweep of {len(rates)} rates: {why}")
    rate = rates[best]
    if rate in (min(tried), max(tried)):
        side, wider = ("smallest", "smaller") if rate == min(tried) else ("largest", "larger")
        problems.append(
            f"size {size}: the best learning rate, {rate:g}, is the {side} one tried: add {wider} ones to "
            "config.learning_rate.rates"
        )
        return _Optimum(size, parameters, rate, False, f"the best of its own sweep, though the {side} one tried")
    problems.append(f"size {size}: the learning rates beside the best one, {rate:g}, have no results to compare with")
    return _Optimum(size, parameters, rate, False, "the best of its own sweep; a rate beside it has no result")


def _vertex(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at the lowest point of the parabola through three points of (log rate, loss), the middle one lowest."""
    x, y = np.log(rates), np.asarray(losses)
    left, right = (y[0] - y[1]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    if left + right == 0:  # three equal losses
        return float(rates[1])
    # The parabola's slope is -left midway between the first two points, and right midway between the last two.
    middle = (x[0] + x[1]) / 2, (x[1] + x[2]) / 2
    return float(math.exp(middle[0] + left / (left + right) * (middle[1] - middle[0])))


def _from_others(size: str, parameters: int, optima: Sequence[_Optimum]) -> Choice:
    """The rate of a size that was not swept, from those that were."""
    enclosed = [optimum for optimum in optima if optimum.enclosed]
    points = enclosed if len({optimum.parameters for optimum in enclosed}) > 1 else list(optima)
    if len({optimum.parameters for optimum in points}) < 2:
        nearest = points[0]
        return Choice(size, nearest.rate, f"that of size {nearest.size}, the only one swept")
    logs = np.log([optimum.parameters for optimum in points])
    slope, constant = np.polyfit(logs, np.log([optimum.rate for optimum in points]), 1)
    rate = math.exp(constant + slope * math.log(parameters))
    names = ", ".join(optimum.size for optimum in points)
    return Choice(size, rate, f"rate = {math.exp(constant):.3g} * N^{slope:.3f} fitted to sizes {names}")
