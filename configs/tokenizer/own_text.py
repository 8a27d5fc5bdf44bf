"""A small vocabulary of your own texts, to go with configs/pretrain/small.py.

    python -m experiments.train_tokenizer --config=configs/tokenizer/own_text.py --workdir=runs/own_text/tokenizer \\
        --config.corpus.path=FOLDER

FOLDER holds .txt, .jsonl, .jsonl.gz or .parquet files, or is one such file. Some seconds for some megabytes. Where the
texts are too few for 8,192 pieces, the error names the largest vocabulary that they support:
add --config.vocab_size=THAT.
"""

import ml_collections

from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """Baichuan-2's settings at 8,192 pieces, on at most 100 MB of the texts."""
    return config.to_config_dict(config.TokenizerConfig(vocab_size=8192, sample_bytes=100_000_000))
