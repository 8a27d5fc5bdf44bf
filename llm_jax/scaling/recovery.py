"""How well the fits recover laws that are known: intervals' coverage on synthetic trials with realistic noise."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling import fit_power
from llm_jax.scaling.fit_noise import Array

EXTRAPOLATION = 10.0  # prediction at so many times the largest compute


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


SCENARIOS = (
    Scenario("8 sizes, seeds 0.4 %", 8, 0.0, 0.004),
    Scenario("6 sizes, seeds 0.4 %", 6, 0.0, 0.004),
    Scenario("8 sizes, sizes 0.3 %, seeds 0.3 %", 8, 0.003, 0.003),
    Scenario("7 sizes, sizes 0.3 %, seeds 0.2 %", 7, 0.003, 0.002),
    Scenario("6 sizes, sizes 0.3 %, seeds 0.3 %", 6, 0.003, 0.003),
    Scenario("8 sizes, one seed, 0.3 %", 8, 0.0, 0.003, seeds=1),
)


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


def recover(scenario: Scenario, method: str, draws: int, seed: int = 0, bootstrap: int = 200) -> tuple[Recovery, ...]:
    """Fit `draws` synthetic sweeps of a scenario and count how often the 95 % intervals hold the truth.

    Quantities: a, b, l_inf, the law at 10x the largest compute, and one new run there.
    """
    generator = np.random.default_rng(seed)
    group_N, compute_N = _design(scenario)
    target = EXTRAPOLATION * scenario.largest
    rows, refused = [], 0
    for draw in range(draws):
        loss_N = _noisy(scenario, compute_N, group_N, generator)
        new_run = _noisy(scenario, np.array([target]), np.array([0]), generator)[0]
        try:
            law = fit_power.fit_power_law(
                compute_N.tolist(), loss_N.tolist(), method=method, draws=bootstrap, seed=draw
            )
        except UserError:
            refused += 1
            continue
        rows.append(_measure(law, target, new_run))
    truths = {"a": _a(scenario), "b": scenario.b, "l_inf": scenario.l_inf}
    truths["law at 10x"] = truths["new run at 10x"] = float(_true(scenario, np.array([target]))[0])
    return _summarise(scenario.name, method, truths, rows, refused)


def _design(scenario: Scenario) -> tuple[np.ndarray, Array]:
    seeds = [scenario.seeds] * (scenario.sizes - scenario.single_sizes) + [1] * scenario.single_sizes
    group_N = np.repeat(np.arange(scenario.sizes), seeds)
    smallest = scenario.largest / 10**scenario.decades
    return group_N, np.geomspace(smallest, scenario.largest, scenario.sizes)[group_N]


def _middle(scenario: Scenario) -> float:
    return float(scenario.largest / 10 ** (scenario.decades / 2))


def _a(scenario: Scenario) -> float:
    return float(scenario.amplitude * _middle(scenario) ** -scenario.b)


def _true(scenario: Scenario, compute: Array) -> Array:
    result: Array = scenario.amplitude * (compute / _middle(scenario)) ** scenario.b + scenario.l_inf
    return result


def _noisy(scenario: Scenario, compute_N: Array, group_N: np.ndarray, generator: np.random.Generator) -> Array:
    shared_G = generator.normal(size=int(group_N.max()) + 1) * scenario.noise_between
    own_N = generator.normal(size=compute_N.size) * scenario.noise_within
    result: Array = _true(scenario, compute_N) * np.exp(shared_G[group_N] + own_N)
    return result


def _measure(law: fit_power.PowerLaw, target: float, new_run: float) -> dict[str, tuple[float, float, float, float]]:
    """Estimate, low and high of each quantity; and for the new run, what it came to (else NaN: the truth)."""
    nan = float("nan")
    return {
        "a": (law.a, *law.intervals["a"], nan),
        "b": (law.b, *law.intervals["b"], nan),
        "l_inf": (law.l_inf, *law.intervals["l_inf"], nan),
        "law at 10x": (law.predict(target), *law.law_interval(target), nan),
        "new run at 10x": (law.predict(target), *law.predict_interval(target), new_run),
    }


def _summarise(
    scenario: str,
    method: str,
    truths: dict[str, float],
    rows: Sequence[dict[str, tuple[float, float, float, float]]],
    refused: int,
) -> tuple[Recovery, ...]:
    summary = []
    for quantity, truth in truths.items():
        estimate, low, high, actual = np.array([row[quantity] for row in rows]).reshape(-1, 4).T
        wanted = np.where(np.isnan(actual), truth, actual)
        summary.append(
            Recovery(
                scenario,
                method,
                quantity,
                truth,
                float(np.median(estimate)),
                float(np.median(high - low)),
                float(np.mean((low <= wanted) & (wanted <= high))),
                len(rows),
                refused,
            )
        )
    return tuple(summary)
