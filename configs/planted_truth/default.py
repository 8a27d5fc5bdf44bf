"""Planted truth in the default corpus: 50 of every kind, and all pairs of 5,000 documents.

    python -m experiments.planted_truth --config=configs/planted_truth/default.py --workdir=runs/planted_truth

Downloads what configs/data/default.py does, the evaluation sets and labelled texts: 230 MB, once.
"""

import ml_collections

from experiments.planted_truth import PlantedTruthConfig
from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """All defaults."""
    return config.to_config_dict(PlantedTruthConfig())
