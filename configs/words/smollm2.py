"""What PPO and GRPO make of SmolLM2-135M-Instruct, as it is, in 7,680 samples of an exact task: three seeds, adapters.

    python -m experiments.words --config=configs/words/smollm2.py --workdir=runs/words_smollm2

For a GPU. "What is the third word here? pieces along registry static": any word of the list is right one time in four,
the right one has to be written alone, and four answered tasks are in front of each so that the model knows that.
"""

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import FineTuneConfig
from llm_jax.alignment.policy_config import (
    AdvantageConfig,
    CriticConfig,
    KlConfig,
    PpoConfig,
    PromptDataConfig,
    RolloutConfig,
)
from llm_jax.alignment.words_config import WordsConfig
from llm_jax.config import CheckpointConfig, LoraConfig, OptimizerConfig, SamplingConfig

ITERATIONS = 30
PROMPT_TOKENS, NEW_TOKENS = 144, 6


def _optimizer(learning_rate: float) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=learning_rate, schedule="constant", warmup_steps=8, weight_decay=0.0, b2=0.99)


def _policy(kind: str) -> PpoConfig:
    return PpoConfig(
        training=FineTuneConfig(
            steps=ITERATIONS,
            microbatches=2,
            log_every=1,
            eval_every=10,
            keep_best=False,
            compute_dtype="float32",  # adapters are merged to sample: bfloat16 would round off much of what they add
            attention="reference",  # of rows this short; compiling a kernel takes longer than it saves
            optimizer=_optimizer(2e-4),
            lora=LoraConfig(rank=16),
            checkpoint=CheckpointConfig(every_steps=ITERATIONS, keep_last=1),
        ),
        prompts=PromptDataConfig(max_tokens=PROMPT_TOKENS),
        rollout=RolloutConfig(
            prompts=64,
            max_prompt_tokens=PROMPT_TOKENS,
            sampling=SamplingConfig(max_new_tokens=NEW_TOKENS, num_samples=4),
        ),
        minibatch_size=64,
        advantage=AdvantageConfig(kind=kind),
        kl=KlConfig(coefficient=0.01),
        critic=CriticConfig(optimizer=_optimizer(4e-4)),
        logprob_tolerance=0.2,  # accelerators multiply float32 with fewer digits; ratios are the trainer's own
        eval_prompts=128,
    )


def get_config() -> ml_collections.ConfigDict:
    """30 iterations of 64 tasks with 4 answers each."""
    return config.to_config_dict(
        WordsConfig(
            kinds=("place",),
            examples=4,
            template="auto",
            base="smollm2",
            ppo=_policy("gae"),
            grpo=_policy("grpo"),
            methods=("ppo", "grpo"),
            max_new_tokens=NEW_TOKENS,
        )
    )
