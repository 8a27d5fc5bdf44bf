"""The ablation on a dirty corpus: beside every document of the default one a copy, spoiled in one of seven ways.

    python -m experiments.corpus_ablation --config=configs/corpus_ablation/dirty.py --workdir=runs/corpus_ablation_dirty

The ways: characters drawn at random, words shuffled, a wrong encoding, noise, a phrase over and over; the same text
again, and the same with a passage of 2 % edited. The model and its budget are those of the default.
"""

import ml_collections

from configs.corpus_ablation import default


def get_config() -> ml_collections.ConfigDict:
    """The default with a spoiled copy of everything."""
    dirty = default.get_config()
    dirty.spoiled = 1.0
    return dirty
