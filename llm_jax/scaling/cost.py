"""What a sweep will cost, before any of it runs: FLOPs and device-hours of its trials."""

import dataclasses
from collections.abc import Sequence

from rich.table import Table

from llm_jax.config import ModelConfig, one_of
from llm_jax.errors import require
from llm_jax.parallel.hardware import PEAK_FLOPS
from llm_jax.scaling import flops
from llm_jax.scaling.trial import Trial

DEVICES = ("A800", "H100", "TPU v5p")
SECONDS_PER_HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Trials of one model on equally many tokens."""

    size: str
    model: ModelConfig
    tokens: int  # of each trial
    trials: int
    compute: float  # training FLOPs of each trial


def costs(trials: Sequence[Trial]) -> list[Cost]:
    """What the trials cost, those alike together, in the order in which they come."""
    found: dict[tuple[str, int, float], Cost] = {}
    for trial in trials:
        key = trial.size, trial.tokens, trial.compute
        same = found.get(key, Cost(trial.size, trial.config.model, trial.tokens, 0, trial.compute))
        found[key] = dataclasses.replace(same, trials=same.trials + 1)
    return list(found.values())


def device_hours(compute: float, device: str, mfu: float) -> float:
    """Hours that one device takes for `compute` FLOPs at the share `mfu` of its bfloat16 peak.

    Raises `UserError` for a device that `hardware.PEAK_FLOPS` does not have, or a share outside (0, 1].
    """
    one_of("device", device, tuple(PEAK_FLOPS))
    require(0 < mfu <= 1, f"mfu={mfu} must be in (0, 1]: the share of the device's peak that training reaches")
    return compute / (PEAK_FLOPS[device] * mfu) / SECONDS_PER_HOUR


def table(trials: Sequence[Trial], mfu: float, devices: Sequence[str] = DEVICES) -> Table:
    """FLOPs and device-hours of the trials, a row for those alike and one for all; see `device_hours` for errors."""
    rows = costs(trials)
    result = Table(title=f"Training cost at {mfu:.0%} of the device's bfloat16 peak")
    result.add_column("size")
    numbers = ("non-embedding", "parameters", "tokens", "trials", "FLOPs each", "6 N D each", "FLOPs")
    for name in (*numbers, *(f"{device} hours" for device in devices)):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(*_cells(row), *_totals(row.trials * row.compute, mfu, devices))
    total = sum(row.trials * row.compute for row in rows)
    count = str(sum(row.trials for row in rows))
    result.add_section()
    result.add_row("all", "", "", "", count, "", "", *_totals(total, mfu, devices))
    return result


def _cells(row: Cost) -> tuple[str, ...]:
    parameters = flops.count(row.model)
    sizes = (_short(parameters.non_embedding), _short(parameters.total), _short(row.tokens))
    return row.size, *sizes, str(row.trials), f"{row.compute:.3g}", f"{flops.six_n(row.model, row.tokens):.3g}"


def _totals(compute: float, mfu: float, devices: Sequence[str]) -> list[str]:
    hours = (device_hours(compute, device, mfu) for device in devices)
    return [f"{compute:.3g}", *(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in hours)]


def _short(count: float) -> str:
    """1234567 as 1.23M, 999999999 as 1B."""
    count = float(f"{count:.3g}")
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:g}"
