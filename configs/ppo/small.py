"""PPO of a small model on a laptop, or without a critic: gae, grpo or rloo.

    python -m experiments.ppo --config=configs/ppo/small.py --workdir=runs/ppo \\
        --config.training.model=runs/sft --config.prompts.path=prompts.jsonl --config.reward=runs/reward

Every value here is ours. Groups (configs/ppo/small.py:grpo or :rloo) take 16 prompts with 4 responses each instead of
32 with 2. GRPO has the reference in its loss, as k3, the others in the reward. Adapters instead of all parameters:
--config.training.lora.rank=8 --config.training.optimizer.learning_rate=3e-4.
"""

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import FineTuneConfig
from llm_jax.alignment.policy_config import (
    AdvantageConfig,
    CriticConfig,
    KlConfig,
    PolicyLossConfig,
    PpoConfig,
    PromptDataConfig,
    RewardShapingConfig,
    RolloutConfig,
)
from llm_jax.config import CheckpointConfig, OptimizerConfig, SamplingConfig


def _constant(learning_rate: float) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=learning_rate, schedule="constant", warmup_steps=0, weight_decay=0.0)


def get_config(kind: str = "gae") -> ml_collections.ConfigDict:
    """100 iterations of 64 responses of up to 32 tokens."""
    groups = kind != "gae"
    in_loss = kind == "grpo"
    return config.to_config_dict(
        PpoConfig(
            training=FineTuneConfig(
                steps=100,
                log_every=1,
                eval_every=20,
                optimizer=_constant(1e-4),
                checkpoint=CheckpointConfig(every_steps=20, keep_last=1),
            ),
            prompts=PromptDataConfig(max_tokens=64, holdout_fraction=0.1),
            rollout=RolloutConfig(
                prompts=16 if groups else 32,
                max_prompt_tokens=64,
                sampling=SamplingConfig(max_new_tokens=32, num_samples=4 if groups else 2),
            ),
            epochs=2,
            minibatch_size=32,
            loss=PolicyLossConfig(kl_coefficient=0.04 if in_loss else 0.0, per_sequence=in_loss),
            advantage=AdvantageConfig(kind=kind),
            kl=KlConfig(coefficient=0.0 if in_loss else 0.05),
            rewards=RewardShapingConfig(normalization="none" if groups else "running_both", missing_end_penalty=1.0),
            critic=CriticConfig(optimizer=_constant(3e-4)),
        )
    )
