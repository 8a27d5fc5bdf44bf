"""LLaMA-2's vocabulary: 32,000 pieces, a dummy prefix, single digits, byte fallback.

    python -m experiments.train_tokenizer --config=configs/tokenizer/llama2.py --workdir=runs/llama2_tokenizer \\
        --config.corpus.path=FOLDER

FOLDER holds your own texts (.txt, .jsonl, .jsonl.gz or .parquet); without it the public texts are used.
"""

import ml_collections

from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The size and the style of LLaMA-2; the 2 GB of sampled text are ours."""
    return config.to_config_dict(config.TokenizerConfig(vocab_size=32_000, style="llama2", sample_bytes=2_000_000_000))
