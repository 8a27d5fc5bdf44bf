"""Samples of eight tools from 24 seeds, by SmolLM2.

    python -m experiments.self_instruct --config=configs/self_instruct/small.py --workdir=runs/self_instruct

tools.jsonl and seeds.jsonl beside this file show the form of your own: --config.tools=... --config.seeds=...
"""

from pathlib import Path

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import SelfInstructConfig


def get_config() -> ml_collections.ConfigDict:
    """Two hundred samples."""
    here = Path(__file__).parent
    return config.to_config_dict(
        SelfInstructConfig(model="smollm2", tools=str(here / "tools.jsonl"), seeds=str(here / "seeds.jsonl"))
    )
