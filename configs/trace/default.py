"""The first token of the demo's first batch.

python -m experiments.trace --config=configs/trace/default.py
"""

import ml_collections

from experiments.trace import TraceConfig
from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The demo's run."""
    return config.to_config_dict(TraceConfig(run="runs/demo/model"))
