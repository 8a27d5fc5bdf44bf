"""The comparison in a minute, on the tiny corpus: to see that it works.

python -m experiments.tokenizer_report --config=configs/tokenizer_report/tiny.py --workdir=runs/tokenizers_tiny
"""

import ml_collections

from configs.tokenizer_report import default


def get_config() -> ml_collections.ConfigDict:
    """Two sizes, one released tokenizer and two changed settings, on 2 MB of statutes, a novel and Python."""
    tiny = default.get_config()
    tiny.training.corpus.profile, tiny.training.sample_bytes = "tiny", 2_000_000
    tiny.vocab_sizes, tiny.published = (4096, 8192), ("mistral",)
    tiny.settings, tiny.settings_size, tiny.settings_bytes = ("baichuan2", "numbers", "no_bytes"), 4096, 2_000_000
    return tiny
