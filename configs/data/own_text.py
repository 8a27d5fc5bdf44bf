"""Your own texts, with the vocabulary of configs/tokenizer/own_text.py and for configs/pretrain/small.py.

    python -m experiments.prepare_data --config=configs/data/own_text.py --workdir=runs/own_text --config.path=FOLDER

FOLDER holds .txt, .jsonl, .jsonl.gz or .parquet files, or is one such file. About 5 MB of text a second on 2 cores.
Every folder inside, and every file directly in it, becomes a source of that name. The texts of .jsonl and .parquet are
in the field `text`, or in another with --config.text_field=NAME.
"""

import ml_collections

from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The own texts' tokenizer, and 1 % of the documents held out."""
    return config.to_config_dict(config.CorpusConfig(tokenizer="runs/own_text/tokenizer/tokenizer.model"))
