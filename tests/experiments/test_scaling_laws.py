"""A study as a user runs it: it trains, predicts before it looks, reports, goes on after a stop and can be costed."""

import csv
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from experiments import runner, scaling_laws
from llm_jax.config import CorpusConfig, TokenizerConfig, from_config_dict
from llm_jax.errors import UserError
from llm_jax.scaling import results
from llm_jax.scaling.config import GridConfig, LearningRateConfig, PredictionConfig, ScalingConfig, SizeConfig
from tests.experiments.test_long_context import TRAIN
from tests.scaling import studies


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two sizes with two budgets, and three learning rates for the smaller."""
    folder = tmp_path_factory.mktemp("corpus") / "words"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i}: {' '.join(['one', 'two', 'three', 'four'][i % 4 :] * 50)}")
    return ScalingConfig(
        base=dataclasses.replace(TRAIN, log_every=4),
        warmup_fraction=0.1,
        curve_points=2,
        grid=GridConfig(
            sizes=(SizeConfig(name="narrow", hidden_size=8, num_heads=1), SizeConfig(name="wide", hidden_size=16)),
            tokens=(512, 1024),
        ),
        learning_rate=LearningRateConfig(
            rule="sweep", rates=(1e-3, 1e-2, 1e-1), sizes=("narrow",), tokens_per_parameter=0.1
        ),
        prediction=PredictionConfig(compute=1e8, size=SizeConfig(name="huge", hidden_size=32)),
        corpus=CorpusConfig(path=str(folder.parent), holdout_fraction=0.2, workers=1),
        tokenizer=TokenizerConfig(vocab_size=280, workers=1),
    )


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    scaling_laws.run(config, folder)
    return folder


def finished(tmp_path):
    """The results file of a study whose law is known, the predicted runs among them."""
    held_out = (dataclasses.replace(run, held_out=True) for run in studies.prediction().actual)
    results.write([*studies.sweep(), *held_out], tmp_path)
    return dataclasses.replace(studies.config(), results=str(tmp_path / "results.json"))


def test_every_trial_is_in_the_tables_with_the_rate_that_its_size_was_given(workdir):
    runs, problems = results.read(workdir / "results.json")
    assert not problems
    assert {(run.size, run.tokens) for run in runs} == {(s, t) for s in ("narrow", "wide") for t in (512, 1024)}
    laws = json.loads((workdir / "laws.json").read_text())
    chosen = {choice["size"]: choice["rate"] for choice in laws["learning_rates"]}
    assert set(chosen) == {"narrow", "wide", "huge"}
    assert all(run.learning_rate == pytest.approx(chosen[run.size]) for run in runs)
    with (workdir / "results.csv").open() as file:
        assert {row["name"]: float(row["loss"]) for row in csv.DictReader(file)} == {r.name: r.loss for r in runs}


def test_four_points_are_no_law_and_nothing_is_predicted(workdir):
    laws = json.loads((workdir / "laws.json").read_text())
    assert laws["power"] is None and not laws["predictions"]
    (problem,) = (problem for problem in laws["problems"] if problem.startswith("the law: "))
    assert "budgets of compute" in problem
    assert not (workdir / "prediction.json").exists()
    report = (workdir / "report.md").read_text()
    assert "Not fitted: the law: " in report and "narrow-512tokens-s0" in report


def test_a_second_run_trains_nothing_again(config, workdir, monkeypatch):
    before = (workdir / "results.json").read_text()
    monkeypatch.setattr(scaling_laws.trials, "execute", None)
    scaling_laws.run(config, workdir)
    assert (workdir / "results.json").read_text() == before


def test_a_damaged_trial_is_left_out_by_name_and_the_rest_goes_on(config, workdir, monkeypatch):
    path = workdir / "trials" / "wide-1024tokens-s0" / "metrics.jsonl"
    whole = path.read_text()
    records = [json.loads(line) for line in whole.splitlines()]
    records[-1]["loss"] = float("nan")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def refuse(paths):
        raise UserError("no second try today")

    monkeypatch.setattr(scaling_laws.trials, "execute", refuse)
    try:
        study = scaling_laws.run(dataclasses.replace(config, prediction=PredictionConfig()), workdir)
    finally:
        path.write_text(whole)
    assert len(study.results) == 3
    assert [line for line in study.left_out if "wide-1024tokens-s0" in line]
    assert "wide-1024tokens-s0" in (workdir / "report.md").read_text()


def test_the_law_of_a_results_file_predicts_runs_that_it_was_not_fitted_to(tmp_path):
    study = scaling_laws.run(finished(tmp_path), tmp_path / "run")
    assert not {run.size for run in study.results} & {"huge"}
    assert max(study.laws.power.compute) < studies.prediction().compute / 9
    (made,) = study.predictions
    assert [run.name for run in made.actual] == [run.name for run in studies.prediction().actual]
    assert made.predicted == pytest.approx(studies.true_loss(made.compute), rel=0.01)
    assert made.low < made.predicted < made.high
    assert {path.name for path in (tmp_path / "run" / "figures").iterdir()} >= {"frontier.png", "residuals.png"}
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"{made.predicted:.4f}" in report and f"{made.relative_error:+.2%}" in report


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """A study whose every trial has a made-up result; returns its config and what was asked to be trained, in order."""
    asked = []

    def launch_trials(config, wanted, problems, folder):
        folder.mkdir(parents=True, exist_ok=True)
        asked.append((folder.name, [(t.size, t.config.seed, t.config.optimizer.learning_rate) for t in wanted]))
        if folder.name == "prediction":
            stated = json.loads((folder.parent / "prediction.json").read_text())
            assert f"{stated['predicted']:.4f}" in (folder.parent / "report.md").read_text()
            return list(studies.prediction().actual), ["huge-s9 failed"]
        return (studies.sweep() if folder.name == "trials" else rates(wanted)), list(problems)

    def rates(wanted):
        best = {"tiny": 4e-3, "small": 2e-3}
        return [
            dataclasses.replace(
                studies.run(t.size, studies.WIDTHS[t.size], 1e10, 0),
                learning_rate=(rate := t.config.optimizer.learning_rate),
                loss=3 + math.log(rate / best[t.size]) ** 2,
            )
            for t in wanted
        ]

    monkeypatch.setattr(scaling_laws, "with_dataset", lambda config, workdir: config)
    monkeypatch.setattr(scaling_laws, "launch_trials", launch_trials)
    sizes = tuple(SizeConfig(name=name, hidden_size=width) for name, width in studies.WIDTHS.items())
    config = dataclasses.replace(
        studies.config(),
        grid=GridConfig(sizes=sizes, compute=studies.STEPS),
        learning_rate=LearningRateConfig(rule="sweep", rates=(1e-3, 2e-3, 4e-3, 8e-3), sizes=("tiny", "small")),
    )
    return config, asked


def test_the_prediction_is_on_disk_before_the_predicted_model_trains_at_the_rate_chosen_for_it(untrained, tmp_path):
    config, asked = untrained
    study = scaling_laws.run(config, tmp_path / "run")
    assert [name for name, _ in asked] == ["learning_rates", "trials", "prediction"]
    chosen = {choice.size: choice.rate for choice in study.choices}
    assert chosen["huge"] < chosen["small"] < chosen["tiny"]
    assert [(size, seed) for size, seed, _ in asked[2][1]] == [("huge", 0), ("huge", 1), ("huge", 2)]
    assert [rate for *_, rate in asked[2][1]] == [chosen["huge"]] * 3
    assert json.loads((tmp_path / "run" / "prediction.json").read_text())["actual"] == []
    assert "huge-s9 failed" in study.left_out
    held_out = [run for run in results.read(tmp_path / "run" / "results.json")[0] if run.held_out]
    assert len(held_out) == 3 and not {run.name for run in held_out} & {run.name for run in study.results}


def test_rates_and_prediction_stay_as_they_were_when_the_sweep_changes_later(untrained, tmp_path, monkeypatch, caplog):
    config, _ = untrained
    first = scaling_laws.run(config, tmp_path / "run")
    before = (tmp_path / "run" / "prediction.json").read_bytes()
    monkeypatch.setattr(scaling_laws.learning_rate, "choose", lambda *_: ([scaling_laws.Choice("tiny", 1.0, "")], []))
    fewer = [run for run in studies.sweep() if run.seed == 0]
    monkeypatch.setattr(scaling_laws, "launch_trials", lambda c, w, p, f: (fewer if f.name == "trials" else [], []))
    again = scaling_laws.run(config, tmp_path / "run")
    assert (tmp_path / "run" / "prediction.json").read_bytes() == before
    assert again.predictions[0].predicted == first.predictions[0].predicted
    assert again.choices[0] == next(choice for choice in first.choices if choice.size == "tiny")
    assert any("the sweep has changed" in line for line in again.left_out)


def test_rates_chosen_under_other_settings_are_refused(untrained, tmp_path):
    config, _ = untrained
    scaling_laws.run(config, tmp_path / "run")
    other = dataclasses.replace(config.learning_rate, rates=(1e-3, 3e-3, 9e-3))
    with pytest.raises(UserError, match=r"learning_rates\.json was chosen under other settings"):
        scaling_laws.run(dataclasses.replace(config, learning_rate=other), tmp_path / "run")


def test_a_prediction_that_could_not_be_trained_is_refused_before_anything_is(untrained, tmp_path):
    config, asked = untrained
    bad = dataclasses.replace(config.prediction, size=SizeConfig(name="odd", hidden_size=255))
    with pytest.raises(UserError, match="odd"):
        scaling_laws.run(dataclasses.replace(config, prediction=bad), tmp_path / "run")
    assert not asked


def test_results_are_not_read_from_the_folder_that_is_written(tmp_path):
    with pytest.raises(UserError, match="would be overwritten"):
        scaling_laws.run(finished(tmp_path), tmp_path)


@pytest.mark.parametrize("compute", [0.0, 1e30])
def test_runs_that_were_held_out_stay_out_of_the_fit_whatever_is_predicted(tmp_path, compute):
    config = finished(tmp_path)
    other = dataclasses.replace(config.prediction, compute=compute)
    study = scaling_laws.run(dataclasses.replace(config, prediction=other), tmp_path / "run")
    assert max(study.laws.power.compute) < studies.prediction().compute / 9


def test_a_record_that_was_edited_is_named_and_left_out(tmp_path):
    config = finished(tmp_path)
    values = json.loads((tmp_path / "results.json").read_text())
    records = values["trials"] if isinstance(values, dict) else values
    records[0]["compute"] *= 3
    (tmp_path / "results.json").write_text(json.dumps(values))
    study = scaling_laws.run(config, tmp_path / "run")
    assert len(study.results) == len(studies.sweep()) - 1
    assert any(records[0]["name"] in line and "compute" in line for line in study.left_out)


def test_the_cost_is_printed_without_training_anything(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling_laws, "run", None)
    monkeypatch.setattr(scaling_laws, "COST", SimpleNamespace(value=True))
    monkeypatch.setattr(scaling_laws, "MFU", SimpleNamespace(value=0.4))
    scaling_laws.main(config, tmp_path / "out")
    shown = capsys.readouterr().out
    assert "narrow" in shown and "wide" in shown and "huge" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cpu.py", "tiny.py", "baichuan2.py:7b", "baichuan2.py:13b"])
def test_the_configs_make_studies_of_which_no_trial_is_refused(name):
    config = runner.load_config(f"configs/scaling_laws/{name}", ScalingConfig)
    trials, _ = scaling_laws.all_trials(config)
    predicted = [trial for trial in trials if trial.size == config.prediction.size.name]
    assert len(predicted) == len(config.prediction.seeds)
    assert {trial.size for trial in trials} == {size.name for size in (*config.grid.sizes, config.prediction.size)}
    assert from_config_dict(ScalingConfig, dataclasses.asdict(config)) == config
