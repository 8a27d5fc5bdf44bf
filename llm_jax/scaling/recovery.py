"""How well the fits recover laws that are known: coverage of their intervals on synthetic trials with noise.

Shapes: N points, G groups.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.errors import UserError, require
from llm_jax.scaling import fit
from llm_jax.scaling.fit_noise import Array
from llm_jax.scaling.trial import TrialResult

EXTRAPOLATION = 10.0  # prediction at so many times the largest compute
# What an interval said of a quantity: estimate, low, high, and the value that it should hold.
Said = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A known law L(C) = amplitude * (C / middle)^b + l_inf and the trials that see it through noise."""

    name: str
    sizes: int
    noise_between: float  # relative, of a size: its seeds share it
    noise_within: float  # relative, of a seed
    seeds: int = 3
    single_sizes: int = 3  # so many of the largest sizes have one seed
    decades: float = 3.0
    largest: float = 1e21
    amplitude: float = 1.0
    b: float = -0.154  # the exponent along Chinchilla's optimum, alpha * beta / (alpha + beta)
    l_inf: float = 1.69


@dataclasses.dataclass(frozen=True)
class ParametricScenario:
    """A known L(N, D), Hoffmann et al. 2022's by default, and a grid of trials that see it through noise."""

    name: str
    noise: float = 0.004  # relative, of a seed
    sizes: tuple[float, ...] = tuple(np.geomspace(1e7, 3e9, 7).tolist())
    tokens: tuple[float, ...] = tuple(np.geomspace(2e8, 6e10, 4).tolist())
    seeds: int = 2
    single_sizes: int = 4  # so many of the largest sizes have one seed
    e: float = 1.69
    a: float = 406.4
    b: float = 410.7
    alpha: float = 0.34
    beta: float = 0.28

    def loss(self, parameters: float, tokens: float) -> float:
        """The law's."""
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def best(self, compute: float) -> tuple[float, float]:
        """The parameters and the tokens with the least loss at 6 FLOPs each: Hoffmann et al. 2022, equation 4."""
        ratio = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * (compute / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, compute / 6 / parameters


@dataclasses.dataclass(frozen=True)
class EfficientScenario:
    """Trials of a known L(N, D) at budgets of compute; L(C) is fitted to those that `fit.efficient` picks.

    No size is the best one of its budget exactly, and where a budget has one seed the luckiest of its sizes is picked.
    """

    name: str
    law: ParametricScenario = ParametricScenario("Hoffmann et al.'s law")
    budgets: tuple[float, ...] = tuple(np.geomspace(1e19, 1e22, 7).tolist())
    sizes: tuple[float, ...] = tuple(np.geomspace(2e7, 2e10, 16).tolist())
    tokens_per_parameter: tuple[float, float] = (2.0, 200.0)
    seeds: int = 3
    single_budgets: int = 3  # so many of the largest budgets have one seed


SCENARIOS = (
    Scenario("8 sizes; seeds differ by 0.4 %", 8, 0.0, 0.004),
    Scenario("6 sizes; seeds differ by 0.4 %", 6, 0.0, 0.004),
    Scenario("5 sizes; seeds differ by 0.4 %", 5, 0.0, 0.004),
    Scenario("8 sizes; sizes by 0.3 %, seeds by 0.3 %", 8, 0.003, 0.003),
    Scenario("7 sizes; sizes by 0.3 %, seeds by 0.2 %", 7, 0.003, 0.002),
    Scenario("6 sizes; sizes by 0.3 %, seeds by 0.3 %", 6, 0.003, 0.003),
    Scenario("8 sizes of one seed, which differ by 0.3 %", 8, 0.0, 0.003, seeds=1),
)
EFFICIENT = EfficientScenario("7 budgets, about 5 sizes each; seeds differ by 0.4 %")
PARAMETRIC = ParametricScenario("7 sizes, 4 token counts; seeds differ by 0.4 %")


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How a quantity was recovered over the draws of a scenario."""

    scenario: str
    method: str
    quantity: str
    truth: float
    median: float  # of the estimates
    width: float  # median of the intervals
    covered: float  # share of the intervals that hold the truth
    draws: int  # that were fitted
    refused: int  # that were refused


def power_law(
    scenario: Scenario, method: str, draws: int, *, seed: int = 0, bootstrap: int = 200
) -> tuple[Recovery, ...]:
    """Fit L(C) to `draws` synthetic sweeps and count how often the 95 % intervals hold the truth.

    Quantities: a, b, l_inf, the law at 10x the largest compute, and one new run there. `bootstrap` is the number of
    draws inside a fit by "huber".
    """
    generator = np.random.default_rng(seed)
    group_N, compute_N = _design(scenario)
    target = EXTRAPOLATION * scenario.largest
    truths = {"a": float(scenario.amplitude * _middle(scenario) ** -scenario.b), "b": scenario.b}
    truths |= {"l_inf": scenario.l_inf, "law at 10x": float(_true(scenario, target))}
    rows = []
    for draw in range(draws):
        loss_N = _noisy(scenario, compute_N, group_N, generator)
        new_run = float(_noisy(scenario, np.array([target]), np.array([0]), generator)[0])
        try:
            law = fit.fit_power_law(compute_N.tolist(), loss_N.tolist(), method=method, draws=bootstrap, seed=draw)
        except UserError:
            continue
        rows.append(_said_of_compute(law, truths, target, new_run))
    return _summarise(scenario.name, method, rows, draws)


def efficient(
    scenario: EfficientScenario, method: str, draws: int, *, seed: int = 0, bootstrap: int = 200
) -> tuple[Recovery, ...]:
    """Pick the compute-efficient trials of `draws` synthetic sweeps, fit L(C) to them, and count as `power_law` does.

    The truth is the law's loss at the best N and D of each compute, a power law itself.
    """
    generator = np.random.default_rng(seed)
    law, target = scenario.law, EXTRAPOLATION * max(scenario.budgets)
    b = -law.alpha * law.beta / (law.alpha + law.beta)
    truth = law.loss(*law.best(target))
    truths = {"a": (truth - law.e) * target**-b, "b": b, "l_inf": law.e, "law at 10x": truth}
    rows = []
    for draw in range(draws):
        ends = fit.efficient(_at_budgets(scenario, generator))
        new_run = truth * float(np.exp(generator.normal() * law.noise))
        compute, loss = [end.compute for end in ends], [end.loss for end in ends]
        try:
            found = fit.fit_power_law(compute, loss, method=method, draws=bootstrap, seed=draw)
        except UserError:
            continue
        rows.append(_said_of_compute(found, truths, target, new_run))
    return _summarise(scenario.name, method, rows, draws)


def parametric(
    scenario: ParametricScenario, draws: int, *, seed: int = 0, bootstrap: int = 200
) -> tuple[Recovery, ...]:
    """Fit L(N, D) to `draws` synthetic grids and count how often the 95 % intervals hold the truth.

    Quantities: the five constants, the exponent of the compute-optimal (best) N, and one new run with 10 times the
    largest N and the largest D.
    """
    generator = np.random.default_rng(seed)
    size, count = EXTRAPOLATION * max(scenario.sizes), EXTRAPOLATION * max(scenario.tokens)
    truths = {name: getattr(scenario, name) for name in ("e", "a", "b", "alpha", "beta")}
    exponent = scenario.beta / (scenario.alpha + scenario.beta)
    rows = []
    for draw in range(draws):
        results = trials(scenario, generator)
        new_run = scenario.loss(size, count) * float(np.exp(generator.normal() * scenario.noise))
        try:
            law = fit.parametric(results, draws=bootstrap, seed=draw)
        except UserError:
            continue
        row: dict[str, Said] = {name: (getattr(law, name), *law.intervals[name], truths[name]) for name in truths}
        row["best N"] = (law.parameters_exponent, *law.intervals["parameters_exponent"], exponent)
        row["new run at 10x N, D"] = (law.predict(size, count), *law.predict_interval(size, count), new_run)
        rows.append(row)
    return _summarise(scenario.name, "huber, L(N, D)", rows, draws)


def trials(scenario: ParametricScenario, generator: np.random.Generator) -> list[TrialResult]:
    """Synthetic trials of the grid of sizes and tokens; training costs 6 FLOPs for a parameter and token."""
    results = []
    for index, size in enumerate(scenario.sizes):
        for count in scenario.tokens:
            for seed in range(scenario.seeds if index < len(scenario.sizes) - scenario.single_sizes else 1):
                loss = scenario.loss(size, count) * float(np.exp(generator.normal() * scenario.noise))
                results.append(trial(size, count, loss, seed))
    return results


def _at_budgets(scenario: EfficientScenario, generator: np.random.Generator) -> list[TrialResult]:
    """Every size with every budget that gives it a reasonable number of tokens."""
    results = []
    least, most = scenario.tokens_per_parameter
    for index, compute in enumerate(scenario.budgets):
        seeds = scenario.seeds if index < len(scenario.budgets) - scenario.single_budgets else 1
        for size in scenario.sizes:
            count = compute / 6 / size
            for seed in range(seeds if least <= count / size <= most else 0):
                loss = scenario.law.loss(size, count) * float(np.exp(generator.normal() * scenario.law.noise))
                results.append(trial(size, count, loss, seed))
    return results


def trial(parameters: float, tokens: float, loss: float, seed: int = 0) -> TrialResult:
    """A synthetic trial of so many parameters, all of them outside the embeddings."""
    n, d = round(parameters), round(tokens)
    return TrialResult(
        name=f"n{n}-d{d}-s{seed}",
        size=f"n{n}",
        model=ModelConfig(),
        sequence_length=2048,
        parameters=n,
        non_embedding_parameters=n,
        tokens=d,
        unique_tokens=d,
        compute=6.0 * n * d,
        learning_rate=1e-3,
        seed=seed,
        loss=loss,
        curve=((d, loss),),
    )


def _design(scenario: Scenario) -> tuple[np.ndarray, Array]:
    seeds = [scenario.seeds] * (scenario.sizes - scenario.single_sizes) + [1] * scenario.single_sizes
    group_N = np.repeat(np.arange(scenario.sizes), seeds)
    smallest = scenario.largest / 10**scenario.decades
    return group_N, np.geomspace(smallest, scenario.largest, scenario.sizes)[group_N]


def _middle(scenario: Scenario) -> float:
    return float(scenario.largest / 10 ** (scenario.decades / 2))


def _true(scenario: Scenario, compute: Array | float) -> Array:
    result: Array = scenario.amplitude * (np.asarray(compute) / _middle(scenario)) ** scenario.b + scenario.l_inf
    return result


def _noisy(scenario: Scenario, compute_N: Array, group_N: np.ndarray, generator: np.random.Generator) -> Array:
    shared_G = generator.normal(size=int(group_N.max()) + 1) * scenario.noise_between
    own_N = generator.normal(size=compute_N.size) * scenario.noise_within
    result: Array = _true(scenario, compute_N) * np.exp(shared_G[group_N] + own_N)
    return result


def _said_of_compute(law: fit.PowerLaw, truths: Mapping[str, float], target: float, new_run: float) -> dict[str, Said]:
    predicted = law.predict(target)
    return {
        **{name: (getattr(law, name), *law.intervals[name], truths[name]) for name in ("a", "b", "l_inf")},
        "law at 10x": (predicted, *law.law_interval(target), truths["law at 10x"]),
        "new run at 10x": (predicted, *law.predict_interval(target), new_run),
    }


def _summarise(scenario: str, method: str, rows: Sequence[Mapping[str, Said]], draws: int) -> tuple[Recovery, ...]:
    require(bool(rows), f"the fit by {method} refused all {draws} draws of {scenario!r}")
    summary = []
    for quantity in rows[0]:
        estimate, low, high, truth = np.array([row[quantity] for row in rows]).T
        summary.append(
            Recovery(
                scenario,
                method,
                quantity,
                truth=float(np.median(truth)),
                median=float(np.median(estimate)),
                width=float(np.median(high - low)),
                covered=float(np.mean((low <= truth) & (truth <= high))),
                draws=len(rows),
                refused=draws - len(rows),
            )
        )
    return tuple(summary)
