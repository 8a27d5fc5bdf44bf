"""Runs that only write what a real one would: in their config, `weight_decay` says how they behave.

A slow one waits for a file called go in its folder.
"""

import json
import math
import os
import signal
import time
from pathlib import Path

from llm_jax.config import TrainConfig, load
from llm_jax.errors import UserError

FINE, ALWAYS_FAILS, FAILS_ONCE, STOPS_HALFWAY, DIVERGES, DIES, SLOW = 0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06
STOPS_AT_ITS_END, ENDS_EARLY, DIVERGES_LOUDLY = 0.07, 0.08, 0.09


def execute(config_paths: list[str]) -> None:
    """Train the runs of a group; one that fails takes the rest of its group with it."""
    for path in config_paths:
        train(load(TrainConfig, Path(path)), Path(path).parent, len(config_paths))


def train(config: TrainConfig, run: Path, group: int) -> None:
    with (run / "tries.txt").open("a") as tries:
        tries.write(f"{os.getpid()} {group}\n")
    (run / "cores.json").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
    behaviour = config.optimizer.weight_decay
    if behaviour == ALWAYS_FAILS or (behaviour == FAILS_ONCE and len(tries_of(run)) == 1):
        raise ValueError(f"no luck with {run.name}\nand a second line")
    if behaviour == DIES:
        os._exit(3)
    while behaviour == SLOW and not (run / "go").exists():
        (run / "slow").touch()
        time.sleep(0.1)
    steps = config.steps // 2 if behaviour in (STOPS_HALFWAY, ENDS_EARLY) else config.steps
    write(config, run, steps, math.nan if behaviour == DIVERGES else loss(config))
    if behaviour in (STOPS_HALFWAY, STOPS_AT_ITS_END):
        signal.raise_signal(signal.SIGINT)
    if behaviour == DIVERGES_LOUDLY:
        (run / "metrics.jsonl").write_text('{"kind": "failed", "step": 2, "loss": NaN}\n')
        raise UserError("non-finite loss nan at step 2")


def loss(config: TrainConfig) -> float:
    return 3.0 + 1 / config.model.hidden_size + config.seed / 100


def write(config: TrainConfig, run: Path, steps: int, final_loss: float) -> None:
    """The metrics of the first `steps` steps."""
    per_step = config.data.batch_size * config.data.sequence_length
    records = []
    for step in range(1, steps + 1):
        if step % config.log_every == 0:
            record = {"kind": "train", "step": step, "tokens": step * per_step, "loss": final_loss}
            records.append(record | {"tokens_per_second": 1000.0})
        if step % config.eval_every == 0 or step == config.steps:
            value = final_loss + (config.steps - step) / config.steps
            records.append({"kind": "heldout", "step": step, "tokens": step * per_step, "loss": value})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def tries_of(run: Path) -> list[tuple[int, int]]:
    """The process and the size of the group of each try."""
    path = run / "tries.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(pid), int(group)) for pid, group in (line.split() for line in lines)]
