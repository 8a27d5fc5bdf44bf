"""What two real processes of a job do together, for test_distributed; prints a line of JSON for each thing.

python -m tests.parallel.joined FOLDER
"""

import json
import sys
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from experiments import runner
from llm_jax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig
from llm_jax.errors import UserError
from llm_jax.optim import adamw
from llm_jax.parallel import distributed
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import checkpoint, state

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4, ffn_size=48, max_length=16
)


def tell(**values: object) -> None:
    print(json.dumps({"process": jax.process_index(), **values}), file=sys.stderr, flush=True)


def forbidden(name: str) -> None:
    raise AssertionError(f"a checkpoint's barrier takes the devices: {name}")


def wait_for_nobody() -> str:
    """Process 1 comes too late to a place where process 0 waits for a second."""
    if jax.process_index() == 1:
        time.sleep(3)
        return ""
    try:
        distributed.wait_for_all("nobody", timeout_seconds=1)
    except UserError as error:
        return str(error)
    return "everybody came"


def restore_damaged(folder: Path) -> tuple[int, list[str]]:
    """Both processes save two steps; the second is damaged in what process 1 has written. The step that is restored."""
    optimizer = adamw.build(OptimizerConfig(), adamw.decay_mask)
    mesh = mesh_lib.build(MeshConfig())
    fresh = state.init_state(MODEL, optimizer, mesh, jax.random.key(0))
    with checkpoint.Checkpointer(folder, CheckpointConfig(every_steps=1), MODEL, 1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(fresh, step)
            checkpointer.wait()
    distributed.wait_for_all("saved")
    if jax.process_index() == 1:
        for path in (folder / "checkpoints/2/params/ocdbt.process_1/d").iterdir():
            path.write_bytes(b"")
    distributed.wait_for_all("damage")
    with checkpoint.Checkpointer(folder, CheckpointConfig(every_steps=1), MODEL, 1) as checkpointer:
        abstract = state.abstract_state(MODEL, optimizer, mesh)
        found = checkpointer.newest(lambda step: checkpointer.restore(abstract, step))
        assert found is not None
        distributed.wait_for_all("restored")
        return found[1], sorted(path.name for path in (folder / "damaged").iterdir())


def run(config: ModelConfig, folder: Path) -> None:
    distributed.initialize(60)
    multihost_utils.sync_global_devices = forbidden
    tell(said=distributed.exchange("said", f"I am {jax.process_index()}"))
    tell(waited=wait_for_nobody())
    step, damaged = restore_damaged(folder)
    tell(step=step, damaged=damaged)
    distributed.wait_for_all("end")
    if jax.process_index() == 1:
        raise UserError("something is wrong here")
    time.sleep(100)  # as in a collective that never comes


if __name__ == "__main__":
    runner.TOGETHER += ("joined",)
    runner.main(run, ModelConfig, "configs/pretrain/small.py", save_config=False)
