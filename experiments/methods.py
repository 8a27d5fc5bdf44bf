"""What several methods make of one start: the same model, prompts and rewards for PPO, rejection sampling and DPO.

Each is a run in a folder of its own, of one seed: done once, continued by the same call, and False after a clean stop.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from experiments import dpo, ppo, rejection_sampling
from llm_jax.alignment import finetune, ppo_run, preferences, rejection, rejection_run, rollout
from llm_jax.alignment.config import DpoConfig, FineTuneConfig
from llm_jax.alignment.policy_config import PpoConfig, RolloutConfig
from llm_jax.alignment.ppo import Data
from llm_jax.alignment.preferences import Pair
from llm_jax.alignment.rejection import Drawn
from llm_jax.alignment.rejection_config import RejectionConfig
from llm_jax.interop.pretrained import Pretrained
from llm_jax.training import metrics

Config = TypeVar("Config", PpoConfig, RejectionConfig, DpoConfig)


class Start(NamedTuple):
    """What all methods begin with."""

    model: Path  # its folder
    template: str  # how it is talked to, as PromptDataConfig.template
    data: Callable[[Pretrained, int, int], Data]  # of the model, prompts at once and the seed


class Drawing(NamedTuple):
    """The responses that pairs are made of."""

    rollout: RolloutConfig
    batches: int  # of rollout.prompts prompts
    pairs: Callable[[Drawn], Sequence[Pair]]  # of a batch


def run_ppo(config: PpoConfig, start: Start, folder: Path, seed: int, mesh: Mesh) -> bool:
    """PPO, GRPO or RLOO; the critic begins as `config.critic.model`, if that is named."""
    config = _begun(config, start, seed)
    model, critic = finetune.load(config.training, mesh), ppo.load_critic(config, mesh)
    return ppo_run.train(config, model, start.data(model, config.rollout.prompts, seed), folder, mesh, critic=critic)


def run_rejection(config: RejectionConfig, start: Start, folder: Path, seed: int, mesh: Mesh) -> bool:
    """Rejection sampling fine-tuning, with its report."""
    config = _begun(config, start, seed)
    config = dataclasses.replace(
        config, rollout=config.rollout.sampled(seed=seed), data=dataclasses.replace(config.data, seed=seed)
    )
    model = finetune.load(config.training, mesh)
    data = start.data(model, config.rollout.prompts, seed)
    finished = rejection_run.train(config, model, data, folder, mesh)
    if finished:
        rejection_sampling.report(config, data, folder, mesh)
    return finished


def run_dpo(config: DpoConfig, start: Start, pairs: Path, folder: Path, seed: int, mesh: Mesh) -> bool:
    """DPO on the pairs of a file."""
    config = _begun(config, start, seed)
    config = dataclasses.replace(
        config,
        template=start.template,
        preferences=dataclasses.replace(config.preferences, path=str(pairs)),
        data=dataclasses.replace(config.data, seed=seed),
    )
    dpo.run(config, folder)
    return bool(metrics.read(folder, "heldout"))


def draw_pairs(training: FineTuneConfig, start: Start, drawing: Drawing, path: Path, seed: int, mesh: Mesh) -> Path:
    """Pairs of the start's own responses, in a file that runs of one seed may share: it is written once."""
    if not path.is_file():
        model = finetune.load(dataclasses.replace(training, model=str(start.model), seed=seed), mesh)
        settings = drawing.rollout.sampled(seed=seed)
        data = start.data(model, settings.prompts, seed)
        drawn = draw(model, data, drawing.batches, [settings], mesh)
        found = [pair for (batch,) in drawn for pair in drawing.pairs(batch)]
        path.parent.mkdir(parents=True, exist_ok=True)
        preferences.write(path, found)
    return path


def draw(
    model: Pretrained, data: Data, batches: int, ways: Sequence[RolloutConfig], mesh: Mesh
) -> list[tuple[Drawn, ...]]:
    """A model's responses to each of the first batches of prompts, drawn in each of some ways."""
    found = []
    with jax.set_mesh(mesh), rollout.generation_layout(model.params, model.config) as (architecture, params):
        for step in track(range(batches), "drawing pairs", console=Console(stderr=True)):
            batch, streams = data.prompts.batch(step), data.prompts.streams(step)
            found.append(tuple(rejection.draw(params, architecture, batch, way, data, streams) for way in ways))
    return found


def _begun(config: Config, start: Start, seed: int) -> Config:
    """The run of a seed that begins with the start."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, model=str(start.model), seed=seed))
