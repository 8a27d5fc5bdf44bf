"""Sweeps on a real Slurm cluster, started on this machine: arrays, failures, jobs found again, real training."""

import dataclasses
import io
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments import trials as run_trials
from llm_jax.config import CheckpointConfig, CorpusConfig, LossConfig
from llm_jax.data import pipeline
from llm_jax.scaling import launch, sweep
from llm_jax.scaling.config import LauncherConfig
from tests.data.conftest import ByteTokenizer, write_corpus
from tests.scaling import fake_runs, slurm_cluster
from tests.scaling.test_launch import make_trial, tries

REASON = slurm_cluster.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")):
        yield


def launch_all(groups, folder: Path, execute=fake_runs.execute, retries: int = 1, **settings):
    """The problems, and what was printed."""
    out = io.StringIO()
    launcher = LauncherConfig(kind="slurm", retries=retries, parallel=3, timeout_minutes=30, **settings)
    try:
        problems = launch.run(groups, execute, launcher, folder, console=Console(file=out, width=200), poll_seconds=0.5)
    finally:
        print(out.getvalue())
    return list(problems.values()), out.getvalue()


def when(condition, action) -> threading.Thread:
    """Do something, in a thread, as soon as a condition holds."""

    def work() -> None:
        while not condition():
            time.sleep(0.2)
        action()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def squeue(*arguments: str) -> str:
    command = ["squeue", "--noheader", "--array", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_array_of_jobs_with_failures(tmp_path):
    good = [make_trial(fake_runs.SLOW, seed) for seed in range(6)]
    bad, unlucky = make_trial(fake_runs.ALWAYS_FAILS), make_trial(fake_runs.FAILS_ONCE)
    seen: list[str] = []

    def let_go() -> None:
        seen.append(squeue("--format=%i|%j|%T|%N|%r"))
        print(subprocess.run(["squeue"], capture_output=True, text=True).stdout)
        for trial in good:
            (tmp_path / trial.name / "go").touch()

    started = [tmp_path / trial.name / "slow" for trial in good[:3]]
    watcher = when(lambda: all(path.exists() for path in started), let_go)
    problems, out = launch_all([[trial] for trial in [*good, bad, unlucky]], tmp_path)
    watcher.join()
    states = [line.split("|")[2] for line in seen[0].splitlines()]
    assert sorted(states) == ["PENDING"] * 5 + ["RUNNING"] * 3  # an array of 8, three at a time
    assert len({line.partition("_")[0] for line in seen[0].splitlines()}) == 1
    assert len(problems) == 1
    assert problems[0].startswith(f"{bad.name} is left out after 2 tries: ValueError: no luck with {bad.name} (log: ")
    log = Path(problems[0].partition("(log: ")[2].rstrip(")"))
    assert f"no luck with {bad.name}" in log.read_text()
    results, _ = sweep.collect([*good, unlucky, bad], tmp_path)
    assert [result.name for result in results] == [trial.name for trial in [*good, unlucky]]
    assert [len(tries(trial, tmp_path)) for trial in (good[0], unlucky, bad)] == [1, 2, 2]
    assert "jobs 8" in out and f"{good[0].name} running" in out


def test_jobs_run_on_after_ctrl_c_and_are_found_again(tmp_path):
    trials = [make_trial(fake_runs.SLOW, seed) for seed in range(3)]
    started = [tmp_path / trial.name / "slow" for trial in trials]
    when(lambda: all(path.exists() for path in started), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        launch_all([[trial] for trial in trials], tmp_path)
    assert len(squeue().splitlines()) == 3
    new = make_trial(seed=9)
    when(
        lambda: (tmp_path / new.name / "metrics.jsonl").exists(),
        lambda: [(tmp_path / trial.name / "go").touch() for trial in trials],
    )
    problems, out = launch_all([trials, [new]], tmp_path)
    assert problems == [] and "jobs 1" in out
    assert [len(tries(trial, tmp_path)) for trial in [*trials, new]] == [1] * 4


def test_a_cancelled_job_is_tried_again_and_reported(tmp_path):
    trial = make_trial(fake_runs.SLOW)

    def cancel() -> None:
        subprocess.run(["scancel", "--me"], check=True)

    when((tmp_path / trial.name / "slow").exists, cancel)
    problems, _ = launch_all([[trial]], tmp_path, retries=0)
    assert len(problems) == 1 and "its job ended before it did" in problems[0] and "CANCELLED" in problems[0]
    (tmp_path / trial.name / "go").touch()
    assert launch_all([[trial]], tmp_path)[0] == []
    assert len(tries(trial, tmp_path)) == 2


def test_the_processes_of_a_job_share_its_runs(tmp_path):
    fine, bad = make_trial(), make_trial(fake_runs.ALWAYS_FAILS)
    problems, _ = launch_all([[fine], [bad]], tmp_path, retries=0, nodes=2)
    assert len(problems) == 1 and f"ValueError: no luck with {bad.name}" in problems[0]
    assert [len(tries(trial, tmp_path)) for trial in (fine, bad)] == [2, 2]


def test_training_on_the_cluster(tmp_path):
    """Real pre-training runs, two of them in one compiled step; one of the others diverges."""
    write_corpus(tmp_path / "texts")
    (tmp_path / "tokenizer.model").write_bytes(b"a model file")
    corpus = CorpusConfig(
        path=str(tmp_path / "texts"),
        tokenizer=str(tmp_path / "tokenizer.model"),
        output=str(tmp_path / "dataset"),
        holdout_fraction=0.1,
    )
    pipeline.prepare(corpus, ByteTokenizer())

    def real(seed: int, rate: float):
        trial = make_trial(seed=seed, steps=20)
        config = dataclasses.replace(
            trial.config,
            eval_every=10,
            eval_batches=2,
            model=dataclasses.replace(trial.config.model, vocab_size=264, max_length=32),
            loss=LossConfig(chunk_size=16),
            optimizer=dataclasses.replace(trial.config.optimizer, learning_rate=rate),
            data=dataclasses.replace(
                trial.config.data, dataset=corpus.output, sequence_length=32, batch_size=16, seed=seed
            ),
            checkpoint=CheckpointConfig(every_steps=100),
        )
        return dataclasses.replace(trial, name=f"rate{rate:g}-s{seed}", config=config)

    trials = [real(0, 1e-2), real(1, 1e-2), real(2, 1e-2), real(0, 1e30)]
    groups = [trials[:2], *([trial] for trial in trials[2:])]
    problems, _ = launch_all(groups, tmp_path / "trials", run_trials.execute, retries=0)
    assert len(problems) == 1 and problems[0].startswith(
        "rate1e+30-s0 is left out after 1 try: rate1e+30-s0 diverged at step 1"
    )
    results, _ = sweep.collect(trials, tmp_path / "trials")
    assert len(results) == 3
    assert all(result.curve[0][1] > result.loss for result in results)
    assert len({result.loss for result in results}) == 3
