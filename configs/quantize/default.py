"""What int8 and int4 weights cost SmolLM2-135M, on 12,288 tokens of 24 English documents.

    python -m experiments.quantize --config=configs/quantize/default.py --workdir=runs/quantize

Any other model: --config.model=PATH. Time and results: docs/quantization.md.
"""

import ml_collections

from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """Speeches, an encyclopedia and manuals: texts that a model for English should know how to read."""
    corpus = config.CorpusConfig(
        profile="clean", sources=("state_of_the_union", "wikipedia", "django_manuals"), holdout_fraction=0.05
    )
    return ml_collections.ConfigDict({"corpus": config.to_config_dict(corpus)})
