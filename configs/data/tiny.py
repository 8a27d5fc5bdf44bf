"""The smallest profile, for trying things out: Chinese statutes, a Chinese novel and Python's standard library.

    python -m experiments.prepare_data --config=configs/data/tiny.py --workdir=runs/data_tiny \\
        --config.tokenizer=runs/train_tokenizer/tokenizer.model

EXPECTED
"""

import ml_collections

from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The tiny profile, with the tokenizer that experiments.train_tokenizer writes by default."""
    return config.to_config_dict(config.CorpusConfig(profile="tiny", tokenizer="runs/train_tokenizer/tokenizer.model"))
