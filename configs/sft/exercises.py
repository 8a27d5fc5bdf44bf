"""Held-out exercises, answered greedily.

python -m experiments.exercises --config=configs/sft/exercises.py --workdir=runs/exercises --config.model=runs/sft/best
"""

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import ExercisesConfig


def get_config() -> ml_collections.ConfigDict:
    """Some 800 exercises, of configs/sft/instructions.py."""
    return config.to_config_dict(ExercisesConfig(path="runs/instructions/exercises.jsonl"))
