"""A full disk: one line for each process, soon, and neither a traceback nor a wait for ever."""

import dataclasses
import os
import subprocess
import sys

import pytest

from llm_jax.config import CheckpointConfig, save
from tests.experiments.test_pretrain import dataset, make_config  # noqa: F401  (a fixture)
from tests.parallel import fault_injection
from tests.parallel.test_meeting import free_port

SECONDS = 240


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
    command = [sys.executable, "-m", "experiments.pretrain", f"--config={tmp_path}/wanted.json"]
    command += [f"--workdir={small_disk}/run"]
    job = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    processes = [
        subprocess.Popen(
            [*command, *job, f"--process={i}"],
            env=fault_injection.environment(),
            cwd=fault_injection.ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    for error in errors:
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "the disk is full" in lines[0], error
        assert "Traceback" not in error, error
