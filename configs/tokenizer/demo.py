"""The demo's vocabulary: Chinese, English and code in 8,192 pieces, from public texts.

    python -m experiments.train_tokenizer --config=configs/tokenizer/demo.py --workdir=runs/demo/tokenizer

About 10 seconds on 2 cores after the downloads, 2 of them training. Expect about 3.4 bytes per token of English and of
code, and 3.3 of Chinese, and every document back byte for byte.
"""

import ml_collections

from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """Baichuan-2's settings, but for the coverage: at 0.9999, Chinese characters alone would fill 8,192 pieces."""
    return config.to_config_dict(
        config.TokenizerConfig(vocab_size=8192, character_coverage=0.995, sample_bytes=10_000_000)
    )
