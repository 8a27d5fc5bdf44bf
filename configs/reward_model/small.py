"""A reward model of a small model on a laptop, on texts that people rated.

    python -m experiments.reward_model --config=configs/reward_model/small.py --workdir=runs/reward \\
        --config.training.model=runs/small

English movie reviews, products, editorials and tweets with the mean of 20 people's ratings: pairs whose ratings are 2
or more apart on [-4, 4].
"""

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import FineTuneConfig, PreferenceConfig, RewardConfig, RewardDataConfig


def get_config() -> ml_collections.ConfigDict:
    """Plain texts, one epoch."""
    return config.to_config_dict(
        RewardConfig(
            training=FineTuneConfig(
                eval_every=50,
                warmup_fraction=0.03,
                optimizer=config.OptimizerConfig(learning_rate=3e-4, warmup_steps=5, final_fraction=0.1),
            ),
            ratings=("en",),
            preferences=PreferenceConfig(pairs_per_text=2),
            template="none",
            data=RewardDataConfig(sequence_length=256, batch_size=8),
        )
    )
