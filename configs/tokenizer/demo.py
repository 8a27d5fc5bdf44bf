"""The demo's vocabulary: Chinese, English and code in 8,192 pieces, from public texts.

    python -m experiments.train_tokenizer --config=configs/tokenizer/demo.py --workdir=runs/demo/tokenizer

About 5 seconds of training on 2 cores, after the downloads.
"""

import ml_collections

from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """Baichuan-2's settings at a size that a model of some million parameters can afford."""
    return config.to_config_dict(
        config.TokenizerConfig(vocab_size=8192, sample_bytes=20_000_000, corpus=config.CorpusConfig(profile="default"))
    )
