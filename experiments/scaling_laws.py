"""Sweep small models, fit the law of their losses, predict a larger model's, train it, and say how far off that was.

    python -m experiments.scaling_laws --config=configs/scaling_laws/cpu.py --workdir=runs/scaling_laws
    python -m experiments.scaling_laws --config=configs/scaling_laws/baichuan2.py --cost

Makes a tokenizer and a dataset unless --config.base.data.dataset names one, finds each size's learning rate, trains the
grid's trials (here, in processes or on Slurm: --config.launcher.kind), fits the laws, writes down the prediction, and
then trains what it predicted. Every trial is a run of experiments.pretrain in a folder of its own. Run the same command
again after a stop: what is trained stays, the rest goes on. A failed trial is left out with a warning.
--config.results=FILE fits the results.json of an earlier study instead.

Writes to --workdir: report.md, figures/, figures.html, laws.json, results.json and results.csv (every trial),
prediction.json (before the predicted model is trained), learning_rates.json, config.json, and the runs in
learning_rates/, trials/ and prediction/.
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
from llm_jax import config as config_lib
from llm_jax.errors import require
from llm_jax.evaluation.tables import as_rich
from llm_jax.scaling import cost, launch, learning_rate, results, study, sweep
from llm_jax.scaling.config import GridConfig, ScalingConfig
from llm_jax.scaling.learning_rate import Choice
from llm_jax.scaling.report import Prediction
from llm_jax.scaling.study import Study
from llm_jax.scaling.trial import CONFIG, Trial, TrialResult

COST = flags.DEFINE_bool("cost", False, "print what the trials would cost, and train nothing")
MFU = flags.DEFINE_float("mfu", 0.4, "for --cost: the share of the device's peak that training reaches")
LEARNING_RATES, PREDICTION, PREDICTED = "learning_rates.json", "prediction.json", "prediction"
SAME = 0.05  # runs of one compute may differ by so much, for whole steps
TABLE_WIDTH = 110
log = logging.getLogger(f"llm_jax.{__name__}")  # plain lines, as the library's own


def main(config: ScalingConfig, workdir: Path) -> None:
    """Run the study, or print its cost."""
    if COST.value:
        trained, problems = all_trials(config)
        _warn(problems)
        _console().print(cost.table(trained, MFU.value))
    else:
        run(config, workdir, shlex.join(["python", "-m", "experiments.scaling_laws", *sys.argv[1:]]))


def run(config: ScalingConfig, workdir: Path, command: str = "experiments.scaling_laws.run(config, workdir)") -> Study:
    """Train what is missing, fit, predict, train what was predicted, and write the report, `command` at its head."""
    if config.results:
        found = read(config, workdir)
    else:
        all_trials(config)  # refuses now what could not be trained later
        config_lib.save(config, workdir / CONFIG)  # a notebook calls this function; the results are read with it
        config = with_dataset(config, workdir)
        found = train(config, workdir)
    if config.prediction.compute and found.laws.power:
        found = predict(found, config, workdir)
        study.write(found, command, workdir)
        if not config.results:
            found = train_predicted(found, config, workdir)
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
    choices, tried, problems = learning_rates(config, workdir)
    found, left_out = launch_trials(config, *sweep.expand(config, _rates(choices)), workdir / "trials")
    require(bool(found), f"no trial has a result: {left_out[0] if left_out else 'the grid is empty'}")
    laws = study.fit_laws(found, config.fit)
    return Study(tuple(found), laws, (), tuple(choices), tuple(tried), (*problems, *left_out))


def learning_rates(config: ScalingConfig, workdir: Path) -> tuple[list[Choice], list[TrialResult], list[str]]:
    """Every size's learning rate, the trials that it rests on, and a line for each that has none.

    Chosen once: trials trained at one rate do not mix with trials at another. `UserError` if `workdir` holds a choice
    made under other settings.
    """
    path, tried, problems = workdir / LEARNING_RATES, list[TrialResult](), list[str]()
    if config.learning_rate.rule == "sweep":
        tried, problems = launch_trials(config, *learning_rate.trials(config), workdir / "learning_rates")
    settings = {"rule": dataclasses.asdict(config.learning_rate), "base": config.base.optimizer.learning_rate}
    settings = json.loads(json.dumps(settings))
    choices, doubts = learning_rate.choose(config, tried)
    if path.is_file():
        earlier = json.loads(path.read_text())
        require(
            earlier["settings"] == settings,
            f"{path} was chosen under other settings of config.learning_rate: choose a new --workdir",
        )
        known = {choice["size"]: Choice(**choice) for choice in earlier["choices"]}
        choices = [known.get(choice.size, choice) for choice in choices]
    _warn(doubts)
    study.write_json({"settings": settings, "choices": [dataclasses.asdict(choice) for choice in choices]}, path)
    return choices, tried, [*problems, *doubts]


def launch_trials(
    config: ScalingConfig, wanted: Sequence[Trial], problems: Sequence[str], folder: Path
) -> tuple[list[TrialResult], list[str]]:
    """The results of trials, those that are missing trained first; and a line for each that has none."""
    _warn(problems)
    folder.mkdir(parents=True, exist_ok=True)
    failures = launch.run(sweep.together(wanted, config.launcher), trials.execute, config.launcher, folder)
    found, unreadable = sweep.collect(wanted, folder, failed=failures)
    missing = [*failures.values(), *unreadable]
    _warn(missing)
    return found, [*problems, *missing]


def predicted_trials(config: ScalingConfig, rates: dict[str, float]) -> tuple[list[Trial], list[str]]:
    """The larger run, once for each seed."""
    wanted = config.prediction
    grid = GridConfig(sizes=(wanted.size,), compute=(wanted.compute,), seeds=wanted.seeds)
    return sweep.expand(dataclasses.replace(config, grid=grid), rates)


def all_trials(config: ScalingConfig) -> tuple[list[Trial], list[str]]:
    """Everything that the study would train, at the base's learning rate, and what is left out of its grid.

    Raises `UserError` for a grid, a sweep of learning rates or a prediction without any trial.
    """
    wanted = learning_rate.trials(config)[0] if config.learning_rate.rule == "sweep" else []
    grid, problems = sweep.expand(config)
    return [*wanted, *grid, *(predicted_trials(config, {})[0] if config.prediction.compute else [])], problems


def predict(found: Study, config: ScalingConfig, workdir: Path) -> Study:
    """The study with its prediction, which is written to prediction.json before a run that it speaks of begins.

    Once one has begun, the prediction stays as it is, whatever is fitted later.
    """
    assert found.laws.power is not None
    trial = predicted_trials(config, {})[0][0]
    made = study.predict(found.laws.power, trial.size, trial.compute)
    predicted = [
        each for each in found.held_out if each.size == made.size and isclose(each.compute, made.compute, rel_tol=SAME)
    ]
    path, earlier = workdir / PREDICTION, made
    if path.is_file() and (workdir / PREDICTED).is_dir():
        earlier = Prediction(**json.loads(path.read_text()) | {"actual": ()})
        require(
            (earlier.size, earlier.compute) == (made.size, made.compute),
            f"{workdir} holds the prediction of another run, {earlier.size} at {earlier.compute:.3g} FLOPs: choose a "
            "new --workdir",
        )
    if earlier.predicted != made.predicted:
        line = f"since the prediction was made the sweep has changed: fitted today, it would be {made.predicted:.4f}"
        _warn([line])
        found = dataclasses.replace(found, left_out=(*found.left_out, line))
    study.write_json(dataclasses.asdict(earlier), path)
    log.info(
        "predicted for %s at %.3g FLOPs: %.4f nats per token, between %.4f and %.4f (%s)",
        *(earlier.size, earlier.compute, earlier.predicted, earlier.low, earlier.high, path),
    )
    return dataclasses.replace(found, predictions=(dataclasses.replace(earlier, actual=tuple(predicted)),))


def train_predicted(found: Study, config: ScalingConfig, workdir: Path) -> Study:
    """The study with the losses of the runs that were predicted."""
    wanted, problems = predicted_trials(config, _rates(found.choices))
    actual, left_out = launch_trials(config, wanted, problems, workdir / PREDICTED)
    held_out = tuple(dataclasses.replace(run, held_out=True) for run in actual)
    made = tuple(dataclasses.replace(made, actual=held_out) for made in found.predictions)
    return dataclasses.replace(found, predictions=made, left_out=(*found.left_out, *left_out))


def read(config: ScalingConfig, workdir: Path) -> Study:
    """The study of an earlier one's results file, the predicted runs kept apart from the fits."""
    path = Path(config.results)
    require(
        path.resolve().parent != workdir.resolve(),
        f"--workdir={workdir} holds the results that are to be read: choose another one, or they would be overwritten",
    )
    found, problems = results.read(path)
    _warn(problems)
    swept, held_out = (tuple(each for each in found if each.held_out is kind) for kind in (False, True))
    return Study(swept, study.fit_laws(swept, config.fit), left_out=tuple(problems), held_out=held_out)


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
