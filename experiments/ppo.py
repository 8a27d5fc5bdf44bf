"""PPO: a model learns from a reward for its own responses. GRPO and RLOO over the same rollouts, without a critic.

    python -m experiments.ppo --config=configs/ppo/small.py --workdir=runs/ppo \\
        --config.training.model=MODEL --config.prompts.path=PROMPTS.jsonl --config.reward=runs/reward

The reward is the folder of a reward model, or MODULE:FUNCTION: a Python function of prompts (tuples of messages) and
responses (with text, ended and tokens) that returns a float32 array, one number for each. The critic begins as the
model itself, or as --config.critic.model. All parameters are trained, or adapters (--config.training.lora.rank=8): then
reference and critic share the frozen model beside them. configs/ppo/papers.py has the settings of three reports.

--workdir becomes a folder of the model, with metrics.jsonl and samples.jsonl (held-out prompts, the responses and their
scores at every evaluation) beside it; `best` holds the model of the highest held-out score. Run the same command again
to continue after a stop.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import runner
from llm_jax import models
from llm_jax.alignment import finetune, ppo_experience, ppo_models, ppo_run, prompts, reward, rewards
from llm_jax.alignment.policy_config import PpoConfig, PretrainingConfig
from llm_jax.alignment.ppo import Data
from llm_jax.alignment.prompts import Prompt, PromptData, PromptStream
from llm_jax.alignment.rejection_config import RejectionConfig
from llm_jax.alignment.reward import RewardModel
from llm_jax.alignment.rewards import Reward
from llm_jax.config import DataConfig
from llm_jax.data import loader
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError, require
from llm_jax.interop.pretrained import Pretrained
from llm_jax.parallel import distributed
from llm_jax.tokenization import chat


def run(config: PpoConfig, workdir: Path) -> None:
    """Train, continuing from the newest checkpoint in `workdir`."""
    mesh = finetune.build_mesh(config.training)
    scores = load_reward(config, "reward", mesh)
    model = finetune.load(config.training, mesh)
    data = load(config, model, scores, mesh)
    ppo_run.train(config, model, data, workdir, mesh, critic=load_critic(config, mesh))


def load_critic(config: PpoConfig, mesh: Mesh) -> Pretrained | None:
    """What the critic begins as, if not as the policy."""
    if not config.critic.model:
        return None
    return finetune.load(dataclasses.replace(config.training, model=config.critic.model), mesh, writes=False)


def load(config: PpoConfig, model: Pretrained, scores: Reward, mesh: Mesh) -> Data:
    """The prompts, with what scores the responses to them, and pre-training data, if any."""
    template = None
    if config.prompts.template != "none":
        template = chat.choose(config.prompts.template, model.tokenizer, model.chat_template)
    found = prompts.load(config.prompts, model.tokenizer, template)
    if distributed.is_first():
        print(describe(found))
    kept = [scores]
    if config.safety_reward:
        tagged = {prompt.messages for prompt in [*found.train, *found.heldout] if prompt.unsafe}
        safety = load_reward(config, "safety_reward", mesh)
        kept.append(safety)
        scores = rewards.piecewise(safety, scores, threshold=config.safety_threshold, is_tagged=tagged.__contains__)
    stream = PromptStream(
        found.train,
        config.rollout.prompts,
        config.training.seed + config.prompts.seed,
        jax.process_index(),
        jax.process_count(),
    )
    return Data(
        stream,
        found.heldout,
        scores,
        model.tokenizer,
        template,
        pretraining(config.pretraining, model),
        fingerprint(found),
        tuple(models.weight_bytes(each.params) for each in kept if isinstance(each, RewardModel)),
    )


def describe(found: PromptData) -> str:
    """What is about to be asked, and what was left out."""
    tokens = [len(prompt.tokens) for prompt in found.train]
    first = (
        f"{len(tokens):,} prompts of {np.mean(tokens):.0f} tokens, at most {max(tokens)}, "
        f"{sum(prompt.unsafe for prompt in found.train):,} of them tagged unsafe; {len(found.heldout):,} held out"
    )
    return "\n".join([first, *([str(found.tally)] if str(found.tally) else [])])


def fingerprint(found: PromptData) -> str:
    """Of the prompts' tokens and tags."""

    def arrays(side: list[Prompt]) -> list[np.ndarray]:
        return [np.array([prompt.unsafe, *prompt.tokens], np.int32) for prompt in side]

    return finetune.fingerprint([arrays(found.train), [np.zeros(0)], arrays(found.heldout)])


def load_reward(config: PpoConfig | RejectionConfig, field: str, mesh: Mesh) -> Reward:
    """What scores responses: a reward model's folder, or MODULE:FUNCTION. Raises `UserError` where it is neither."""
    name = getattr(config, field)
    require(name != "", f"set --config.{field} to the folder of a reward model, or to MODULE:FUNCTION")
    module, colon, function = name.partition(":")
    require(
        bool(colon) or Path(name).is_dir(),
        f"--config.{field}={name}: there is no such folder of a reward model; a function is named MODULE:FUNCTION",
    )
    if Path(name).is_dir():
        model = reward.load(Path(name), mesh)
        architecture, params = ppo_models.stored(model.config, model.params, config.reward_weights, config.offload)
        return dataclasses.replace(model, config=architecture, params=params)
    try:
        found: Reward = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module is the user's, and may raise anything
        raise UserError(f"--config.{field}={name}: {type(error).__name__}: {error}") from None
    require(callable(found), f"--config.{field}={name}: that is {found!r}, no function")
    return ppo_experience.checked(found)


def pretraining(wanted: PretrainingConfig, model: Pretrained) -> Callable[[int], Iterator[Batch]] | None:
    """The pre-training data beside the responses, from any batch on; None where there is none."""
    if not wanted.dataset:
        return None
    dataset = DataConfig(
        dataset=wanted.dataset,
        sequence_length=wanted.sequence_length,
        batch_size=wanted.batch_size,
        seed=wanted.seed,
    )
    require(
        loader.describe(dataset).tokenizer_sha256 == model.tokenizer.fingerprint,
        f"{wanted.dataset} was made with another tokenizer than the policy's: prepare the data with the policy's",
    )

    def batches(start: int) -> Iterator[Batch]:
        return loader.train_batches(
            dataset, start_step=start, process_index=jax.process_index(), process_count=jax.process_count()
        )

    return batches


if __name__ == "__main__":
    runner.main(run, PpoConfig, "configs/ppo/small.py", save_config=False)
