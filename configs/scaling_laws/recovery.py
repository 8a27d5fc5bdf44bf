"""How well the fits recover known laws from synthetic trials: 500 draws of each scenario.

python -m experiments.scaling_recovery --config=configs/scaling_laws/recovery.py --workdir=runs/scaling_recovery
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The defaults of the study."""
    return ml_collections.ConfigDict({"draws": 500})
