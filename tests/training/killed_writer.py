"""Kills a process with SIGKILL while it writes checkpoints, again and again, and sees what can be restored.

    python -m tests.training.killed_writer FOLDER ROUNDS SEED

prints a line of JSON for every round. Children are forked before JAX starts any thread, so that a round takes a second.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig
from llm_jax.optim import adamw
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import checkpoint, state

MODEL = ModelConfig(
    vocab_size=8192, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=16, ffn_size=64, max_length=16
)
LONGEST_SECONDS = 60


def abstract_state() -> Any:
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:1])
    return state.abstract_state(MODEL, adamw.build(OptimizerConfig(), adamw.decay_mask), mesh)


def values(abstract: Any, step: int) -> Any:
    """What a state of `step` holds: the same noise for all steps, shifted by it, which does not compress."""
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    filled = jax.tree.map(lambda x: (np.resize(noise, x.shape) + step).astype(x.dtype), abstract)
    return filled._replace(step=np.int32(step))


def write(folder: Path, report: Any) -> None:
    """Save steps without end, telling before and after each."""
    abstract = abstract_state()
    with checkpoint.Checkpointer(folder, CheckpointConfig(keep_last=2), MODEL, 1) as checkpointer:
        step = checkpointer.latest_step() or 0
        while True:
            step += 1
            current = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), values(abstract, step), abstract)
            report(("saving", step, 0.0))
            start = time.monotonic()
            checkpointer.save(current, step)
            checkpointer.wait()
            report(("saved", step, time.monotonic() - start))


def read(folder: Path, report: Any) -> None:
    """Restore the newest checkpoint and compare it with what that step held."""
    abstract = abstract_state()
    unfinished = [path.name for path in (folder / checkpoint.FOLDER).iterdir() if not path.name.isdigit()]
    with checkpoint.Checkpointer(folder, CheckpointConfig(), MODEL, 1) as checkpointer:
        found = checkpointer.newest(lambda step: checkpointer.restore(abstract, step))
    step = found[1] if found else 0
    if found:
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found[0]), values(abstract, step))
    report({"step": step, "unfinished": unfinished, "damaged": (folder / checkpoint.DAMAGED).exists()})


def child(work: Any, folder: Path) -> tuple[int, Any]:
    """Start work in a forked process: its id, and a stream of what it reports."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writable)
        return pid, os.fdopen(readable)
    status = 1
    try:
        signal.alarm(LONGEST_SECONDS)
        work(folder, lambda message: os.write(writable, (json.dumps(message) + "\n").encode()))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_once(folder: Path, generator: random.Random, seconds: float) -> dict[str, Any]:
    """`seconds` is how long a write takes."""
    pid, reports = child(write, folder)
    for _ in range(generator.choice((1, 3))):  # the first write of a process is slower than the others
        line = reports.readline()
        assert line, "the writer ended by itself"
    time.sleep(generator.uniform(0, 1.2 * seconds))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    saved = {step: took for kind, step, took in map(json.loads, [line, *reports]) if kind == "saved"}
    pid, reports = child(read, folder)
    lines = reports.readlines()
    assert os.waitpid(pid, 0)[1] == 0 and lines, "nothing could be restored"
    return {**json.loads(lines[0]), "saved": max(saved, default=0), "seconds": max(saved.values(), default=seconds)}


def main(folder: Path, rounds: int, seed: int) -> None:
    generator = random.Random(seed)
    before, seconds = 0, 1.0
    for _ in range(rounds):
        result = kill_once(folder, generator, seconds)
        assert result["step"] >= max(before, result["saved"]), f"step {result} after step {before}"
        before, seconds = result["step"], result.pop("seconds")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
