"""Word tasks: what PPO, GRPO, rejection sampling and DPO each make of 51,200 samples, three seeds.

    python -m experiments.words --config=configs/words/small.py --workdir=runs/words

A model of a million parameters that reads bytes, fine-tuned until it solves 40 % of the held-out tasks. `:tiny` is a
tenth of it, with one kind of task, short words and few samples, to see on a laptop that all of it learns.
"""

import dataclasses

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import ChatDataConfig, DpoConfig, DpoLossConfig, FineTuneConfig, PairDataConfig, SftConfig
from llm_jax.alignment.policy_config import (
    AdvantageConfig,
    CriticConfig,
    KlConfig,
    PolicyLossConfig,
    PpoConfig,
    PromptDataConfig,
    RolloutConfig,
)
from llm_jax.alignment.rejection_config import RejectionConfig
from llm_jax.alignment.words_config import TEMPLATE, WordsConfig
from llm_jax.config import CheckpointConfig, ModelConfig, OptimizerConfig, SamplingConfig
from llm_jax.errors import require

PROMPT_TOKENS = {"full": 28, "tiny": 16}  # the longest task and its two marks
NEW_TOKENS = 10
MODEL = ModelConfig(
    vocab_size=264,
    hidden_size=128,
    num_layers=5,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    ffn_size=352,
    max_length=256,
)
TINY = dataclasses.replace(MODEL, hidden_size=64, num_layers=2, ffn_size=176, head_dim=16)


def _optimizer(learning_rate: float, warmup: int = 0) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=learning_rate, schedule="constant", warmup_steps=warmup, weight_decay=0.0, b2=0.99
    )


def _rollout(prompts: int, samples: int, prompt_tokens: int) -> RolloutConfig:
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, num_samples=samples)
    return RolloutConfig(prompts=prompts, max_prompt_tokens=prompt_tokens, sampling=sampling)


def _policy(kind: str, iterations: int, rollout: RolloutConfig, learning_rate: float) -> PpoConfig:
    return PpoConfig(
        training=FineTuneConfig(
            steps=iterations,
            log_every=1,
            eval_every=max(1, iterations // 10),
            keep_best=False,
            optimizer=_optimizer(learning_rate),
            checkpoint=CheckpointConfig(every_steps=iterations, keep_last=1),
        ),
        prompts=PromptDataConfig(max_tokens=rollout.max_prompt_tokens),
        rollout=rollout,
        epochs=2,
        minibatch_size=64,
        loss=PolicyLossConfig(),
        advantage=AdvantageConfig(kind=kind),
        kl=KlConfig(coefficient=0.01),
        critic=CriticConfig(optimizer=_optimizer(4e-4)),
        logprob_tolerance=0.05,  # accelerators multiply float32 with fewer digits
        eval_prompts=512,
        samples=4,
    )


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """The study, or with `:tiny` one of minutes."""
    require(size in PROMPT_TOKENS, f"no size {size!r} of the word tasks: full or tiny")
    full, longest = size == "full", PROMPT_TOKENS[size]
    iterations, rounds = (200, 10) if full else (60, 6)
    batches = iterations // rounds
    return config.to_config_dict(
        WordsConfig(
            words=4000 if full else 2000,
            holdout_fraction=0.1 if full else 0.25,
            kinds=("backwards", "count", "sort", "continue") if full else ("sort",),
            model=MODEL if full else TINY,
            target=0.4 if full else 0.45,
            sft=SftConfig(
                training=FineTuneConfig(
                    steps=600 if full else 300,
                    eval_every=0,
                    keep_best=False,
                    optimizer=_optimizer(2e-3 if full else 4e-3, warmup=50),
                    checkpoint=CheckpointConfig(every_steps=25),
                ),
                data=ChatDataConfig(template=TEMPLATE, sequence_length=256, batch_size=16 if full else 8),
                samples=0,
            ),
            ppo=_policy("gae", iterations, _rollout(64, 4, longest), 5e-5 if full else 2e-4),
            grpo=_policy("grpo", iterations, _rollout(32, 8, longest), 5e-5 if full else 2e-4),
            rejection=RejectionConfig(
                training=FineTuneConfig(
                    epochs=2.0, eval_every=0, keep_best=False, optimizer=_optimizer(3e-4, warmup=5)
                ),
                prompts=PromptDataConfig(max_tokens=longest),
                rollout=_rollout(32, 8, longest),
                rounds=rounds,
                batches=batches,
                minimum_reward=0.5,
                data=ChatDataConfig(sequence_length=256, batch_size=8 if full else 4, holdout_fraction=0.0),
                eval_prompts=512,
            ),
            dpo=DpoConfig(
                training=FineTuneConfig(
                    epochs=2.0,
                    eval_every=0,
                    keep_best=False,
                    optimizer=_optimizer(1e-4, warmup=10),
                ),
                data=PairDataConfig(sequence_length=256, batch_size=8),
                loss=DpoLossConfig(beta=0.5),
                samples=0,
            ),
            max_new_tokens=NEW_TOKENS,
        )
    )
