"""One process on each host of the Slurm job, or as many on this machine as are asked for.

    python -m experiments.elastic --workdir=runs/small --config.processes=2 -- \\
        python -m experiments.pretrain --config=configs/pretrain/small.py --workdir=runs/small \\
        --config.data.dataset=runs/data/dataset

A start takes the seconds that Python, JAX and the first compilation take, and each fault as many again.
"""

import ml_collections

from llm_jax import config
from llm_jax.parallel.elastic_config import ElasticConfig


def get_config() -> ml_collections.ConfigDict:
    """Copies of the state after every step; a host is lost after a minute of silence."""
    return config.to_config_dict(ElasticConfig())
