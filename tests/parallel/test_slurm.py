"""Pre-training on a real Slurm cluster of four nodes, all on this machine: by srun, and by sbatch with a supervisor."""

import subprocess
import sys
import time

import pytest

from llm_jax.config import CheckpointConfig, save
from llm_jax.training import metrics
from tests.experiments.test_pretrain import dataset, make_config  # noqa: F401  (a fixture)
from tests.parallel import fault_injection
from tests.scaling import slurm_cluster

REASON = slurm_cluster.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]
SECONDS = 300


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture(scope="module")
def trained_alone(dataset, tmp_path_factory):  # noqa: F811
    """The config that all train with, and the folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    config = make_config(dataset, steps=30, eval_every=0, eval_batches=1, checkpoint=CheckpointConfig(every_steps=1000))
    save(config, folder / "wanted.json")
    fault_injection.run_alone(fault_injection.training(folder / "wanted.json", folder / "run")[1:])
    return folder / "wanted.json", folder / "run"


def wait_for(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def assert_same_losses(workdir, straight):
    got, want = fault_injection.losses(workdir), fault_injection.losses(straight)
    assert list(got) == list(want)
    assert max(abs(got[step] - want[step]) for step in want) < 1e-5


def squeue() -> str:
    return subprocess.run(["squeue", "--noheader", "--format=%T"], capture_output=True, text=True, check=True).stdout


def test_srun(trained_alone, tmp_path):
    """Four processes find each other by what Slurm says, and print who is where."""
    config, straight = trained_alone
    command = ["srun", "-N4", "-n4", "--chdir", str(fault_injection.ROOT)]
    command += [sys.executable, *fault_injection.training(config, tmp_path / "run")[1:]]
    done = subprocess.run(command, env=fault_injection.environment(), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "4 processes, started by Slurm:" in done.stdout
    assert all(f"process {i} on n{i + 1} (pid " in done.stdout for i in range(4))
    assert_same_losses(tmp_path / "run", straight)
    assert fault_injection.rows_taken(tmp_path / "run") == fault_injection.rows_taken(straight)


def test_sbatch_with_a_supervisor_saves_and_comes_back(trained_alone, tmp_path):
    """SIGUSR1, as Slurm sends it before the time limit: a checkpoint, the queue, and on to the end."""
    config, straight = trained_alone
    run = tmp_path / "run"
    command = ["sbatch", "--nodes=4", f"--chdir={fault_injection.ROOT}", f"--output={tmp_path}/job.log"]
    command += ["configs/elastic/pretrain.sbatch", str(run), f"--config={config}"]
    environment = fault_injection.environment() | {"PYTHON": sys.executable}
    subprocess.run(command, env=environment, cwd=fault_injection.ROOT, check=True, capture_output=True)
    path = run / metrics.FILE
    wait_for(lambda: path.exists() and path.read_text().count("\n") > 3)
    subprocess.run(["scancel", "--me", "--signal=USR1", "--batch"], check=True)
    wait_for(lambda: "PENDING" in squeue())
    wait_for(lambda: not squeue().strip())
    printed = (tmp_path / "job.log").read_text()
    assert "start 1 with 4 processes on n1, n2, n3, n4" in printed
    assert "requeue at step" in printed and "of the checkpoint" in printed and "finished at step 30" in printed
    assert_same_losses(run, straight)
