"""Processes that real programs start, where they are installed: Open MPI, MPICH, and OpenSSH for a supervisor."""

import dataclasses
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from llm_jax.config import CheckpointConfig, save
from tests.experiments.test_pretrain import dataset, make_config  # noqa: F401  (a fixture)
from tests.parallel import fault_injection
from tests.parallel.fault_injection import LOSE, ROOT, supervised

pytestmark = pytest.mark.slow
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
HELLO = """
import jax
from llm_jax.parallel import distributed, shares
distributed.initialize(120)
assert shares.gather(jax.process_index()) == [0, 1]
assert jax.device_count() == 2
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("program", "name", "environment"),
    [
        ("mpirun.openmpi --oversubscribe", "Open MPI", {}),
        ("mpiexec.mpich", "MPI", {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:{port}"}),  # which MPICH does not say
    ],
)
def test_mpi(program, name, environment):
    launcher = program.split()
    if shutil.which(launcher[0]) is None:
        pytest.skip(f"needs {launcher[0]}")
    own = {key: value.format(port=free_port()) for key, value in environment.items()}
    own |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [*launcher, "-n", "2", sys.executable, "-c", HELLO],
        env=fault_injection.environment() | own, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"2 processes, started by {name}:" in done.stdout


@pytest.fixture
def ssh(tmp_path):
    """A server for this user alone on this machine, and the command that runs another through it."""
    if SSHD is None or shutil.which("ssh-keygen") is None:
        pytest.skip("needs OpenSSH's server")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    port = free_port()
    server = f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\nPermitRootLogin yes\nStrictModes no\n"
    (tmp_path / "server").write_text(server + f"UsePAM no\nPidFile none\nPort {port}\nListenAddress 127.0.0.1\n")
    os.makedirs("/run/sshd", exist_ok=True)
    process = subprocess.Popen([SSHD, "-D", "-f", str(tmp_path / "server")], stderr=subprocess.DEVNULL)
    options = {"Port": port, "User": getpass.getuser(), "IdentityFile": tmp_path / "user", "BatchMode": "yes"}
    options |= {"StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR"}
    command = " ".join(["ssh", *(f"-o{key}={value}" for key, value in options.items()), "{host}"])
    try:
        for _ in range(100):
            if subprocess.run([*command.format(host="localhost").split(), "true"]).returncode == 0:
                break
            time.sleep(0.1)
        yield command
    finally:
        process.kill()


def test_ssh(dataset, ssh, tmp_path):  # noqa: F811
    """Two hosts reached by ssh, of which one is lost: the losses and the rows of an undisturbed run."""
    config = make_config(dataset, steps=15, eval_every=0, eval_batches=1, checkpoint=CheckpointConfig(every_steps=1000))
    save(dataclasses.replace(config, microbatches=2), tmp_path / "wanted.json")
    command = [sys.executable, *fault_injection.training(tmp_path / "wanted.json", tmp_path / "run")[1:]]
    with supervised(command, tmp_path, ("localhost", "127.0.0.1"), f"--config.launch={ssh}") as run:
        run.wait_for_steps(4)
        run.harm(LOSE, 1)
        run.finish()
    (fault,) = run.status()["faults"]
    assert (fault["what"], fault["processes_after"], fault["restored_from"]) == ("host lost", 1, "the hosts' copies")
    straight = tmp_path / "straight"
    fault_injection.run_alone(fault_injection.training(tmp_path / "wanted.json", straight)[1:])
    assert fault_injection.compare(15, run.workdir, straight)["largest_loss_difference"] < 1e-5
