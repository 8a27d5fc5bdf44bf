"""Pages that nobody has chosen, such as a crawl's: all stages of the corpus factory.

    python -m experiments.prepare_data --config=configs/data/web.py --workdir=runs/web --config.path=FOLDER

FOLDER holds .warc, .wet or .html files, compressed or not, or others that docs/data.md lists. docs/corpus.md says what
each stage does and what its settings are. Quality is likeness to the sources (folders and files in FOLDER) that
--config.quality.reference="('NAME',)" names; where there are none, it only tells texts from spoiled copies of them.
"""

import ml_collections

from llm_jax import config
from llm_jax.data.prepare import PrepareConfig


def get_config() -> ml_collections.ConfigDict:
    """All defaults, and the tokenizer that experiments.train_tokenizer writes by default."""
    return config.to_config_dict(PrepareConfig(tokenizer="runs/train_tokenizer/tokenizer.model"))
