"""Sweep small models, fit the law of their losses, predict a larger model's, train it, and say how far off that was.

    python -m experiments.scaling_laws --config=configs/scaling_laws/cpu.py --workdir=runs/scaling_laws
    python -m experiments.scaling_laws --config=configs/scaling_laws/baichuan2.py --cost

Makes a tokenizer and a dataset unless --config.base.data.dataset names one, finds each size's learning rate, trains the
grid's trials (here, in processes or on Slurm: --config.launcher.kind), fits the laws, writes down the prediction, and
then trains what it predicted. Every trial is a run of experiments.pretrain in a folder of its own. Run the same command
again after a stop: what is trained stays, the rest goes on. A failed trial is left out with a warning.
--config.results=FILE fits the results.json of an earlier study instead.

Writes to --workdir: report.md, figures/, figures.html, laws.json, results.json and results.csv (every trial),
prediction.json (before the predicted model is trained), config.json, and the folders learning_rates/, trials/ and
prediction/ with the runs.
"""

import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from math import isclose
from pathlib import Path

from absl import flags
from rich.console import Console

from experiments import own_dataset, runner, trials
from llm_jax.data import loader
from llm_jax.scaling import cost, flops, launch, learning_rate, results, study, sweep
from llm_jax.scaling.config import GridConfig, ScalingConfig
from llm_jax.scaling.learning_rate import Choice
from llm_jax.scaling.report import as_rich
from llm_jax.scaling.study import Study
from llm_jax.scaling.trial import Trial, TrialResult

COST = flags.DEFINE_bool("cost", False, "print what the trials would cost, and train nothing")
MFU = flags.DEFINE_float("mfu", 0.4, "for --cost: the share of the device's peak that training reaches")
PREDICTION = "prediction.json"
SAME_COMPUTE = 0.05  # a run's compute may differ from what was asked for by so much, for whole steps
TABLE_WIDTH = 110
log = logging.getLogger(f"llm_jax.{__name__}")  # plain lines, as the library's own


def main(config: ScalingConfig, workdir: Path) -> None:
    """Run the study, or print its cost."""
    if COST.value:
        _console().print(cost.table(all_trials(config), MFU.value))
    else:
        run(config, workdir, shlex.join(["python", "-m", "experiments.scaling_laws", *sys.argv[1:]]))


def run(config: ScalingConfig, workdir: Path, command: str = "experiments.scaling_laws.run(config, workdir)") -> Study:
    """Train what is missing, fit, predict, train what was predicted, and write the report, `command` at its head."""
    if config.results:
        found, predicted = read(config)
    else:
        config = with_dataset(config, workdir)
        found = train(config, workdir)
    if config.prediction.compute and found.laws.power:
        found = predict(found, config, workdir)
        study.write(found, command, workdir)
        if not config.results:
            predicted, left_out = train_predicted(found, config, workdir)
            found = dataclasses.replace(found, left_out=(*found.left_out, *left_out))
        made = (dataclasses.replace(found.predictions[0], actual=tuple(predicted)),)
        found = dataclasses.replace(found, predictions=made)
    study.write(found, command, workdir)
    results.write((*found.results, *(run for made in found.predictions for run in made.actual)), workdir)
    show(found, workdir)
    return found


def with_dataset(config: ScalingConfig, workdir: Path) -> ScalingConfig:
    """The study on a dataset: the one it names, or one made of its corpus."""
    if config.base.data.dataset:
        return config
    dataset = own_dataset.make(config.tokenizer, config.corpus, workdir)
    data = dataclasses.replace(config.base.data, dataset=str(dataset))
    return dataclasses.replace(config, base=dataclasses.replace(config.base, data=data))


def train(config: ScalingConfig, workdir: Path) -> Study:
    """The sweep of learning rates, if there is one, then the grid; and the laws of what came of it."""
    tried: list[TrialResult] = []
    problems: list[str] = []
    if config.learning_rate.rule == "sweep":
        tried, problems = launch_trials(config, *learning_rate.trials(config), workdir / "learning_rates")
    choices, doubts = learning_rate.choose(config, tried)
    _warn(doubts)
    found, left_out = launch_trials(config, *sweep.expand(config, _rates(choices)), workdir / "trials")
    results.write(found, workdir)
    laws = study.fit_laws(found, config.fit)
    return Study(tuple(found), laws, (), tuple(choices), tuple(tried), (*problems, *doubts, *left_out))


def launch_trials(
    config: ScalingConfig, wanted: Sequence[Trial], problems: Sequence[str], folder: Path
) -> tuple[list[TrialResult], list[str]]:
    """The results of trials, those that are missing trained first; and a line for each that has none."""
    _warn(problems)
    folder.mkdir(parents=True, exist_ok=True)
    failures = launch.run(sweep.together(wanted, config.launcher), trials.execute, config.launcher, folder)
    found, unreadable = sweep.collect(wanted, folder, loader.describe(config.base.data).tokens)
    missing = list(dict.fromkeys([*failures, *unreadable]))
    _warn(missing)
    return found, [*problems, *missing]


def predicted_trials(config: ScalingConfig, rates: dict[str, float]) -> tuple[list[Trial], list[str]]:
    """The larger run, once for each seed."""
    wanted = config.prediction
    grid = GridConfig(sizes=(wanted.size,), compute=(wanted.compute,), seeds=wanted.seeds)
    return sweep.expand(dataclasses.replace(config, grid=grid), rates)


def all_trials(config: ScalingConfig) -> list[Trial]:
    """Everything that the study would train, at the base's learning rate."""
    wanted = learning_rate.trials(config)[0] if config.learning_rate.rule == "sweep" else []
    grid, problems = sweep.expand(config)
    _warn(problems)
    return [*wanted, *grid, *(predicted_trials(config, {})[0] if config.prediction.compute else [])]


def predict(found: Study, config: ScalingConfig, workdir: Path) -> Study:
    """The study with its prediction, which is written to prediction.json."""
    assert found.laws.power is not None
    trial = predicted_trials(config, {})[0][0]
    compute = flops.training_flops(trial.config.model, trial.config.data.sequence_length, trial.tokens)
    made = study.predict(found.laws.power, trial.size, compute)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / PREDICTION).write_text(json.dumps(dataclasses.asdict(made), indent=2) + "\n")
    log.info(
        "predicted for %s at %.3g FLOPs: %.4f nats per token, between %.4f and %.4f (%s)",
        *(made.size, made.compute, made.predicted, made.low, made.high, workdir / PREDICTION),
    )
    return dataclasses.replace(found, predictions=(made,))


def train_predicted(found: Study, config: ScalingConfig, workdir: Path) -> tuple[list[TrialResult], list[str]]:
    """The results of the runs that were predicted, and a line for each that has none."""
    return launch_trials(config, *predicted_trials(config, _rates(found.choices)), workdir / "prediction")


def read(config: ScalingConfig) -> tuple[Study, list[TrialResult]]:
    """The study of an earlier one's results file, and the predicted runs that it has."""
    found, problems = results.read(Path(config.results))
    _warn(problems)
    wanted, size = config.prediction.compute, sweep.size_name(config.prediction.size)
    predicted = [each for each in found if each.size == size and isclose(each.compute, wanted, rel_tol=SAME_COMPUTE)]
    swept = tuple(each for each in found if each not in predicted)
    return Study(swept, study.fit_laws(swept, config.fit), left_out=tuple(problems)), predicted


def show(found: Study, workdir: Path) -> None:
    """Print the tables that matter most, and where the rest is."""
    console = _console()
    for table in study.tables(found)[:2]:
        console.print(as_rich(table))
    for line in found.laws.problems:
        log.warning("not fitted: %s", line)
    print(f"{workdir / study.REPORT}: all tables; {workdir / study.PAGE}: the figures, to explore")


def _rates(choices: Sequence[Choice]) -> dict[str, float]:
    return {choice.size: choice.rate for choice in choices}


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        log.warning("%s", line)


def _console() -> Console:
    return Console(width=max(Console().width, TABLE_WIDTH))


if __name__ == "__main__":
    runner.main(main, ScalingConfig, "configs/scaling_laws/cpu.py")
