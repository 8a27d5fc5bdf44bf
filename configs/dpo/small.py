"""Direct preference optimisation of a small model on a laptop, on texts that people rated.

    python -m experiments.dpo --config=configs/dpo/small.py --workdir=runs/dpo --config.training.model=runs/demo/model

English movie reviews, products, editorials and tweets with the mean of 20 people's ratings: pairs whose ratings are 2
or more apart on [-4, 4]. Without prompts, the model learns to write what people rate higher.
"""

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import DpoConfig, FineTuneConfig, PairDataConfig, PreferenceConfig


def get_config() -> ml_collections.ConfigDict:
    """Plain texts, one epoch."""
    return config.to_config_dict(
        DpoConfig(
            training=FineTuneConfig(
                eval_every=50,
                warmup_fraction=0.1,
                optimizer=config.OptimizerConfig(learning_rate=1e-4, warmup_steps=5, final_fraction=0.1),
            ),
            ratings=("en",),
            preferences=PreferenceConfig(pairs_per_text=2),
            template="none",
            data=PairDataConfig(sequence_length=256, batch_size=8),
            sampling=config.SamplingConfig(max_new_tokens=48),
        )
    )
