"""The command line of experiments: what is parsed, what is refused, and in how many lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import runner
from llm_jax import config as config_lib
from llm_jax.config import MeshConfig, SamplingConfig, TrainConfig
from llm_jax.errors import UserError
from llm_jax.parallel import job as jobs

CONFIG = """
from llm_jax.config import ModelConfig, TrainConfig, to_config_dict

def get_config(arg="small"):
    return to_config_dict(TrainConfig(steps=5, model=ModelConfig(num_layers=2 if arg == "small" else 9)))
"""

EXPERIMENT = '''"""Count to a number.

Explained at more length.
"""
import errno
import logging
from absl import flags
from experiments import runner
from llm_jax.config import TrainConfig
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue")

def run(config, workdir):
    if config.seed == 1:
        raise KeyboardInterrupt
    if config.seed == 2:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "state.bin")
        except OSError as error:
            raise RuntimeError("checkpoint failed") from error
    if config.seed == 3:
        raise ZeroDivisionError("a defect")
    print(config.steps, _PROMPT.value)

if __name__ == "__main__":
    runner.main(run, TrainConfig, "CONFIG", save_config=False)
'''


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def parse(config_file: Path, *arguments: str) -> tuple[TrainConfig, Path]:
    return runner.parse(["experiment", *arguments], TrainConfig, str(config_file), "runs/default")


def test_defaults_come_from_the_config_file(config_file):
    config, workdir = parse(config_file)
    assert (config.steps, config.model.num_layers) == (5, 2)
    assert workdir == Path("runs/default")


@pytest.mark.parametrize("form", [["--config={}:big"], ["--config", "{}:big"], ["-config={}:big"]])
def test_config_argument_reaches_get_config(config_file, form):
    config, _ = parse(config_file, *(part.format(config_file) for part in form))
    assert config.model.num_layers == 9


def test_overrides_of_every_type(config_file):
    config, workdir = parse(
        config_file,
        "--workdir=elsewhere",
        "--config.steps",
        "7",
        "--config.model.qkv_bias",
        "--noconfig.model.scan_layers",
        "--config.optimizer.learning_rate=1",
        "--config.model.position=alibi",
        "--config.model.window_sizes=(8, 0)",
        "--config.data.weights={'books': 2}",
    )
    assert (config.steps, config.model.qkv_bias, config.model.scan_layers) == (7, True, False)
    assert config.optimizer.learning_rate == 1.0
    assert (config.model.position, config.model.window_sizes) == ("alibi", (8, 0))
    assert dict(config.data.weights) == {"books": 2.0}
    assert workdir == Path("elsewhere")


def test_saved_config_is_read_as_data(config_file, tmp_path):
    saved = TrainConfig(steps=11, model=config_lib.ModelConfig(num_layers=2, window_sizes=(4, 0)))
    config_lib.save(saved, tmp_path / "config.json")
    config, _ = parse(config_file, f"--config={tmp_path / 'config.json'}", "--config.seed=3")
    assert config == TrainConfig(steps=11, seed=3, model=saved.model)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--config.modle.num_layers=3",
            r"unknown config key 'config.modle.num_layers'; did you mean 'config.model.num",
        ),
        ("--config.model.num_layer=3", r"did you mean 'config.model.num_layers'\?"),
        ("--config.steps=many", r"config.steps must be int, got 'many'"),
        ("--config.steps=1.5", r"config.steps must be int, got '1.5'"),
        ("--config.model.qkv_bias=maybe", r"config.model.qkv_bias must be bool, got 'maybe'"),
        ("--config.model=3", r"config.model must be a table"),
        ("--config.model.position=rop", r"position='rop' is not one of rope, alibi; did you mean 'rope'"),
        ("--config.data.weights.books=1", r"set the whole table, as in --config.data.weights="),
        ("--config.steps", r"Missing value for flag --config.steps"),
        ("--config", r"--config needs a file"),
        ("--config=configs/pretrian/nothing.py", r"no config file 'configs/pretrian/nothing.py'"),
        ("--wokdir=x", r"unknown flag --wokdir; did you mean --workdir\?"),
        ("--workdir=", r"--workdir is empty"),
        ("stray", r"unexpected argument 'stray'"),
    ],
)
def test_mistakes_are_one_line(config_file, argument, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(config_file, argument)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"has no function get_config\(\)"),
        ("def get_config():\n    return 1 / 0", r"line 2: ZeroDivisionError"),
        ("def get_config(:", r"line 1: SyntaxError"),
        ("def get_config(size):\n    return {}", r"needs an argument: write --config=.*:ARGUMENT"),
        (
            "def get_config():\n    return {'stesp': 1}",
            r"unknown config key 'config.stesp'; did you mean 'config.steps'",
        ),
    ],
)
def test_broken_config_files_are_one_line(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse(path)
    assert "\n" not in str(caught.value)


def test_config_is_saved_once_resolved(config_file, tmp_path):
    seen = []
    runner.main(
        lambda config, workdir: seen.append(config),
        TrainConfig,
        str(config_file),
        argv=["experiment", f"--workdir={tmp_path / 'run'}", "--config.steps=9"],
    )
    assert config_lib.load(TrainConfig, tmp_path / "run" / "config.json") == seen[0]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 9


def test_workdir_of_another_experiment_is_refused(config_file, tmp_path, capsys):
    config_lib.save(SamplingConfig(), tmp_path / "config.json")
    with pytest.raises(SystemExit) as caught:
        runner.main(lambda *_: None, TrainConfig, str(config_file), argv=["experiment", f"--workdir={tmp_path}"])
    assert caught.value.code == 1
    assert "holds another experiment's run" in capsys.readouterr().err
    assert config_lib.load(SamplingConfig, tmp_path / "config.json") == SamplingConfig()


def test_workdir_that_may_not_be_written_is_refused(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # what holds for others does not hold for root
    with pytest.raises(UserError, match="cannot be written to; choose another --workdir"):
        parse(config_file, f"--workdir={tmp_path}/run")


@pytest.mark.parametrize("inside", ["", "/run"])
def test_workdir_that_is_a_file_or_in_one_is_refused(config_file, tmp_path, inside):
    (tmp_path / "notes").touch()
    with pytest.raises(UserError, match="notes is a file, no folder; choose another --workdir"):
        parse(config_file, f"--workdir={tmp_path}/notes{inside}")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_workdir_where_no_folder_can_be_made_is_refused():
    with pytest.raises(UserError, match="no folder can be made at /proc/nowhere: choose another --workdir"):
        runner.save_in(SamplingConfig(), Path("/proc/nowhere/config.json"))


def test_config_keys_lists_groups_and_leaves():
    keys = dict(config_lib.keys(TrainConfig))
    assert keys["mesh"] is MeshConfig
    assert keys["mesh.tensor"] is int


def command(config_file: Path, *arguments: str, body: str = "") -> subprocess.CompletedProcess:
    """The experiment in a process of its own, in a folder that is not the repository."""
    script = config_file.parent / "count.py"
    script.write_text(EXPERIMENT.replace("CONFIG", str(config_file)).replace("    print(", f"{body}    print("))
    environment = {**os.environ, "PYTHONPATH": str(runner.REPOSITORY)}
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=config_file.parent, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "status", "stderr"),
    [
        (["--prompt=a", "--prompt", "b", "--config.steps=6"], 0, ""),
        (["--config.stesp=6"], 1, "error: unknown config key 'config.stesp'; did you mean 'config.steps'?\n"),
        (["--config.seed=1"], 130, "interrupted\n"),
        (["--config.seed=2"], 1, "error: the disk is full while writing state.bin: free some space and"),
    ],
)
def test_exit_status_and_messages(config_file, arguments, status, stderr):
    done = command(config_file, *arguments)
    assert done.returncode == status
    assert done.stderr.startswith(stderr) and done.stderr.count("\n") == (1 if stderr else 0)
    assert done.stdout == ("6 ['a', 'b']\n" if status == 0 else "")


def test_defects_keep_their_traceback(config_file):
    done = command(config_file, "--config.seed=3")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "a defect" in done.stderr


def test_messages_are_plain_lines_and_warnings_say_so(config_file):
    body = "    logging.getLogger('llm_jax.data').info('read 3')\n    logging.getLogger('other').warning('skipped 1')\n"
    done = command(config_file, body=body)
    assert done.stderr == "read 3\nwarning: skipped 1\n"


def test_help_shows_docstring_flags_keys_and_example(config_file):
    done = command(config_file, "--help")
    assert done.returncode == 0
    for part in ("Explained at more length.", "--workdir", "--prompt", "model.num_layers = 2", "Example: python -m"):
        assert part in done.stdout
    assert "--pdb" not in done.stdout and len(done.stdout.splitlines()) < 90


def test_relative_config_paths_also_start_at_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has no function get_config"):
        runner.load_config("configs/__init__.py", TrainConfig)


def test_which_process_this_is_can_be_said_by_flags(config_file, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "before")  # so that it is put back afterwards
    job = ["--coordinator=n1:7000", "--processes=4", "--process=2"]
    parse(config_file, *job)
    assert jobs.find(os.environ) == jobs.Job("JAX's variables", 2, 4, "n1:7000")


def test_what_one_process_does_alone_the_others_leave_to_the_first(config_file):
    done = command(config_file, "--coordinator=n1:7000", "--processes=4", "--process=2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    joins = "    from llm_jax.parallel import distributed\n    distributed.initialize(1.0)\n"  # it waits
    done = command(config_file, "--coordinator=127.0.0.1:7000", "--processes=4", "--process=0", body=joins)
    assert done.stderr == "count runs in one process: in this one, the first of 4\n" and done.returncode == 0
