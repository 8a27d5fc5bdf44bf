"""PPO as three reports state it: llama2, llama2_large, baichuan2 and qwen.

    python -m experiments.ppo --config=configs/ppo/papers.py:llama2 --workdir=... --config.training.model=MODEL \\
        --config.prompts.path=PROMPTS.jsonl --config.reward=HELPFULNESS --config.safety_reward=SAFETY

LLaMA-2 (section 3.2.3): AdamW with 0.9, 0.95, 1e-5, weight decay 0.1, clip 1, constant 1e-6; 512 responses an
iteration, minibatches of 64, one step on each; ratio clip 0.2; KL 0.01 (7B, 13B) or 0.005 (34B, 70B: llama2_large);
200 to 400 iterations, of which held-out rewards tell when to stop (`best`); the safety reward decides for unsafe
prompts and below 0.15; rewards whitened. Its logit is what reward models give here already (a sigmoid would come
before it): for a reward function in (0, 1) set rewards.logit.

Baichuan-2 (its section on PPO): the critic alone for 20 iterations, clip 0.5, constant 5e-6, ratio clip 0.1, KL 0.2
falling to 0.005, 350 iterations.

Qwen (its section on PPO): the critic alone for 50 iterations, two responses to a prompt, KL 0.04, rewards minus their
running mean, 1e-6 for the policy and 5e-6 for the critic, value clip 0.15, sampling with top-p 0.9. Its pre-training
gradient needs a dataset and a coefficient, which the report does not give: set --config.pretraining.dataset and
--config.pretraining.coefficient.

Everything else is ours, and LLaMA-2's where the others are silent: lengths, GAE's gamma 1 and lambda 0.95, whitened
advantages, LLaMA-2's and Baichuan-2's value clips (their ratio clips) and critics' rates (their policies'), Qwen's
ratio clip and iterations, and that Baichuan-2's KL falls in a straight line over all of its iterations.
"""

import dataclasses

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import FineTuneConfig
from llm_jax.alignment.policy_config import (
    CriticConfig,
    KlConfig,
    PolicyLossConfig,
    PpoConfig,
    PromptDataConfig,
    RewardShapingConfig,
    RolloutConfig,
)
from llm_jax.config import CheckpointConfig, OptimizerConfig, SamplingConfig

_OPTIMIZER = OptimizerConfig(
    learning_rate=1e-6, schedule="constant", warmup_steps=0, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1, clip_norm=1.0
)
_TRAINING = FineTuneConfig(
    steps=400,
    log_every=1,
    eval_every=20,
    compute_dtype="bfloat16",
    remat="save_attention",
    microbatches=8,
    optimizer=_OPTIMIZER,
    checkpoint=CheckpointConfig(every_steps=20, keep_last=1),
)
_LLAMA2 = PpoConfig(
    training=_TRAINING,
    prompts=PromptDataConfig(max_tokens=1024, holdout_fraction=0.01),
    rollout=RolloutConfig(prompts=512, max_prompt_tokens=1024, sampling=SamplingConfig(max_new_tokens=1024)),
    epochs=1,
    minibatch_size=64,
    loss=PolicyLossConfig(clip=0.2, value_clip=0.2),
    kl=KlConfig(coefficient=0.01),
    rewards=RewardShapingConfig(normalization="whiten"),
    critic=CriticConfig(optimizer=_OPTIMIZER),
    safety_threshold=0.15,
    reference_weights="bfloat16",
    reward_weights="bfloat16",
    logprob_tolerance=0.5,
)
_BAICHUAN2_OPTIMIZER = dataclasses.replace(_OPTIMIZER, learning_rate=5e-6, clip_norm=0.5)

PRESETS = {
    "llama2": _LLAMA2,
    "llama2_large": dataclasses.replace(_LLAMA2, kl=KlConfig(coefficient=0.005)),
    "baichuan2": dataclasses.replace(
        _LLAMA2,
        training=dataclasses.replace(_TRAINING, steps=350, optimizer=_BAICHUAN2_OPTIMIZER),
        loss=PolicyLossConfig(clip=0.1, value_clip=0.1),
        kl=KlConfig(kind="scheduled", coefficient=0.2, end=0.005, iterations=350),
        rewards=RewardShapingConfig(),
        critic=CriticConfig(warmup_iterations=20, optimizer=_BAICHUAN2_OPTIMIZER),
    ),
    "qwen": dataclasses.replace(
        _LLAMA2,
        rollout=RolloutConfig(
            prompts=256,
            max_prompt_tokens=1024,
            sampling=SamplingConfig(max_new_tokens=1024, num_samples=2, top_p=0.9),
        ),
        loss=PolicyLossConfig(clip=0.2, value_clip=0.15),
        kl=KlConfig(coefficient=0.04),
        rewards=RewardShapingConfig(normalization="running_mean"),
        critic=CriticConfig(warmup_iterations=50, optimizer=dataclasses.replace(_OPTIMIZER, learning_rate=5e-6)),
    ),
}


def get_config(name: str = "llama2") -> ml_collections.ConfigDict:
    """The PPO of one of the reports."""
    return config.to_config_dict(PRESETS[name])
