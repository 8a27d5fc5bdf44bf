"""A run of PPO as it should be, and the same with one thing wrong at a time: five runs, some minutes on two cores.

python -m experiments.ppo_faults --config=configs/ppo/faults.py --workdir=runs/ppo_faults --config.training.model=MODEL
"""

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import FineTuneConfig
from llm_jax.alignment.policy_config import (
    CriticConfig,
    KlConfig,
    PpoConfig,
    PromptDataConfig,
    RewardShapingConfig,
    RolloutConfig,
)
from llm_jax.config import CheckpointConfig, OptimizerConfig, SamplingConfig


def _constant(learning_rate: float) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=learning_rate, schedule="constant", warmup_steps=0, weight_decay=0.0)


def get_config() -> ml_collections.ConfigDict:
    """40 iterations of 64 texts that go on for 24 tokens."""
    return config.to_config_dict(
        PpoConfig(
            training=FineTuneConfig(
                steps=40,
                log_every=1,
                eval_every=20,
                keep_best=False,
                optimizer=_constant(3e-4),
                checkpoint=CheckpointConfig(every_steps=20, keep_last=1),
            ),
            prompts=PromptDataConfig(template="none", max_tokens=16, holdout_fraction=0.2),
            rollout=RolloutConfig(
                prompts=32, max_prompt_tokens=16, sampling=SamplingConfig(max_new_tokens=24, num_samples=2)
            ),
            reward="experiments.ppo_faults:share_of_e",
            epochs=2,
            minibatch_size=32,
            kl=KlConfig(coefficient=0.1),
            rewards=RewardShapingConfig(normalization="running_both"),
            critic=CriticConfig(optimizer=_constant(1e-3)),
            eval_prompts=32,
        )
    )
