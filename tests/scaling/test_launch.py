"""Launchers: what is finished is not trained again, what fails is tried again and left out, Ctrl-C stops cleanly."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from llm_jax import config as config_lib
from llm_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from llm_jax.errors import UserError
from llm_jax.scaling import board, launch, sweep
from llm_jax.scaling import job as jobs
from llm_jax.scaling.config import LauncherConfig
from llm_jax.scaling.trial import Trial
from tests.scaling import fake_runs


def make_trial(behaviour: float = fake_runs.FINE, seed: int = 0, steps: int = 8) -> Trial:
    model = ModelConfig(
        vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_size=32, max_length=8
    )
    config = TrainConfig(
        steps=steps,
        seed=seed,
        log_every=2,
        eval_every=4,
        model=model,
        optimizer=OptimizerConfig(weight_decay=behaviour, warmup_steps=0),
        data=DataConfig(sequence_length=8, batch_size=4, seed=seed),
    )
    return Trial(f"d16-{behaviour:g}-s{seed}", "d16", config)


def launch_all(groups, folder: Path, kind: str = "inline", retries: int = 1, **settings) -> tuple[list[str], str]:
    """The problems, and what was printed."""
    launcher = LauncherConfig(kind=kind, retries=retries, **settings)
    out = io.StringIO()
    console = Console(file=out, width=200)
    problems = launch.run(groups, fake_runs.execute, launcher, folder, console=console, poll_seconds=0.05)
    return list(problems.values()), out.getvalue()


def tries(trial: Trial, folder: Path) -> list[tuple[int, int]]:
    return fake_runs.tries_of(folder / trial.name)


@pytest.mark.parametrize("kind", ["inline", "processes"])
def test_failures_are_tried_again_and_left_out_and_the_rest_goes_on(tmp_path, kind):
    good, bad, unlucky = make_trial(), make_trial(fake_runs.ALWAYS_FAILS), make_trial(fake_runs.FAILS_ONCE)
    problems, out = launch_all([[bad], [unlucky], [good]], tmp_path, kind, parallel=3)
    assert len(problems) == 1
    assert problems[0].startswith(f"{bad.name} is left out after 2 tries: ValueError: no luck with {bad.name} (log: ")
    assert "second line" not in problems[0]
    log = Path(problems[0].partition("(log: ")[2].rstrip(")"))
    assert "Traceback" in log.read_text() and f"no luck with {bad.name}" in log.read_text()
    assert [len(tries(trial, tmp_path)) for trial in (good, bad, unlucky)] == [1, 2, 2]
    here = {pid == os.getpid() for trial in (good, bad, unlucky) for pid, _ in tries(trial, tmp_path)}
    assert here == {kind == "inline"}
    assert sweep.collect([good, bad, unlucky], tmp_path, failed=[bad.name])[1] == []
    results, missing = sweep.collect([good, bad, unlucky], tmp_path)
    assert [result.name for result in results] == [good.name, unlucky.name]
    assert len(missing) == 1 and f"no luck with {bad.name}" in missing[0]
    assert f"{good.name} done: loss 3.0625" in out


def test_a_group_that_fails_is_tried_again_trial_by_trial(tmp_path):
    bad, *good = make_trial(fake_runs.ALWAYS_FAILS), make_trial(seed=1), make_trial(seed=2)
    problems, _ = launch_all([[bad, *good]], tmp_path, retries=0)
    assert len(problems) == 1 and problems[0].startswith(f"{bad.name} is left out after 1 try")
    assert [size for _, size in tries(bad, tmp_path)] == [3, 1]
    assert [size for trial in good for _, size in tries(trial, tmp_path)] == [1, 1]
    launch_all([[make_trial(seed=seed) for seed in (3, 4)]], tmp_path)
    assert [size for _, size in tries(make_trial(seed=4), tmp_path)] == [2]


def test_finished_trials_are_not_launched_again(tmp_path):
    first, second = make_trial(seed=0), make_trial(seed=1)
    launch_all([[first]], tmp_path)
    launch_all([[first, second]], tmp_path)
    assert len(tries(first, tmp_path)) == 1
    assert tries(second, tmp_path) == [(os.getpid(), 1)]
    problems, out = launch_all([[first, second]], tmp_path)
    assert (problems, out) == ([], "")


def test_a_diverged_trial_is_not_tried_again(tmp_path):
    diverged = make_trial(fake_runs.DIVERGES)
    for _ in range(2):
        problems, _ = launch_all([[diverged]], tmp_path)
        assert len(problems) == 1 and "diverged" in problems[0]
    assert len(tries(diverged, tmp_path)) == 1


@pytest.mark.parametrize("group", [1, 2])
def test_a_trial_that_training_called_diverged_is_not_tried_again_and_its_neighbour_has_not_failed(tmp_path, group):
    diverged, good = make_trial(fake_runs.DIVERGES_LOUDLY), make_trial(seed=1)
    groups = [[good, diverged]] if group == 2 else [[good], [diverged]]
    for again in range(2):
        problems, _ = launch_all(groups, tmp_path)
        assert len(problems) == 1 and f"{diverged.name} diverged at step 2: lower its learning rate" in problems[0]
        assert again or problems[0].startswith(f"{diverged.name} is left out after 1 try: ")
    assert len(tries(diverged, tmp_path)) == len(tries(good, tmp_path)) == 1
    assert not (tmp_path / good.name / "failure.txt").exists()


def test_a_begun_trial_with_other_evaluations_is_no_longer_part_of_its_group(tmp_path):
    begun, *new = make_trial(), make_trial(seed=1), make_trial(seed=2)
    config_lib.save(dataclasses.replace(begun.config, eval_every=2), tmp_path / begun.name / "config.json")
    assert launch_all([[begun, *new]], tmp_path)[0] == []
    assert tries(begun, tmp_path) == [(os.getpid(), 1)]
    assert [tries(trial, tmp_path) for trial in new] == [[(os.getpid(), 2)]] * 2


def test_a_folder_with_another_run_is_left_alone(tmp_path):
    trial = make_trial()
    other = dataclasses.replace(trial.config, loss=dataclasses.replace(trial.config.loss, z_loss=0.5))
    config_lib.save(other, tmp_path / trial.name / "config.json")
    problems, _ = launch_all([[trial], [make_trial(seed=1)]], tmp_path)
    assert len(problems) == 1 and "loss.z_loss 0.5 instead of 0.0" in problems[0]
    assert config_lib.load(TrainConfig, tmp_path / trial.name / "config.json") == other
    assert tries(trial, tmp_path) == [] and len(tries(make_trial(seed=1), tmp_path)) == 1


def test_a_begun_run_keeps_its_evaluations_and_may_change_what_decides_no_number(tmp_path):
    trial = make_trial(fake_runs.STOPS_HALFWAY)
    config_lib.save(trial.config, tmp_path / trial.name / "config.json")
    changed = dataclasses.replace(trial.config, eval_every=2, log_every=1)
    with pytest.raises(KeyboardInterrupt):
        launch_all([[dataclasses.replace(trial, config=changed)]], tmp_path)
    stored = config_lib.load(TrainConfig, tmp_path / trial.name / "config.json")
    assert (stored.eval_every, stored.log_every) == (4, 1)


@pytest.mark.parametrize("behaviour", [fake_runs.STOPS_HALFWAY, fake_runs.STOPS_AT_ITS_END], ids=["middle", "end"])
def test_ctrl_c_stops_the_sweep_inline_whenever_it_comes(tmp_path, behaviour):
    """Training turns Ctrl-C into a checkpoint and returns: the next trial must not begin."""
    after = make_trial(seed=1)
    with pytest.raises(KeyboardInterrupt):
        launch_all([[make_trial(behaviour)], [after]], tmp_path)
    assert tries(after, tmp_path) == []


def test_a_run_that_ends_too_early_by_itself_has_failed(tmp_path):
    trial, after = make_trial(fake_runs.ENDS_EARLY), make_trial(seed=1)
    problems, _ = launch_all([[trial], [after]], tmp_path)
    assert problems == [f"{trial.name} is left out after 2 tries: it stopped before its end"]
    assert len(tries(after, tmp_path)) == 1


def test_a_process_that_dies_without_a_word_is_reported_with_its_log(tmp_path):
    problems, _ = launch_all([[make_trial(fake_runs.DIES)]], tmp_path, "processes", retries=0)
    assert len(problems) == 1 and "is left out after 1 try: its job ended before it did" in problems[0]
    assert Path(problems[0].partition("(log: ")[2].rstrip(")")).exists()


def test_no_more_processes_than_allowed(tmp_path):
    """One at a time: each of the processes begins after the one before has ended."""
    trials = [make_trial(seed=seed) for seed in range(3)]
    out = launch_all([[trial] for trial in trials], tmp_path, "processes", parallel=1)[1]
    states = [line.split()[1].rstrip(":") for line in out.splitlines()]
    assert states == ["running", "done"] * 3


def test_processes_begin_with_the_longest(tmp_path):
    trials = [make_trial(steps=8), make_trial(seed=1, steps=24), make_trial(seed=2, steps=16)]
    out = launch_all([[trial] for trial in trials], tmp_path, "processes", parallel=1)[1]
    begun = [line.split()[0] for line in out.splitlines() if line.split()[1].rstrip(":") == "running"]
    assert begun == [trials[1].name, trials[2].name, trials[0].name]


@pytest.mark.parametrize("parallel", [1, 2, 3])
def test_processes_share_the_cores_out(tmp_path, parallel):
    """Each has an equal part of its own while they are enough for that, and all of them otherwise."""
    trials = [make_trial(seed=seed) for seed in range(parallel)]
    launch_all([[trial] for trial in trials], tmp_path, "processes", parallel=parallel)
    cores = sorted(os.sched_getaffinity(0))
    taken = [json.loads((tmp_path / trial.name / "cores.json").read_text()) for trial in trials]
    each = len(cores) // parallel
    assert taken == ([cores[i * each : (i + 1) * each] for i in range(parallel)] if each else [cores] * parallel)


@pytest.mark.parametrize("kind", ["inline", "processes"])
def test_a_run_that_another_process_trains_stops_the_sweep_before_it_starts(tmp_path, kind):
    first, trial = make_trial(seed=1), make_trial()
    path = tmp_path / trial.name / "config.json"
    config_lib.save(trial.config, path)
    with jobs._held(path.parent), pytest.raises(UserError, match="is being trained by another process, which holds "):
        launch_all([[first], [trial]], tmp_path, kind)
    assert tries(first, tmp_path) == tries(trial, tmp_path) == []
    assert not (path.parent / "failure.txt").exists()
    assert launch_all([[first], [trial]], tmp_path, kind)[0] == []


@pytest.mark.parametrize("kind", ["inline", "processes"])
def test_a_run_that_another_process_takes_meanwhile_is_not_tried_in_vain(tmp_path, kind, monkeypatch):
    first, trial = make_trial(seed=1), make_trial()
    path = tmp_path / trial.name / "config.json"
    config_lib.save(trial.config, path)
    monkeypatch.setattr(launch.Inline if kind == "inline" else launch.Processes, "adopt", lambda self, waiting: [])
    with jobs._held(path.parent), pytest.raises(UserError, match="is being trained by another process"):
        launch_all([[first], [trial]], tmp_path, kind, parallel=1)
    assert (len(tries(first, tmp_path)), tries(trial, tmp_path)) == (1, [])
    assert not (path.parent / "failure.txt").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '{"7_0": 3}'])
def test_a_damaged_record_of_slurm_jobs_is_one_line(tmp_path, monkeypatch, text):
    (tmp_path / "bin").mkdir()
    for name in ("srun", "squeue"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / launch.RECORD).write_text(text)
    with pytest.raises(UserError, match=r"slurm.json is damaged: see with squeue"):
        launch_all([[make_trial()]], tmp_path, "slurm")


def test_ctrl_c_ends_the_processes(tmp_path):
    trial, after = make_trial(fake_runs.SLOW), make_trial(seed=1)
    ended = threading.Event()

    def press() -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / trial.name / "slow").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        if not ended.wait(60):
            (tmp_path / trial.name / "go").touch()  # nothing was interrupted: let it end, and the test fail

    presser = threading.Thread(target=press)
    presser.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            launch_all([[trial], [after]], tmp_path, "processes", parallel=1)
    finally:
        ended.set()
        presser.join()
    pid = tries(trial, tmp_path)[0][0]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert tries(after, tmp_path) == []
    with jobs._held(tmp_path / trial.name):
        pass  # nobody holds it any more


def test_functions_that_other_processes_cannot_import_are_refused(tmp_path):
    assert jobs.reference(fake_runs.execute) == "tests.scaling.fake_runs:execute"
    with pytest.raises(UserError, match="cannot be imported"):
        jobs.reference(lambda paths: None)


def test_a_function_of_the_started_module_is_found_by_its_real_name(tmp_path):
    (tmp_path / "script.py").write_text(
        "from llm_jax.scaling.job import reference\ndef work(paths): pass\nprint(reference(work))\n"
    )
    done = subprocess.run([sys.executable, "-m", "script"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "script:work"


def test_slurm_without_slurm_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="there is no srun here"):
        launch_all([[make_trial()]], tmp_path, "slurm")


def test_slurm_options_reach_the_batch_file(tmp_path, monkeypatch):
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    launcher = LauncherConfig(
        kind="slurm",
        partition="gpu",
        gpus_per_node=8,
        cpus_per_task=4,
        nodes=2,
        memory_gigabytes=64,
        timeout_minutes=90,
        parallel=5,
        setup=("module load cuda",),
        options=("qos=high", "gres=tpu:4"),
    )
    executor = launch.slurm_executor(launcher, tmp_path)
    executor.parameters["map_count"] = 9
    text = executor._make_submission_file_text("COMMAND", "")
    wanted = ("partition=gpu", "gpus-per-node=8", "cpus-per-task=4", "nodes=2", "mem=64GB", "time=90", "qos=high")
    for option in (*wanted, "gres=tpu:4", "array=0-8%5"):
        assert f"#SBATCH --{option}\n" in text
    assert text.index("module load cuda") < text.index("COMMAND")
    assert "--cpus-per-task=4" in text[text.index("srun") :]
    assert "account" not in text and "constraint" not in text


def test_table_shows_every_state(tmp_path):
    trials = [make_trial(seed=seed) for seed in range(40)]
    out = io.StringIO()
    console = Console(file=out, width=120, height=20, force_terminal=True)
    run = tmp_path / trials[3].name
    run.mkdir()
    fake_runs.write(trials[3].config, run, 6, 2.5)
    (run / "metrics.jsonl").open("a").write('{"kind": "train", "st')
    with board.Board(trials, tmp_path, live=True, console=console) as table:
        table.set(trials[3], board.RUNNING)
        table.set(trials[5], board.FAILED, "out of luck")
        table.refresh()
    text = out.getvalue()
    assert "6/8" in text and "2.500" in text and "1,000" in text  # of the last whole record
    assert f"{trials[5].name} failed: out of luck" in text
    assert "... and 28 more" in text
    assert "1 running, 38 waiting, 1 failed" in text
