"""RLHF with a known utility: PPO as in three reports, rejection sampling and DPO, three seeds, on one GPU.

    python -m experiments.known_utility --config=configs/known_utility/small.py --workdir=runs/known_utility \\
        --config.base=MODEL --config.corpus=DATASET

MODEL is a base of ten million parameters or more, DATASET what experiments.prepare_data made by its tokenizer.
`:tiny` takes the demo's model and dataset (runs/demo/model, runs/demo/data/dataset) and minutes on a laptop, with one
seed and fewer methods.

Of each report are its rewards' shaping, its price of KL, its clipping and optimiser (configs/ppo/papers.py); sizes,
learning rates and lengths are ours, a critic's warm-up is as much shorter as the run is, and Qwen's is paid the sum of
two reward models as Baichuan-2's. The pre-training gradient's coefficient is ours.
"""

import dataclasses

import ml_collections

from configs.ppo import papers
from llm_jax import config
from llm_jax.alignment.config import (
    ChatDataConfig,
    DpoConfig,
    DpoLossConfig,
    FineTuneConfig,
    PairDataConfig,
    PreferenceConfig,
    RewardConfig,
    RewardDataConfig,
    RewardLossConfig,
    SftConfig,
)
from llm_jax.alignment.known_utility_config import TEMPLATE, TITLES, DiversityConfig, KnownUtilityConfig, RatersConfig
from llm_jax.alignment.policy_config import KlConfig, PpoConfig, PromptDataConfig, RolloutConfig
from llm_jax.alignment.rejection_config import RejectionConfig
from llm_jax.config import CheckpointConfig, OptimizerConfig, SamplingConfig
from llm_jax.errors import require

SIZES = ("full", "tiny")
PROMPT_TOKENS, NEW_TOKENS = 32, 32  # nearly all requests, and nearly all sentences
HOLDOUT = 0.1  # of the requests; and of the others' pairs, which are held out by the same hash, as many again
PREFERENCES = PreferenceConfig(holdout_fraction=2 * HOLDOUT)
TINY_METHODS = ("llama2", "helpfulness", "small_beta", "dpo", "rejection", "rejection_ppo")


def _rollout(prompts: int, samples: int) -> RolloutConfig:
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, num_samples=samples)
    return RolloutConfig(prompts=prompts, max_prompt_tokens=PROMPT_TOKENS, sampling=sampling)


def _training(learning_rate: float, epochs: float) -> FineTuneConfig:
    optimizer = OptimizerConfig(learning_rate=learning_rate, final_fraction=0.1, warmup_steps=0, weight_decay=0.0)
    return FineTuneConfig(epochs=epochs, eval_every=0, keep_best=False, warmup_fraction=0.05, optimizer=optimizer)


def _ppo(paper: PpoConfig, size: str, *, iterations: int = 40, faster: float = 1.0) -> PpoConfig:
    """The report's PPO at our size, with its learning rate so many times ours."""
    full = size == "full"
    share = iterations / paper.training.steps
    learning_rate = faster * (2e-5 if full else 1e-4)
    return dataclasses.replace(
        paper,
        training=FineTuneConfig(
            steps=iterations,
            log_every=1,
            eval_every=iterations // 8,
            keep_best=False,
            optimizer=dataclasses.replace(paper.training.optimizer, learning_rate=learning_rate),
            checkpoint=CheckpointConfig(every_steps=iterations, keep_last=1),
        ),
        prompts=PromptDataConfig(template=TEMPLATE, max_tokens=PROMPT_TOKENS),
        rollout=_rollout(64 if full else 32, 2).sampled(top_p=paper.rollout.sampling.top_p),
        minibatch_size=32 if full else 16,
        kl=dataclasses.replace(paper.kl, iterations=iterations if paper.kl.kind == "scheduled" else 0),
        critic=dataclasses.replace(
            paper.critic,
            warmup_iterations=round(share * paper.critic.warmup_iterations),
            optimizer=dataclasses.replace(paper.critic.optimizer, learning_rate=2 * learning_rate),
        ),
        reference_weights="float32",
        reward_weights="float32",
        eval_prompts=64,
        samples=64,  # all of them: what is told of a run as it went on is computed from these
    )


def _reward(size: str, *, epochs: float = 1.0, safety_coefficient: float = 0.0) -> RewardConfig:
    return RewardConfig(
        training=_training(5e-4 if size == "full" else 1e-3, epochs),
        preferences=PREFERENCES,
        data=RewardDataConfig(sequence_length=256, batch_size=16 if size == "full" else 8),
        loss=RewardLossConfig(margin="small", safety_coefficient=safety_coefficient),
    )


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """The study, or with `:tiny` one of minutes."""
    require(size in SIZES, f"no size {size!r} of the study of known utilities: {' or '.join(SIZES)}")
    full = size == "full"
    return config.to_config_dict(
        KnownUtilityConfig(
            requests=5000 if full else 4000,
            holdout_fraction=HOLDOUT,
            sft=SftConfig(
                training=_training(1e-3 if full else 2e-3, epochs=3.0),
                data=ChatDataConfig(sequence_length=256, batch_size=16 if full else 8),
                eval_batches=8,
            ),
            raters=RatersConfig(rollout=_rollout(256 if full else 64, 2), batches=18 if full else 30),
            helpfulness_model=_reward(size),
            safety_model=_reward(size, epochs=2.0, safety_coefficient=1.0),
            llama2=_ppo(papers.PRESETS["llama2"], size),
            small_beta=_ppo(
                dataclasses.replace(papers.PRESETS["llama2"], kl=KlConfig(coefficient=0.001)),
                size,
                iterations=80 if full else 40,
                faster=3.0,
            ),
            baichuan2=_ppo(papers.PRESETS["baichuan2"], size),
            qwen=_ppo(papers.PRESETS["qwen"], size),
            rejection=RejectionConfig(
                training=_training(3e-4, epochs=2.0),
                prompts=PromptDataConfig(template=TEMPLATE, max_tokens=PROMPT_TOKENS),
                rollout=_rollout(128 if full else 32, 8),
                rounds=4,
                batches=4,
                data=ChatDataConfig(sequence_length=256, batch_size=8 if full else 4, holdout_fraction=0.0),
                eval_prompts=128 if full else 64,
            ),
            dpo=DpoConfig(
                training=_training(5e-5 if full else 1e-4, epochs=1.0),
                preferences=PREFERENCES,
                data=PairDataConfig(sequence_length=256, batch_size=8),
                loss=DpoLossConfig(beta=0.1),
                samples=0,
            ),
            methods=tuple(TITLES) if full else TINY_METHODS,
            seeds=(0, 1, 2) if full else (0,),
            judged_prompts=480 if full else 128,
            judging=_rollout(160 if full else 32, 4),
            start_samples=16 if full else 8,
            diversity=DiversityConfig(prompts=40 if full else 16),
        )
    )
