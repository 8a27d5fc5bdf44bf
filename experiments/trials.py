"""Training the trials of a sweep: what its launcher runs, here or on another machine."""

from collections.abc import Sequence
from pathlib import Path

from experiments import pretrain, runner
from llm_jax import config as config_lib
from llm_jax.config import TrainConfig


def execute(config_paths: Sequence[str]) -> None:
    """Train the runs of these config.json files, each in its file's folder; several train together."""
    runner.prepare_jax()
    folders = [Path(path).parent for path in config_paths]
    configs = [config_lib.load(TrainConfig, Path(path)) for path in config_paths]
    if len(configs) == 1:
        pretrain.run(configs[0], folders[0])
    else:
        pretrain.run_together(configs, folders)
