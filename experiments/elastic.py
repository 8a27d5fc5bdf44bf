"""Keep a training alive while hosts come and go: the command after `--` runs on each host as one of several processes.

    python -m experiments.elastic --workdir=runs/small --config.processes=4 -- \\
        python -m experiments.pretrain --config=configs/pretrain/small.py --workdir=runs/small \\
        --config.data.dataset=runs/data/dataset

When a process or host dies or freezes, or the list of hosts changes, the training is started again on the hosts that
there are then, at the same global batch, from copies of the last step's state that hosts keep in memory, or from the
newest checkpoint. SIGTERM and Ctrl-C save and stop; SIGUSR1 saves, stops and has Slurm start the job again.

Writes to --workdir, which should be the training's own: elastic/status.json and status.html, what happened and what it
cost; elastic/logs, what the processes print.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import runner
from llm_jax.errors import UserError, require
from llm_jax.parallel import elastic
from llm_jax.parallel.elastic_config import ElasticConfig


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The supervisor's own arguments, and the command after `--`."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def run(config: ElasticConfig, workdir: Path) -> None:
    """Supervise the command after `--` until it is finished or asked to stop."""
    command = split(sys.argv)[1]
    require(bool(command), "no command to keep alive: write it after --, as in -- python -m experiments.pretrain ...")
    if command[0] == "python":
        command[0] = sys.executable
    outcome = elastic.Supervisor(config, command, workdir).run()
    if outcome == elastic.REQUEUE and "SLURM_JOB_ID" in os.environ:
        requeue(os.environ["SLURM_JOB_ID"])


def requeue(job: str) -> None:
    """Have Slurm run this job again. Raises `UserError` if it refuses."""
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise UserError(f"Slurm does not run job {job} again: {done.stderr.strip()}")


if __name__ == "__main__":
    runner.main(run, ElasticConfig, "configs/elastic/default.py", save_config=False, argv=split(sys.argv)[0])
