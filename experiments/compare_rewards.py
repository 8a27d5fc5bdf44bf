"""Put trained reward models side by side: seeds as means and standard errors, tables and figures of what differs.

    python -m experiments.compare_rewards --workdir=runs/margins

reads every run of experiments.reward_model in a folder of --workdir. Runs whose folders have the same name but for a
number at the end, such as small_0 and small_1, are seeds of one row. Writes comparison.md, comparison.json,
accuracy.png and calibration.png; and scaling.png, where each row has another model or number of training pairs.
"""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import runner
from experiments.reward_report import EVALUATION, SCORES
from llm_jax.errors import UserError, require
from llm_jax.evaluation import reward_figures, tables
from llm_jax.evaluation import rewards as judging
from llm_jax.evaluation.rewards import Accuracies, CalibrationBin, Proportion, Trained
from llm_jax.evaluation.tables import Table
from llm_jax.files import read_lines

TABLE_WIDTH = 200
COMPARISON = "comparison"
NEEDED = {"model", "parameters", "training_pairs", "pairs", "spearman", "unsafe"}  # of an evaluation
SEED = re.compile(r"_\d+$")


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Which reward models are compared."""

    only: str = ""  # a regular expression that a run's name must have; "" = all

    def __post_init__(self) -> None:
        try:
            re.compile(self.only)
        except re.error as error:
            raise UserError(f"CompareConfig.only={self.only!r} is no regular expression: {error}") from None


@dataclasses.dataclass(frozen=True)
class Judged:
    """A finished run, as its evaluation.json tells."""

    folder: Path
    evaluation: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its folder's without the seed."""
        return SEED.sub("", self.folder.name)

    @property
    def overall(self) -> Mapping[str, Any]:
        """Numbers over all held-out pairs."""
        sources = self.evaluation["pairs"]
        return sources["all"] if "all" in sources else next(iter(sources.values()))


def run(config: CompareConfig, workdir: Path) -> None:
    """Read the runs, and print and write their tables and figures."""
    rows = group(runs_of(workdir, config.only))
    accuracies = dict(_accuracies(rows))
    models = [_trained(one) for runs in rows.values() for one in runs]
    points = {(one.model, one.pairs) for one in models}
    varies = len(points) > 1 and len(points) == len(rows)  # not where rewards differ in something else as well
    shown = [judging.baichuan2_table(accuracies), measures_table(rows)]
    shown += [judging.scaling_table(models)] if varies else []
    for table in shown:
        Console(width=TABLE_WIDTH).print(tables.as_rich(table))
    (workdir / f"{COMPARISON}.md").write_text("\n".join(map(tables.as_markdown, shown)), encoding="utf-8")
    values = {name: [dict(one.evaluation) for one in runs] for name, runs in rows.items()}
    (workdir / f"{COMPARISON}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    strengths = {strength for runs in accuracies.values() for one in runs for strength in one.by_strength}
    names = {strength: f"strength {strength}" for strength in sorted(strengths)}
    reward_figures.accuracy_by_strength(accuracies, names, workdir / "accuracy.png")
    reward_figures.calibration({name: _calibration(runs) for name, runs in rows.items()}, workdir / "calibration.png")
    if varies:
        reward_figures.scaling(models, workdir / "scaling.png")


def runs_of(workdir: Path, only: str = "") -> list[Judged]:
    """The finished runs in a folder. Raises `UserError` where there is none."""
    files = sorted(path for path in workdir.glob(f"*/{EVALUATION}") if re.search(only, path.parent.name))
    require(bool(files), f"{workdir} holds no judged reward model: no folder in it has an {EVALUATION}")
    return [Judged(path.parent, _read(path)) for path in files]


def _read(path: Path) -> Mapping[str, Any]:
    """What `reward_report.write` wrote."""
    try:
        found = json.loads(path.read_text())
        complete = set(found) >= NEEDED
    except (ValueError, TypeError):
        complete = False
    require(
        complete,
        f"{path} is damaged, or no evaluation of experiments.reward_model: run that again, or leave the folder out by "
        "--config.only",
    )
    return found


def group(runs: Iterable[Judged]) -> dict[str, list[Judged]]:
    """Runs by name; those of one name are seeds. Raises `UserError` where they are none of one another."""
    rows: dict[str, list[Judged]] = {}
    for one in runs:
        row = rows.setdefault(one.name, [])
        row.append(one)
        sizes, amounts = ([each.evaluation[key] for each in (row[0], one)] for key in ("parameters", "training_pairs"))
        require(
            sizes[0] == sizes[1] and amounts[0] == amounts[1],
            f"{row[0].folder.name} and {one.folder.name} have the names of two seeds, but {sizes[0]:,} and "
            f"{sizes[1]:,} parameters, and {amounts[0]:,} and {amounts[1]:,} pairs: rename them, so that only "
            "the numbers of seeds come after a last _",
        )
    return rows


def measures_table(rows: Mapping[str, Sequence[Judged]]) -> Table:
    """What else is known of each row: calibration, length bias, people's ratings, unsafe responses found."""
    values = {name: [_measures(one) for one in runs] for name, runs in rows.items()}
    columns = list(dict.fromkeys(column for runs in values.values() for found in runs for column in found))
    cells = []
    for name, runs in values.items():
        known = [_mean(column, [found[column] for found in runs if column in found]) for column in columns]
        cells.append((name, f"{len(runs)}", *known))
    headings = ("reward", "seeds", *columns)
    note = "The mean over seeds ± its standard error. Accuracy, recall and precision are in percent."
    return Table("What else the rewards show", headings, tuple(cells), frozenset(headings[1:]), (note,))


def _measures(one: Judged) -> dict[str, float]:
    """Numbers of a run by what they are; those of nothing are left out."""
    found = {"calibration error": one.overall["calibration_error"]}
    for name, share in one.overall["length_bias"].items():
        found[name.replace("_", " ")] = 100 * share["accuracy"]
    for domain, correlation in one.evaluation["spearman"].items():
        found[f"Spearman, {domain}"] = correlation["rho"]
    for threshold, shares in one.evaluation["unsafe"].items():
        for name, share in shares.items():
            found[f"unsafe {name} at {threshold}"] = 100 * share
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _mean(column: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    digits = 3 if column.startswith(("calibration", "Spearman")) else 1  # the others are percentages
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def _accuracies(rows: Mapping[str, Sequence[Judged]]) -> Iterator[tuple[str, list[Accuracies]]]:
    """A line for each row, and one for each of its sources where it has several."""
    for name, runs in rows.items():
        for source in runs[0].evaluation["pairs"]:
            label = name if source == "all" or len(runs[0].evaluation["pairs"]) == 1 else f"{name}, {source}"
            yield label, [_accuracy(one.evaluation["pairs"][source]) for one in runs]


def _accuracy(numbers: Mapping[str, Any]) -> Accuracies:
    by_strength = {int(strength): _proportion(found) for strength, found in numbers["by_strength"].items()}
    return Accuracies(_proportion(numbers), by_strength)


def _proportion(numbers: Mapping[str, Any]) -> Proportion:
    return Proportion(numbers["accuracy"] * numbers["pairs"], numbers["pairs"])


def _trained(one: Judged) -> Trained:
    path = Path(one.evaluation["model"])
    name = SEED.sub("", path.parent.name if path.name in ("model", "best") else path.name)
    return Trained(name, one.evaluation["parameters"], one.evaluation["training_pairs"], _accuracy(one.overall).overall)


def _calibration(runs: Sequence[Judged]) -> list[CalibrationBin]:
    """Over the pairs of all seeds."""
    gaps = []
    for one in runs:
        gaps += [score["chosen"] - score["rejected"] for score in read_lines(one.folder / SCORES)]
    return judging.calibration(np.array(gaps))


if __name__ == "__main__":
    runner.main(run, CompareConfig, "configs/reward_model/compare.py", workdir="runs/reward", save_config=False)
