"""Public texts without those whose rights are unclear: statutes, speeches, old books, manuals and code.

    python -m experiments.prepare_data --config=configs/data/clean.py --workdir=runs/data_clean \\
        --config.tokenizer=runs/train_tokenizer/tokenizer.model

EXPECTED
"""

import ml_collections

from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The clean profile, with the tokenizer that experiments.train_tokenizer writes by default."""
    return config.to_config_dict(config.CorpusConfig(profile="clean", tokenizer="runs/train_tokenizer/tokenizer.model"))
