"""Rejection sampling fine-tuning of a small model on a laptop.

    python -m experiments.rejection_sampling --config=configs/rejection_sampling/small.py --workdir=runs/rejection \\
        --config.training.model=runs/sft --config.prompts.path=prompts.jsonl --config.reward=runs/reward

Every value here is ours but for the temperatures that are tried, around those that LLaMA-2 found best for 10 to 100
samples (1.2 to 1.3). Four rounds of 256 prompts with 16 samples each.
"""

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import ChatDataConfig, FineTuneConfig
from llm_jax.alignment.policy_config import PromptDataConfig, RolloutConfig
from llm_jax.alignment.rejection_config import RejectionConfig


def get_config() -> ml_collections.ConfigDict:
    """Two epochs over the best responses in every round."""
    return config.to_config_dict(
        RejectionConfig(
            training=FineTuneConfig(
                epochs=2.0,
                eval_every=0,
                keep_best=False,
                optimizer=config.OptimizerConfig(learning_rate=1e-4, warmup_steps=5, weight_decay=0.0),
            ),
            prompts=PromptDataConfig(max_tokens=64, holdout_fraction=0.1),
            rollout=RolloutConfig(
                prompts=32, max_prompt_tokens=64, sampling=config.SamplingConfig(max_new_tokens=32, num_samples=16)
            ),
            temperatures=(1.0, 1.1, 1.2, 1.3),
            data=ChatDataConfig(sequence_length=256, batch_size=8, holdout_fraction=0.0),
        )
    )
