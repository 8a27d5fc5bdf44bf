"""This library's fine-tuning: the batches, losses and step of experiments.sft and experiments.reward_model."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.peers import fine_tuning_data
from benchmarks.peers.fine_tuning_data import MODEL, PLAN
from benchmarks.peers.ours import OPTIMIZER
from benchmarks.peers.serve import serve
from llm_jax.alignment import finetune, reward
from llm_jax.alignment.config import FineTuneConfig, RewardLossConfig
from llm_jax.host_memory import keep_freed_memory
from llm_jax.interop.pretrained import Pretrained
from llm_jax.optim import schedules
from llm_jax.training import language_model, loop, state
from llm_jax.training import step as step_lib
from llm_jax.training.step import LossFunction


def parts(task: str, folder: Path, layout: str) -> tuple[Pretrained, LossFunction, Iterator[Any]]:
    """The model, its loss and the batches."""
    if task == "reward":
        model = fine_tuning_data.reward_model(folder)
        pairs = fine_tuning_data.reward_batches(folder).train_batches()
        return model, reward.loss_function(model.config, RewardLossConfig()), pairs
    model = finetune.load(FineTuneConfig(model=str(folder / MODEL)), fine_tuning_data.mesh())
    padded = json.loads((folder / PLAN).read_text())["conversations"] if layout == "padded" else 0
    batches = fine_tuning_data.sft_batches(folder, padded).train_batches()
    return model, language_model.loss_function(model.config, FineTuneConfig().loss), batches


def main(task: str, path: str, layout: str) -> None:
    """Serve the steps of a task, "sft" or "reward", in a folder of `fine_tuning_data.prepare`."""
    keep_freed_memory()
    model, loss_fn, batches = parts(task, Path(path), layout)
    mesh = fine_tuning_data.mesh()
    optimizer = state.optimizer(model.config, OPTIMIZER)
    current = state.state_of(model.params, optimizer, state.abstract_state(model.config, optimizer, mesh))
    update = step_lib.build(loss_fn, optimizer, schedules.learning_rate(OPTIMIZER, 1000), seed=0)
    learned = 0.0

    def step() -> float:
        nonlocal current, learned
        with jax.set_mesh(mesh):
            current, metrics = update(current, loop.place(next(batches), mesh))
        jax.block_until_ready(current)
        learned += float(metrics["weight"])
        return float(metrics["loss"])

    serve(step, lambda: learned, library=f"jax {jax.__version__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
