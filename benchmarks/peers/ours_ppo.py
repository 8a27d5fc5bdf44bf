"""This library's PPO: `Ppo.iterate`, as the runs of experiments.ppo call it."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np

from benchmarks.peers import fine_tuning_data
from benchmarks.peers.ours_generate import model_config
from benchmarks.peers.ppo_setting import (
    CLIP,
    EPOCHS,
    GAMMA,
    INIT_STD,
    KL,
    LAM,
    LEARNING_RATE,
    MINIBATCH,
    PARTS,
    SHAPE,
    VALUE_CLIP,
    prompt_tokens,
)
from benchmarks.peers.serve import serve
from llm_jax import models
from llm_jax.alignment import policy_config, ppo_models
from llm_jax.alignment.config import FineTuneConfig
from llm_jax.alignment.policy_config import PolicyLossConfig, PpoConfig, PromptDataConfig, RolloutConfig
from llm_jax.alignment.ppo import Data, Ppo
from llm_jax.alignment.prompts import Prompt, PromptStream
from llm_jax.alignment.rewards import Response
from llm_jax.config import ModelConfig, OptimizerConfig, SamplingConfig
from llm_jax.host_memory import keep_freed_memory
from llm_jax.interop.pretrained import Pretrained
from llm_jax.tokenization.chat import Message
from llm_jax.training import checkpoint

FIRST = 0x4E00  # the character of token 0


class Characters:
    """Token n is the n-th character from FIRST on, and none of them ends a text."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = SHAPE.vocabulary, -1, -1, 0, "characters"
    special_ids: ClassVar[Mapping[str, int]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of a text's characters."""
        return [ord(character) - FIRST for character in text]

    def encode_batch(self, texts: Sequence[str], workers: int = 0) -> list[list[int]]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return "".join(chr(FIRST + i) for i in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The same in UTF-8."""
        return self.decode(ids).encode()

    def save(self, folder: Path) -> Path:
        """Nothing has to be kept."""
        return folder


def reward(prompts: Sequence[tuple[Message, ...]], responses: Sequence[Response]) -> np.ndarray:
    """The share of each response's tokens that are in the lower half of the vocabulary."""
    del prompts
    middle = chr(FIRST + SHAPE.vocabulary // 2)
    return np.array([np.mean([character < middle for character in each.text]) for each in responses], np.float32)


def architecture() -> ModelConfig:
    """The policy's, in float32."""
    return dataclasses.replace(model_config(SHAPE), init_std=INIT_STD)


def settings() -> PpoConfig:
    """The iteration of `ppo_setting`."""
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=0.0
    )
    return PpoConfig(
        training=FineTuneConfig(steps=1000, optimizer=optimizer),
        prompts=PromptDataConfig(max_tokens=SHAPE.prompt),
        rollout=RolloutConfig(
            prompts=SHAPE.batch,
            max_prompt_tokens=SHAPE.prompt,
            sampling=SamplingConfig(max_new_tokens=SHAPE.new_tokens),
        ),
        epochs=EPOCHS,
        minibatch_size=MINIBATCH,
        loss=PolicyLossConfig(clip=CLIP, value_clip=VALUE_CLIP),
        advantage=policy_config.AdvantageConfig(gamma=GAMMA, lam=LAM),
        kl=policy_config.KlConfig(coefficient=KL),
        critic=policy_config.CriticConfig(optimizer=optimizer),
    )


def build() -> Ppo:
    """The run, whose iterations are measured."""
    mesh, tokenizer, config = fine_tuning_data.mesh(), Characters(), settings()
    asked = [Prompt((Message("user", tokenizer.decode(ids)),), tuple(ids)) for ids in prompt_tokens()]
    layout = jax.tree.map(lambda leaf: leaf.sharding, checkpoint.placed(architecture(), mesh))
    params = jax.device_put(models.init(architecture(), jax.random.key(0)), layout)
    model = Pretrained(architecture(), params, tokenizer, "")
    actors = ppo_models.build(config, model, None, mesh)
    return Ppo(config, actors, Data(PromptStream(asked, SHAPE.batch), (), reward, tokenizer), mesh)


def main() -> None:
    """Serve iterations."""
    keep_freed_memory()
    run = build()
    state = run.first()
    spent = collections.Counter(dict.fromkeys(PARTS, 0.0))
    learned = 0.0

    def step() -> float:
        nonlocal state, learned
        before = int(state.policy.step)
        state, values = run.iterate(state)
        jax.block_until_ready(state)
        learned += (int(state.policy.step) - before) * MINIBATCH * values["tokens"]
        spent.update({part: values[f"seconds_{part}"] for part in PARTS})
        return values["entropy"]

    serve(step, lambda: learned, lambda: dict(spent), library=f"jax {jax.__version__}")


if __name__ == "__main__":
    main()
