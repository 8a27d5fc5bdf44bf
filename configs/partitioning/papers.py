"""Models of three sizes on 64 to 4,096 A800, with a network card for each device and with one for each host.

    python -m experiments.partitioning --config=configs/partitioning/papers.py --workdir=runs/partitioning

4 x 2^20 tokens a step. Seconds, no accelerator. With a card for each device and 1,024 devices, ZeRO-1 leads wherever it
fits; hierarchical partitioning leads for the largest model, and where hosts share one card.
"""

import ml_collections

from llm_jax import config
from llm_jax.parallel.partitioning import PartitioningConfig


def get_config() -> ml_collections.ConfigDict:
    """The comparison."""
    return config.to_config_dict(PartitioningConfig())
