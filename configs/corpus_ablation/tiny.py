"""The ablation in minutes, on statutes, manuals and articles: to see that it works, not for its figures.

python -m experiments.corpus_ablation --config=configs/corpus_ablation/tiny.py --workdir=runs/corpus_ablation_tiny
"""

import ml_collections

from configs.corpus_ablation import default


def get_config() -> ml_collections.ConfigDict:
    """The default with three sources, 20 steps and two seeds."""
    tiny = default.get_config()
    tiny.prepare.sources = ("statutes", "django_manuals", "wikipedia")
    tiny.train.steps, tiny.train.optimizer.warmup_steps = 20, 2
    tiny.seeds = (0, 1)
    return tiny
