"""Tables and figures of several reward models, seeds as means and standard errors.

python -m experiments.compare_rewards --config=configs/reward_model/compare.py --workdir=runs/margins
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """All runs in the folder."""
    return ml_collections.ConfigDict({"only": ""})
