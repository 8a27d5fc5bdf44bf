"""How a training is kept alive while hosts come and go."""

import dataclasses

from llm_jax.config import non_negative, positive
from llm_jax.errors import require


@dataclasses.dataclass(frozen=True)
class ElasticConfig:
    """One process on each host; the run's data axis is as long as there are hosts, at the same global batch."""

    hosts: str = ""  # a file with a host's name in each line, which may change; "" = see `processes`
    processes: int = 0  # so many on this machine; 0 = a process on each host of Slurm's allocation
    sizes: tuple[int, ...] = ()  # numbers of hosts that the batch and the model divide over; () = any
    launch: str = ""  # what starts a command on a host, as in "ssh {host}"; "" = Slurm's srun, or this machine
    memory: str = "/dev/shm"  # a folder of every host, in memory or on its own disk, for copies of the state
    copy_every: int = 1  # steps between two copies; 0 = none: a lost host costs the steps since the checkpoint
    start_seconds: float = 600.0  # until a process gives its first sign of life
    frozen_seconds: float = 60.0  # without a sign of life, after which a process is lost
    hung_seconds: float = 3600.0  # without a step of any process: restoring, compiling, evaluating included
    bring_seconds: float = 300.0  # for hosts that a round does not use to bring their copies
    stop_seconds: float = 600.0  # to write a checkpoint after being asked to stop
    return_seconds: float = 0.0  # after which a lost host is tried again; 0 = when the list of hosts changes
    wait_seconds: float = 86_400.0  # for enough hosts
    retries: int = 3  # faults without a new step in between, after which the last error is final

    def __post_init__(self) -> None:
        positive(self, "start_seconds", "frozen_seconds", "hung_seconds", "bring_seconds", "stop_seconds")
        positive(self, "wait_seconds", "retries")
        non_negative(self, "processes", "copy_every", "return_seconds")
        require(not (self.hosts and self.processes), "ElasticConfig.processes are for one machine: leave hosts empty")
        require(all(size > 0 for size in self.sizes), f"ElasticConfig.sizes={self.sizes} must be positive")
