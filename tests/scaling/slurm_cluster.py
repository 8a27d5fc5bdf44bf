"""A Slurm cluster of four nodes on this machine, without accounting, for as long as a `with` block lasts.

    python -m tests.scaling.slurm_cluster COMMAND ...

runs a command, such as bash, on it, as root. Needs Debian's packages slurm-wlm and munge.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "srun")
NODES = 4
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; "" if it can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)}: install slurm-wlm and munge to run this"
    return "" if os.geteuid() == 0 else "slurmctld and slurmd need root"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Start munged, slurmctld and the slurmds, with `SLURM_CONF` set; end them, and their jobs, afterwards."""
    (folder / "state").mkdir(parents=True)
    folder.chmod(0o755)  # munge refuses sockets in folders that others cannot enter
    config, key = folder / "slurm.conf", folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    config.write_text(_config(folder))
    munge = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("socket", "key-file", "log-file")]
    munge += [f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed"]
    environment = {**os.environ, "SLURM_CONF": str(config)}
    daemons: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        log = (folder / f"{command[0]}.{len(daemons)}.out").open("w")
        daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    previous = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(config)
    try:
        start("munged", "--foreground", "--force", *munge)
        _wait(lambda: (folder / "munge.socket").exists(), "munged")
        start("slurmctld", "-D", "-f", str(config))
        for node in range(1, NODES + 1):
            start("slurmd", "-D", "-f", str(config), "-N", f"n{node}")
        _wait(lambda: _output("sinfo", "--noheader", "--format=%D %t") == f"{NODES} idle", "slurmctld")
        yield
    finally:
        subprocess.run(["scancel", "--me"], capture_output=True)
        with contextlib.suppress(TimeoutError):
            _wait(lambda: not _output("squeue", "--noheader"), "squeue")
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)
        os.environ.pop("SLURM_CONF")
        if previous is not None:
            os.environ["SLURM_CONF"] = previous


def _config(folder: Path) -> str:
    host = socket.gethostname().partition(".")[0]
    port, *ports = _free_ports(1 + NODES)
    nodes = [
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2" for i, port in enumerate(ports, 1)
    ]
    return CONFIG.format(host=host, port=port, folder=folder, nodes="\n".join(nodes))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _wait(condition, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not get ready in {seconds} s")
        time.sleep(0.1)


if __name__ == "__main__":
    if missing():
        sys.exit(f"error: {missing()}")
    with tempfile.TemporaryDirectory() as temporary, cluster(Path(temporary)):
        status = subprocess.run(sys.argv[1:]).returncode
    sys.exit(status)
