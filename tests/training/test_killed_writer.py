"""kill -9 in the middle of writing a checkpoint: there is always one that can be restored, and none was lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_while_writing(tmp_path, rounds):
    command = [sys.executable, "-m", "tests.training.killed_writer", str(tmp_path), str(rounds), "0"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60 + 30 * rounds)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == rounds
    assert not any(result["damaged"] for result in results)  # what was not whole was never taken for a checkpoint
    if rounds >= 50:
        assert sum(bool(result["unfinished"]) for result in results) > rounds / 8  # really in the middle of a write
        assert len({result["step"] for result in results}) > rounds / 4
