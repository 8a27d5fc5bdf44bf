"""A tiny policy with a letter for every token, prompts and rewards for it, and runs of PPO on them."""

import jax
import numpy as np

from llm_jax import models
from llm_jax.alignment import ppo_models
from llm_jax.alignment.config import FineTuneConfig
from llm_jax.alignment.policy_config import (
    AdvantageConfig,
    CriticConfig,
    KlConfig,
    PolicyLossConfig,
    PpoConfig,
    PromptDataConfig,
    RolloutConfig,
)
from llm_jax.alignment.ppo import Data, Ppo
from llm_jax.alignment.prompts import Prompt, PromptStream
from llm_jax.config import CheckpointConfig, LoraConfig, MeshConfig, ModelConfig, OptimizerConfig, SamplingConfig
from llm_jax.interop.pretrained import Pretrained
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.tokenization.chat import Message
from llm_jax.training import checkpoint

VOCABULARY, QUESTIONS, PROMPT_TOKENS, NEW_TOKENS = 32, 16, 4, 8
MODEL = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, ffn_size=32,
    max_length=32, init_std=0.3,
)  # fmt: skip


class Letters:
    """Token 0 ends, 1 begins, n is the n-th character from "@" on."""

    vocab_size, bos_id, eos_id, pad_id, special_ids, fingerprint = VOCABULARY, 1, 0, 0, {}, "letters"

    def encode(self, text):
        return [ord(character) - ord("@") for character in text]

    def decode_bytes(self, ids):
        return "".join(chr(ord("@") + i) for i in ids).encode()

    def decode(self, ids):
        return self.decode_bytes(ids).decode()

    def save(self, folder):
        return folder


def constant(learning_rate):
    return OptimizerConfig(learning_rate=learning_rate, schedule="constant", warmup_steps=0, weight_decay=0.0)


def settings(*, steps=4, learning_rate=3e-3, samples=2, lora=0, microbatches=1, seed=0, **changes):
    training = FineTuneConfig(
        steps=steps,
        seed=seed,
        log_every=1,
        eval_every=2,
        microbatches=microbatches,
        optimizer=constant(learning_rate),
        lora=LoraConfig(rank=lora),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=1),
    )
    values = {
        "training": training,
        "prompts": PromptDataConfig(max_tokens=PROMPT_TOKENS),
        "rollout": RolloutConfig(
            prompts=QUESTIONS,
            max_prompt_tokens=PROMPT_TOKENS,
            sampling=SamplingConfig(max_new_tokens=NEW_TOKENS, num_samples=samples),
        ),
        "minibatch_size": 16,
        "epochs": 2,
        "critic": CriticConfig(optimizer=constant(1e-2)),
        "kl": KlConfig(coefficient=0.02),
        "loss": PolicyLossConfig(),
        "advantage": AdvantageConfig(),
        "eval_prompts": QUESTIONS,
        "logprob_tolerance": 1e-4,
    }
    return PpoConfig(**values | changes)


def mesh_of(devices=1):
    return mesh_lib.build(MeshConfig(), jax.devices()[:devices])


def policy(mesh, config=MODEL, key=0):
    layout = jax.tree.map(lambda leaf: leaf.sharding, checkpoint.placed(config, mesh))
    return Pretrained(config, jax.device_put(models.init(config, jax.random.key(key)), layout), Letters(), "")


def questions(count):
    drawn = (np.random.default_rng(i).integers(1, VOCABULARY, 1 + i % PROMPT_TOKENS) for i in range(count))
    return [
        Prompt((Message("user", f"{i}"),), tuple(map(int, tokens)), record=f"{i}") for i, tokens in enumerate(drawn)
    ]


def share_of_a(prompts, responses):
    """The share of the letter A: a reward with fractions that is easy to learn."""
    return np.array([each.text.count("A") / max(1, each.tokens) for each in responses], np.float32)


def data(config, reward=share_of_a, **changes):
    asked = questions(4 * QUESTIONS + QUESTIONS)
    stream = PromptStream(asked[: 4 * QUESTIONS], QUESTIONS, config.training.seed)
    return Data(stream, asked[4 * QUESTIONS :], reward, Letters(), **changes)


def start(config, reward=share_of_a, devices=1, key=0, **changes):
    """A run, not begun; the policy is drawn from the key."""
    mesh = mesh_of(devices)
    actors = ppo_models.build(config, policy(mesh, key=key), None, mesh)
    return Ppo(config, actors, data(config, reward, **changes), mesh)


def iterate(run, count, state=None):
    """The state and the records after some iterations."""
    state, records = run.first() if state is None else state, []
    for _ in range(count):
        state, record = run.iterate(state)
        records.append(record)
    return state, records
