"""A study as a user runs it: it trains, predicts before it looks, reports, goes on after a stop and can be costed."""

import csv
import dataclasses
import json
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
    results.write([*studies.sweep(), *studies.prediction().actual], tmp_path)
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
    assert "4 distinct compute points" in problem
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


def test_the_prediction_is_on_disk_before_the_predicted_model_trains(tmp_path, monkeypatch):
    config, folder = dataclasses.replace(finished(tmp_path), results=""), tmp_path / "run"
    laws = scaling_laws.study.fit_laws(studies.sweep(), config.fit)
    seen = []

    def train(found, config, workdir):
        seen.append(json.loads((workdir / "prediction.json").read_text()))
        assert f"{seen[0]['predicted']:.4f}" in (workdir / "report.md").read_text()
        return list(studies.prediction().actual), ["huge-s9 failed"]

    monkeypatch.setattr(scaling_laws, "with_dataset", lambda config, workdir: config)
    monkeypatch.setattr(scaling_laws, "train", lambda config, workdir: scaling_laws.Study(tuple(studies.sweep()), laws))
    monkeypatch.setattr(scaling_laws, "train_predicted", train)
    study = scaling_laws.run(config, folder)
    assert seen and seen[0]["actual"] == []
    assert study.predictions[0].predicted == seen[0]["predicted"]
    assert study.left_out == ("huge-s9 failed",)


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
    trials = scaling_laws.all_trials(config)
    predicted = [trial for trial in trials if trial.size == config.prediction.size.name]
    assert len(predicted) == len(config.prediction.seeds)
    assert {trial.size for trial in trials} == {size.name for size in (*config.grid.sizes, config.prediction.size)}
    assert from_config_dict(ScalingConfig, dataclasses.asdict(config)) == config
