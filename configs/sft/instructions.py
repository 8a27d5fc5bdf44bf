"""Exercises with checkable answers and small talk, Chinese and English; under a minute, 7 MB of downloads.

python -m experiments.prepare_instructions --config=configs/sft/instructions.py --workdir=runs/instructions
"""

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import InstructionsConfig


def get_config() -> ml_collections.ConfigDict:
    """Two thousand exercises of each source."""
    return config.to_config_dict(InstructionsConfig())
