"""Steering reviews: PPO and DPO at several betas, rejection sampling and best of n on one frontier, three seeds.

    python -m experiments.steering --config=configs/steering/small.py --workdir=runs/steering \\
        --config.sft.training.model=MODEL

For a small bilingual base of some ten million parameters on an accelerator. `:tiny` needs no model: one of a million
parameters with a vocabulary of 2,048 learns to write from English reviews alone, for a laptop. Every method draws as
many samples: 24,576, or 12,288.
"""

from typing import Any

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import (
    ChatDataConfig,
    DpoConfig,
    FineTuneConfig,
    PairDataConfig,
    PreferenceConfig,
    RewardConfig,
    RewardDataConfig,
    SftConfig,
)
from llm_jax.alignment.policy_config import (
    CriticConfig,
    KlConfig,
    PpoConfig,
    PromptDataConfig,
    RewardShapingConfig,
    RolloutConfig,
)
from llm_jax.alignment.rejection_config import CurvesConfig, RejectionConfig
from llm_jax.alignment.steering_config import SteeringConfig
from llm_jax.config import CheckpointConfig, ModelConfig, OptimizerConfig, SamplingConfig
from llm_jax.errors import require

PROMPT_TOKENS = 24
NEW_TOKENS = 40
LENGTH = 256
NEVER = CheckpointConfig(every_steps=1_000_000, keep_last=1)  # but at the end
MODEL = ModelConfig(
    vocab_size=2048,
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    ffn_size=352,
    max_length=LENGTH,
)


def _optimizer(learning_rate: float) -> OptimizerConfig:
    """With a rate that falls."""
    return OptimizerConfig(learning_rate=learning_rate, warmup_steps=0, final_fraction=0.1, weight_decay=0.0, b2=0.99)


def _training(learning_rate: float, **changes: Any) -> FineTuneConfig:
    optimizer = _optimizer(learning_rate)
    return FineTuneConfig(eval_every=0, keep_best=False, optimizer=optimizer, checkpoint=NEVER, **changes)


def _rollout(prompts: int, samples: int) -> RolloutConfig:
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, num_samples=samples)
    return RolloutConfig(prompts=prompts, max_prompt_tokens=PROMPT_TOKENS, sampling=sampling)


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """The study, or with `:tiny` one of minutes."""
    require(size in ("full", "tiny"), f"no size {size!r} of steering reviews: full or tiny")
    full = size == "full"
    rate = 6e-5 if full else 3e-4
    iterations = 192
    return config.to_config_dict(
        SteeringConfig(
            languages=("en", "zh") if full else ("en",),
            domains=("movies", "products", "shop_reviews") if full else ("movies", "products"),
            model=MODEL,
            sft=SftConfig(
                training=_training(1e-3 if full else 3e-3, epochs=3.0, warmup_fraction=0.05),
                data=ChatDataConfig(sequence_length=LENGTH, batch_size=32 if full else 16),
            ),
            reward=RewardConfig(
                training=_training(1e-3, warmup_fraction=0.05),
                preferences=PreferenceConfig(
                    minimum_gap=0.5, strength_gaps=(1.0, 2.0, 3.0), pairs_per_text=4 if full else 1
                ),
                data=RewardDataConfig(sequence_length=LENGTH, batch_size=16),
            ),
            ppo=PpoConfig(
                training=_training(rate, steps=iterations, log_every=1),
                prompts=PromptDataConfig(max_tokens=PROMPT_TOKENS),
                rollout=_rollout(128 if full else 64, 1),
                epochs=2,
                minibatch_size=64 if full else 32,
                rewards=RewardShapingConfig(normalization="running_std"),
                kl=KlConfig(),
                critic=CriticConfig(optimizer=_optimizer(2 * rate)),
                eval_prompts=0,
                samples=0,
                logprob_tolerance=0.2,
            ),
            ppo_betas=(0.0, 0.03, 0.1, 0.3) if full else (0.0, 0.03, 0.1, 0.25),
            rejection=RejectionConfig(
                training=_training(2e-4 if full else 1e-3, epochs=2.0),
                prompts=PromptDataConfig(max_tokens=PROMPT_TOKENS),
                rollout=_rollout(64 if full else 32, 16),
                rounds=4,
                batches=6,
                data=ChatDataConfig(sequence_length=LENGTH, batch_size=8 if full else 2, holdout_fraction=0.0),
                eval_prompts=0,
                curves=CurvesConfig(prompts=64, samples=32),
            ),
            dpo=DpoConfig(
                training=_training(rate, epochs=2.0),
                data=PairDataConfig(sequence_length=LENGTH, batch_size=8),
                samples=0,
            ),
            dpo_betas=(0.1, 0.3, 1.0),
            dpo_batches=24,
            judging=_rollout(32, 4),
            judged=256 if full else 96,
        )
    )
