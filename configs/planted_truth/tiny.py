"""Planted truth in a sample: statutes, a Chinese novel, speeches, articles and manuals in English.

    python -m experiments.planted_truth --config=configs/planted_truth/tiny.py --workdir=runs/planted_truth_tiny

Shows how it works; its numbers rest on few plants of every kind.
"""

import ml_collections

from experiments.planted_truth import PlantedTruthConfig
from llm_jax import config
from llm_jax.data.planting import PlantConfig


def get_config() -> ml_collections.ConfigDict:
    """A few of every kind, and all pairs of 1,000 documents."""
    sources = ("statutes", "three_kingdoms", "parliament_en", "django_manuals", "wikipedia")
    return config.to_config_dict(PlantedTruthConfig(sources=sources, plant=PlantConfig(count=5), sample=1000))
