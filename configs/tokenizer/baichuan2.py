"""Baichuan-2's vocabulary: 125,696 pieces, no normalisation, single digits, runs of spaces, byte fallback.

    python -m experiments.train_tokenizer --config=configs/tokenizer/baichuan2.py --workdir=runs/baichuan2_tokenizer \\
        --config.corpus.path=FOLDER

FOLDER holds your own texts (.txt, .jsonl, .jsonl.gz or .parquet). The default profile of public texts is too small
for a vocabulary of this size to mean much, but it can be trained on, which shows the settings at work.
"""

import ml_collections

from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The settings of the Baichuan-2 report, section 2.2; the 2 GB of sampled text are ours."""
    return config.to_config_dict(
        config.TokenizerConfig(vocab_size=125_696, style="baichuan2", sample_bytes=2_000_000_000)
    )
