"""How well the scaling-law fits recover laws that are known, from synthetic trials with realistic noise.

    python -m experiments.scaling_recovery --config=configs/scaling_laws/recovery.py --workdir=runs/scaling_recovery

Draws sweeps from a known law with noise of sizes and of seeds, fits each, and counts how often the 95 % intervals hold
the truth: it should be near 95 % of the time. Writes to --workdir: table.md and results.json. It runs without an
accelerator, on one core, and its results depend on nothing but the config.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from experiments import runner
from llm_jax.config import positive
from llm_jax.errors import require
from llm_jax.evaluation.tables import Table, as_markdown, as_rich
from llm_jax.scaling import recovery
from llm_jax.scaling.config import MIN_DRAWS
from llm_jax.scaling.recovery import Recovery

TABLE_WIDTH = 140


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
    """How many synthetic sweeps are drawn and fitted."""

    draws: int = 500  # of each scenario
    bootstrap: int = 200  # draws inside a fit whose intervals come from a bootstrap
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "draws")
        require(
            self.bootstrap >= MIN_DRAWS, f"RecoveryConfig.bootstrap={self.bootstrap}: an interval needs {MIN_DRAWS}"
        )


def run(config: RecoveryConfig, workdir: Path) -> None:
    """Draw, fit, count; print and write the table."""
    of_compute: list[Recovery] = []
    studies = [(scenario, method) for method in ("least_squares", "huber") for scenario in recovery.SCENARIOS]
    for scenario, method in track(studies, "power laws"):
        of_compute += recovery.power_law(scenario, method, config.draws, seed=config.seed, bootstrap=config.bootstrap)
    for method in ("least_squares", "huber"):
        of_compute += recovery.efficient(
            recovery.EFFICIENT, method, config.draws, seed=config.seed, bootstrap=config.bootstrap
        )
    of_both = recovery.parametric(recovery.PARAMETRIC, config.draws, seed=config.seed, bootstrap=config.bootstrap)
    tables = (table(of_compute, "a * C^b + L_inf recovered"), table(of_both, "E + A / N^alpha + B / D^beta recovered"))
    for made in tables:
        Console(width=TABLE_WIDTH).print(as_rich(made))
    (workdir / "table.md").write_text("\n".join(map(as_markdown, tables)), encoding="utf-8")
    values = [dataclasses.asdict(row) for row in (*of_compute, *of_both)]
    (workdir / "results.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def table(rows: Sequence[Recovery], title: str) -> Table:
    """A line for each scenario and method, with the coverage of each quantity's interval."""
    quantities = tuple(dict.fromkeys(row.quantity for row in rows))
    lines: dict[tuple[str, str], dict[str, Recovery]] = {}
    for row in rows:
        lines.setdefault((row.scenario, row.method), {})[row.quantity] = row
    return Table(
        title=title,
        headings=("scenario", "method", *quantities, "refused"),
        rows=tuple(
            (
                *line,
                *(f"{found[quantity].covered:.1%}" for quantity in quantities),
                f"{found[quantities[0]].refused} of {found[quantities[0]].draws + found[quantities[0]].refused}",
            )
            for line, found in lines.items()
        ),
        numbers=frozenset({*quantities, "refused"}),
        notes=("The share of the 95 % intervals that hold the truth.",),
    )


if __name__ == "__main__":
    runner.main(run, RecoveryConfig, "configs/scaling_laws/recovery.py")
