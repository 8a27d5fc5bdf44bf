"""Real pre-training, as the processes of a sweep start it."""

from pathlib import Path

from experiments import pretrain
from llm_jax.config import TrainConfig, load


def execute(config_paths: list[str]) -> None:
    """Train the runs one after the other."""
    for path in config_paths:
        pretrain.run(load(TrainConfig, Path(path)), Path(path).parent)
