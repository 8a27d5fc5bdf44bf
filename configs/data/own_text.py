"""Your own texts, with the vocabulary of configs/tokenizer/own_text.py and for configs/pretrain/small.py.

    python -m experiments.prepare_data --config=configs/data/own_text.py --workdir=runs/own_text --config.path=FOLDER

FOLDER holds .txt, .jsonl, .parquet, .html or .warc files, or others that docs/data.md lists, or is one such file. Every
folder inside, and every file directly in it, becomes a source of that name. The texts of .jsonl and .parquet are in the
field `text`, or in another with --config.text_field=NAME.

Texts that somebody has chosen are not judged again: pages lose what surrounds their text, equal texts are kept once,
and that is all. --config.heuristics.enabled=True turns on another stage; configs/data/web.py has all of them.
"""

import ml_collections

from llm_jax import config
from llm_jax.data.prepare import ORDER, PrepareConfig

KEPT = ("extract", "language", "exact", "mixture")


def get_config() -> ml_collections.ConfigDict:
    """The own texts' tokenizer, and 1 % of the documents held out."""
    chosen = config.to_config_dict(PrepareConfig(tokenizer="runs/own_text/tokenizer/tokenizer.model"))
    for stage in ORDER:
        if stage not in KEPT and "enabled" in chosen.get(stage, {}):
            chosen[stage].enabled = False
    return chosen
