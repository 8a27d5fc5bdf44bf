"""The demo's chain: its order, skipping, stopping and signals with stand-in commands; and once for real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import demo, runner
from experiments.demo import DemoConfig
from llm_jax.errors import UserError
from tests import commands

NAMES = ["train_tokenizer", "prepare_data", "pretrain", "generate", "report"]


class Commands:
    """Stands in for `demo.execute`: notes every command and writes what its experiment would."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.ran: list[str] = []
        self.status: dict[str, int] = {}
        self.last_step = 5

    def __call__(self, command: list[str]) -> int:
        name = command[2].removeprefix("experiments.")
        self.ran.append(name)
        if name in self.status:
            return self.status[name]
        {
            "train_tokenizer": lambda: self._write("tokenizer/tokenizer_report.json"),
            "prepare_data": lambda: self._write("data/dataset/summary.json"),
            "pretrain": self._pretrain,
            "generate": lambda: self._write("samples/samples.json"),
            "report": lambda: self._write("report.html"),
        }[name]()
        return 0

    def _write(self, name: str, text: str = "") -> None:
        path = self.workdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def _pretrain(self) -> None:
        self._write("model/config.json", json.dumps({"steps": 5}))
        self._write(f"model/checkpoints/{self.last_step}/whole")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    stand_in = Commands(tmp_path)
    monkeypatch.setattr(demo, "execute", stand_in)
    return stand_in


def test_stages_run_in_order_and_are_noted(fake, tmp_path, capsys):
    demo.run(DemoConfig(pretrain=("--config=mine.py",)), tmp_path)
    assert fake.ran == NAMES
    notes = json.loads((tmp_path / "stages.json").read_text())
    assert list(notes) == NAMES
    command = notes["pretrain"]["command"]
    assert command.startswith("python -m experiments.pretrain --config=mine.py --workdir=")
    assert f"$ {command}" in capsys.readouterr().out


def test_finished_stages_are_skipped_and_said_to_be(fake, tmp_path, capsys):
    demo.run(DemoConfig(), tmp_path)
    fake.ran.clear()
    capsys.readouterr()
    demo.run(DemoConfig(), tmp_path)
    assert fake.ran == []
    assert capsys.readouterr().out.count("finished earlier, skipped") == len(NAMES)


def test_what_follows_a_stage_that_ran_is_run_again(fake, tmp_path):
    demo.run(DemoConfig(), tmp_path)
    fake.ran.clear()
    (tmp_path / "samples/samples.json").unlink()
    demo.run(DemoConfig(), tmp_path)
    assert fake.ran == ["generate", "report"]


def test_a_failing_stage_stops_the_chain_with_its_status(fake, tmp_path):
    fake.status["pretrain"] = 7
    with pytest.raises(SystemExit) as stop:
        demo.run(DemoConfig(), tmp_path)
    assert stop.value.code == 7
    assert fake.ran == NAMES[:3]
    fake.status.clear()
    demo.run(DemoConfig(), tmp_path)
    assert fake.ran[3:] == NAMES[2:]


def test_a_run_that_was_stopped_early_is_not_taken_for_finished(fake, tmp_path):
    fake.last_step = 3
    with pytest.raises(UserError, match="pretrain stopped before its end"):
        demo.run(DemoConfig(), tmp_path)
    fake.last_step = 5
    demo.run(DemoConfig(), tmp_path)
    assert fake.ran == [*NAMES[:3], *NAMES[2:]]


def test_times_of_several_tries_add_up(fake, tmp_path):
    demo.run(DemoConfig(), tmp_path)
    path = tmp_path / "stages.json"
    notes = json.loads(path.read_text())
    notes["report"]["seconds"] = 1000.0
    path.write_text(json.dumps(notes))
    (tmp_path / "report.html").unlink()
    demo.run(DemoConfig(), tmp_path)
    assert json.loads(path.read_text())["report"]["seconds"] >= 1000.0


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_every_command_of_the_demo_is_one_its_experiment_accepts(name, tmp_path):
    config = runner.load_config(f"configs/demo/{name}.py", DemoConfig)
    for stage in demo.stages(config, tmp_path):
        commands.parse([f"experiments.{stage.name}", *stage.arguments])


@pytest.mark.parametrize(("code", "status"), [("pass", 0), ("exit(3)", 3)])
def test_execute_returns_the_status(code, status):
    assert demo.execute([sys.executable, "-c", code]) == status


def test_execute_counts_signals_as_a_shell_does():
    assert demo.execute([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_leaves_the_command_time_to_finish(number, tmp_path):
    ready = tmp_path / "ready"
    child = (
        "import pathlib, signal, sys, time\n"
        "def stop(number, frame): time.sleep(0.5); sys.exit(40 + number)\n"
        "signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(30)"
    )
    code = f"import sys; from experiments.demo import execute; sys.exit(execute([sys.executable, '-c', {child!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=runner.REPOSITORY, start_new_session=True)
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to all of the foreground
    else:
        process.send_signal(number)
    assert process.wait(20) == 40 + number


@pytest.mark.slow
def test_the_chain_for_real_on_own_text(tmp_path):
    texts = tmp_path / "texts"
    for source, line in {
        "letters": "Dear friend, it rained again today, number {}.\n",
        "laws": "第{}条 本法自公布之日起施行。\n",
    }.items():
        (texts / source).mkdir(parents=True)
        for index in range(40):
            text = "".join(line.format(100 * index + i) for i in range(60))
            (texts / source / f"{index}.txt").write_text(text)
    config = DemoConfig(
        train_tokenizer=(
            "--config=configs/tokenizer/own_text.py",
            f"--config.corpus.path={texts}",
            "--config.vocab_size=320",
        ),
        prepare_data=("--config=configs/data/own_text.py", f"--config.path={texts}", "--config.holdout_fraction=0.1"),
        pretrain=("--config=configs/demo/pretrain.py:tiny",),
        generate=("--config=configs/generate/demo.py", "--config.max_new_tokens=4"),
        report=("--config=configs/demo/report.py",),
    )
    workdir = tmp_path / "demo"
    demo.run(config, workdir)
    report = json.loads((workdir / "report.json").read_text())
    assert set(report["heldout"]) == {"letters", "laws", "all"}
    held_out = [json.loads(line)["text"] for line in (workdir / "data/dataset/heldout/laws.jsonl").open()]
    assert report["heldout"]["laws"]["text_bytes"] == len("".join(held_out).encode())
    figures = report["heldout"]["all"]["bits_per_byte"]
    assert figures["model"] < figures["unigram"]  # sixty steps are enough for texts as monotonous as these
    assert report["run"]["tokens"] == 60 * 8 * 64
    assert len(report["samples"]) > 0
    assert (workdir / "report.html").stat().st_size > 10_000
