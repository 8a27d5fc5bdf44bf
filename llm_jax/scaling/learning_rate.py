"""Which peak learning rate each size takes, and why: the base's, the best of a small sweep, or muP's."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.errors import UserError, require
from llm_jax.scaling import flops, sweep
from llm_jax.scaling.config import GridConfig, LearningRateConfig, ScalingConfig, SizeConfig
from llm_jax.scaling.trial import Trial, TrialResult

MUP_TOLERANCE = 0.02  # of ratios that should be equal, for whole numbers


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
    """The trials of the small sweep of learning rates, and a line for each that was left out; see `sweep.expand`.

    Only sizes of the grid are swept: the one to predict is not to be trained before its prediction.
    """
    rule, names = config.learning_rate, [sweep.size_name(size) for size in config.grid.sizes]
    unknown = [f"config.learning_rate.sizes: no size is called {name}" for name in rule.sizes if name not in names]
    sizes = tuple(size for size, name in zip(config.grid.sizes, names) if not rule.sizes or name in rule.sizes)
    require(bool(sizes) or not unknown, "; ".join(unknown))
    grid = GridConfig(
        sizes=sizes,
        tokens_per_parameter=(rule.tokens_per_parameter,),
        vary=(f"optimizer.learning_rate={','.join(map(str, rule.rates))}",),
        seeds=rule.seeds,
    )
    found, problems = sweep.expand(dataclasses.replace(config, grid=grid))
    return found, unknown + problems


def choose(config: ScalingConfig, results: Sequence[TrialResult] = ()) -> tuple[list[Choice], list[str]]:
    """The learning rate of every size of the grid and of the prediction.

    With the rule `sweep`, a size that was swept takes the vertex of the parabola, in the logarithm of the rate, through
    the best rate tried and its two neighbours: losses averaged over the seeds, where all of them finished. A rate that
    did not counts as worse, and the best rate beside such a one is taken as it is. The other sizes follow the line

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
    if rule.rule == "mup":
        why = f"the base run's, which muP keeps at every width: it holds at hidden size {rule.mup_base_width}"
        return [Choice(name, base, why) for name in models], _more_than_width(models)
    return [Choice(name, base, "the base run's") for name in models], []


def _more_than_width(models: Mapping[str, ModelConfig]) -> list[str]:
    """A line for each feature other than the width in which the sizes differ, so that muP does not relate them."""
    features: dict[str, Callable[[ModelConfig], float]] = {
        "head_dim": lambda model: model.head_dim,
        "ffn_size / hidden_size": lambda model: model.ffn_size / model.hidden_size,
        "num_layers": lambda model: model.num_layers,
    }
    problems = []
    for feature, of in features.items():
        values = {name: of(model) for name, model in models.items()}
        low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        if values[high] > values[low] * (1 + MUP_TOLERANCE):
            problems.append(
                f"rule mup: {feature} is {values[low]:.4g} of size {low} and {values[high]:.4g} of {high}, but muP "
                "carries the learning rate over widths alone: make it equal"
            )
    return problems


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
    optima = {name: _optimum(name, results, config.learning_rate, problems) for name in models}
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


def _optimum(
    size: str, results: Sequence[TrialResult], rule: LearningRateConfig, problems: list[str]
) -> _Optimum | None:
    """The best rate of one size's results; None if no rate has one for every seed."""
    own = [result for result in results if result.size == size]
    rates = sorted(set(rule.rates))
    losses = [_loss(own, rate, rule.seeds) for rate in rates]
    best = int(np.argmin(losses))
    rate, sweep_of = rates[best], f"its own sweep of {len(rates)} rates"
    if math.isinf(losses[best]):
        if own:
            problems.append(f"size {size}: no learning rate has a result for every seed")
        return None
    optimum = functools.partial(_Optimum, size, own[0].non_embedding_parameters)
    if best in (0, len(rates) - 1):
        side, wider = ("smallest", "smaller") if best == 0 else ("largest", "larger")
        problems.append(
            f"size {size}: the best learning rate, {rate:g}, is the {side} one tried: add {wider} ones to "
            "config.learning_rate.rates"
        )
        return optimum(rate, False, f"the best of {sweep_of}, though the {side} one")
    beside = slice(best - 1, best + 2)
    without = " and ".join(f"{r:g}" for r, loss in zip(rates[beside], losses[beside]) if math.isinf(loss))
    if without:
        problems.append(f"size {size}: beside the best learning rate, {rate:g}, {without} has not finished every seed")
        return optimum(rate, True, f"the best of {sweep_of}; {without} beside it, not finished, counts as worse")
    why = f"{sweep_of}: the lowest point of a parabola through {', '.join(f'{r:g}' for r in rates[beside])}"
    return optimum(_rounded(_vertex(rates[beside], losses[beside])), True, why)


def _loss(results: Sequence[TrialResult], rate: float, seeds: Sequence[int]) -> float:
    """The mean over seeds; infinite unless all of them finished, lest those that survive a high rate speak for it."""
    losses = {result.seed: result.loss for result in results if result.learning_rate == rate}
    return mean(losses[seed] for seed in seeds) if set(seeds) <= set(losses) else math.inf


def _rounded(rate: float) -> float:
    """To 4 digits, so that a trial does not depend on a machine's last bit."""
    return float(f"{rate:.4g}")


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
    rate = _rounded(math.exp(constant + slope * math.log(parameters)))
    names = ", ".join(optimum.size for optimum in points)
    return Choice(size, rate, f"rate = {math.exp(constant):.3g} * N^{slope:.3f} fitted to sizes {names}")
