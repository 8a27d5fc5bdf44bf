"""Tokenizers on the default corpus: ours of 8,192 to 125,696 pieces, Mistral's, cl100k, Qwen's and o200k.

    python -m experiments.tokenizer_report --config=configs/tokenizer_report/default.py --workdir=runs/tokenizers

Ours are trained with Baichuan-2's settings on all documents that are not held out.
"""

import ml_collections

from experiments.tokenizer_report import TokenizerReportConfig
from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """What docs/tokenizers.md reports."""
    return config.to_config_dict(TokenizerReportConfig())
