"""Fine-tuning of a small model on a laptop: full, two epochs, packed.

    python -m experiments.sft --config=configs/sft/small.py --workdir=runs/sft \\
        --config.training.model=runs/small --config.data.path=conversations.jsonl --config.data.template=llama2

Adapters instead: --config.training.lora.rank=8 --config.training.optimizer.learning_rate=2e-4.
"""

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import ChatDataConfig, FineTuneConfig, SftConfig


def get_config() -> ml_collections.ConfigDict:
    """Batches of 8 sequences of 256 tokens."""
    return config.to_config_dict(
        SftConfig(
            training=FineTuneConfig(
                epochs=2.0,
                eval_every=50,
                warmup_fraction=0.03,
                optimizer=config.OptimizerConfig(learning_rate=3e-4, warmup_steps=0, weight_decay=0.1),
            ),
            data=ChatDataConfig(sequence_length=256, batch_size=8, holdout_fraction=0.05),
        )
    )
