"""A full disk: one line for each process, soon, and neither a traceback nor a wait for ever."""

import dataclasses
import os
import subprocess

import pytest

from llm_jax.config import CheckpointConfig, save
from tests.experiments.test_pretrain import dataset, make_config  # noqa: F401  (a fixture)
from tests.processes import run_together


@pytest.fixture
def small_disk(tmp_path):
    """A file system of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_ends_all_processes_with_a_line(dataset, small_disk, tmp_path):  # noqa: F811
    config = make_config(dataset, steps=100, eval_every=0, checkpoint=CheckpointConfig(every_steps=1, keep_last=99))
    save(dataclasses.replace(config, eval_batches=1), tmp_path / "wanted.json")
    arguments = ["-m", "experiments.pretrain", f"--config={tmp_path}/wanted.json", f"--workdir={small_disk}/run"]
    errors = run_together(arguments, status=1)
    for error in errors:
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "the disk is full" in lines[0], error
        assert "Traceback" not in error, error
