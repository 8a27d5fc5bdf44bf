"""A run of rejection sampling fine-tuning: rounds of drawing, choosing and fine-tuning, each of which is done once.

A run's folder is that of a model, the last round's. Beside it, round_N has the N-th round's: chosen.jsonl, what was
learned; drawn.json, what was drawn; its own run of fine-tuning, which is a model's folder too; round.json, what came of
it. round_0/round.json is about the model as it began.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llm_jax.alignment import finetune, rejection, rollout
from llm_jax.alignment.policy_config import RolloutConfig
from llm_jax.alignment.ppo import HELDOUT, Data
from llm_jax.alignment.prompts import Prompt
from llm_jax.alignment.rejection import Chosen, Drawn
from llm_jax.alignment.rejection_config import RejectionConfig
from llm_jax.alignment.sft import PackedSamples
from llm_jax.config import ModelConfig
from llm_jax.errors import require
from llm_jax.evaluation import best_of
from llm_jax.evaluation.best_of import Curve
from llm_jax.files import write_json
from llm_jax.interop.pretrained import Pretrained
from llm_jax.training import checkpoint, language_model

CHOSEN, DRAWN, ROUND = "chosen.jsonl", "drawn.json", "round.json"
TRIED = 2  # is added to the seed of what temperatures are tried on
Record = dict[str, Any]


def train(
    config: RejectionConfig, model: Pretrained, data: Data, workdir: Path, mesh: Mesh, *, whole: Any = None
) -> bool:
    """Do the rounds that are not done; whether the last one is.

    Args:
        config: the run's.
        model: as it begins; its parameters are given away.
        data: prompts, as many at once as `config.rollout.prompts`, and rewards.
        workdir: the run's folder.
        mesh: where the model is.
        whole: the experiment's config, which the folder keeps and with which it may be continued; None = `config`.

    Raises:
        UserError: the folder holds another run, there are several processes, no response may be chosen, and what
            drawing, scoring and fine-tuning raise.
    """
    require(jax.process_count() == 1, "rejection sampling draws in one process: start it on one host, with its devices")
    whole = config if whole is None else whole
    rollout.check([*data.prompts.prompts, *data.heldout], model.config, config.rollout)
    finetune.check_folder(whole, data.fingerprint, workdir)
    finetune.write_start(whole, model, data.fingerprint, workdir)
    begin: Pretrained | None = model
    for number in range(config.rounds + 1):
        if (folder_of(workdir, number) / ROUND).is_file():
            begin = None
            continue
        if begin is None:
            begin = load(config, workdir, number - 1, mesh)
        if not _round(config, begin, data, workdir, number, mesh):
            return False
        begin = begin if number == 0 else None  # a fine-tuned one's parameters are given away
    last = load(config, workdir, config.rounds, mesh)
    checkpoint.replace_model(workdir, last.config, last.params, config.rounds)
    return True


def folder_of(workdir: Path, number: int) -> Path:
    """A round's."""
    return workdir / f"round_{number}"


def load(config: RejectionConfig, workdir: Path, number: int, mesh: Mesh) -> Pretrained:
    """The model after a round; 0 = as it began."""
    name = str(folder_of(workdir, number)) if number else config.training.model
    return finetune.load(dataclasses.replace(config.training, model=name), mesh)


def read_rounds(workdir: Path) -> list[Record]:
    """What came of the rounds, the beginning first."""
    files = sorted(workdir.glob(f"round_*/{ROUND}"), key=lambda file: int(file.parent.name.removeprefix("round_")))
    return [json.loads(file.read_text()) for file in files]


def _round(config: RejectionConfig, model: Pretrained, data: Data, workdir: Path, number: int, mesh: Mesh) -> bool:
    """One round from its drawing to its record; whether it came to its end."""
    folder = folder_of(workdir, number)
    folder.mkdir(parents=True, exist_ok=True)
    record: Record = {"round": number, "samples": 0}
    if number:
        if not (folder / DRAWN).is_file():
            _draw(config, model, data, workdir, number, mesh)
        record |= json.loads((folder / DRAWN).read_text())
        if not _fine_tune(config, model, data, rejection.read(folder / CHOSEN), folder, number, mesh):
            return False
        model = load(config, workdir, number, mesh)
    record["heldout"] = evaluate(config, model.params, model.config, data, mesh)
    write_json(folder / ROUND, record)
    print(describe(record))
    return True


def describe(record: Record) -> str:
    """What came of a round, in a line."""
    drawn = ""
    if record["samples"]:
        drawn = (
            f"{record['samples']:,} samples at temperature {record['temperature']:g}, reward {record['mean']:.3f}, "
            f"best {record['best']:.3f}; {record['chosen']:,} responses learned; "
        )
    heldout = record["heldout"]
    said = f"held-out reward {heldout['score']:.3f} ± {heldout['error']:.3f}" if heldout else "nothing is held out"
    return f"round {record['round']}: {drawn}{said}"


def _draw(config: RejectionConfig, model: Pretrained, data: Data, workdir: Path, number: int, mesh: Mesh) -> None:
    """Draw a round's responses, and write what is chosen of them and of the rounds before."""
    first, folder = (number - 1) * config.batches, folder_of(workdir, number)
    with _drawing(model, mesh, f"round {number}: drawing", config.batches) as (params, architecture, advance):
        settings = _settled(config, params, architecture, data, number)
        found: list[Drawn] = []
        for step in range(first, first + config.batches):
            batch, streams = data.prompts.batch(step), data.prompts.streams(step)
            found.append(rejection.draw(params, architecture, batch, settings, data, streams))
            advance()
    least, ended = config.minimum_reward, config.only_ended
    new = [each for drawn in found for each in rejection.choose(drawn, number, minimum=least, only_ended=ended)]
    earlier = rejection.read(folder_of(workdir, number - 1) / CHOSEN) if config.memory == "all" and number > 1 else []
    pool = rejection.remember(earlier, rejection.remember([], new))
    require(
        bool(pool),
        f"round {number}: none of {config.samples:,} responses may be chosen: lower minimum_reward, allow responses "
        "without an end (only_ended), or draw more",
    )
    rewards_PK = np.concatenate([drawn.rewards_PK for drawn in found])
    rejection.write(folder / CHOSEN, pool)
    summary = {
        "samples": int(rewards_PK.size),
        "temperature": settings.sampling.temperature,
        "mean": float(rewards_PK.mean()),
        "best": float(rewards_PK.max(axis=1).mean()),
        "median": float(np.median(rewards_PK, axis=1).mean()),
        "ended": float(np.mean([each.ended for drawn in found for row in drawn.responses for each in row])),
        "chosen": len(pool),
        "chosen_now": sum(chosen.round == number for chosen in pool),
    }
    write_json(folder / DRAWN, summary)  # last: its presence says that the rest is there


def _settled(config: RejectionConfig, params: Any, architecture: ModelConfig, data: Data, number: int) -> RolloutConfig:
    """How a round draws: at the temperature whose best samples are best on its first batch."""
    step, found = (number - 1) * config.batches, {}
    batch, streams = data.prompts.batch(step), data.prompts.streams(step)
    for temperature in config.temperatures:
        settings = config.rollout.sampled(temperature=temperature, seed=config.rollout.sampling.seed + TRIED)
        drawn = rejection.draw(params, architecture, batch, settings, data, streams)
        found[temperature] = float(drawn.rewards_PK.max(axis=1).mean())
    return config.rollout.sampled(temperature=max(found, key=found.__getitem__)) if found else config.rollout


def _fine_tune(
    config: RejectionConfig,
    model: Pretrained,
    data: Data,
    chosen: Sequence[Chosen],
    folder: Path,
    number: int,
    mesh: Mesh,
) -> bool:
    """Supervised fine-tuning on what is chosen; the model's parameters are given away."""
    samples = [rejection.sample(each) for each in chosen]
    rows = config.data
    batches = PackedSamples(
        {"chosen": samples}, {}, rows.sequence_length, rows.batch_size, rows.seed + number, padded=not rows.packed
    )
    task = finetune.Task(
        loss=lambda architecture: language_model.loss_function(architecture, config.training.loss),
        batches=lambda start: batches.train_batches(start_step=start, prefetch=rows.prefetch),
        evaluate=lambda architecture, params: {},
        steps_per_epoch=batches.steps_per_epoch,
        batch_size=rows.batch_size,
        sequence_length=rows.sequence_length,
        fingerprint=finetune.fingerprint(samples),
    )
    training = dataclasses.replace(config.training, seed=config.training.seed + number)
    return finetune.train(training, model, task, folder, mesh, training)


def evaluate(config: RejectionConfig, params: Any, architecture: ModelConfig, data: Data, mesh: Mesh) -> Record:
    """The mean reward of one response to each held-out prompt, and its standard error; {} where there are none."""
    prompts = data.heldout[: config.eval_prompts]
    if not prompts:
        return {}
    settings = config.rollout.sampled(num_samples=1, seed=config.rollout.sampling.seed + HELDOUT)
    settings = dataclasses.replace(settings, rows=0)
    with jax.set_mesh(mesh):
        rewards_P = rejection.draw(params, architecture, prompts, settings, data, range(len(prompts))).rewards_PK[:, 0]
    error = float(rewards_P.std(ddof=1) / len(rewards_P) ** 0.5) if len(rewards_P) > 1 else 0.0
    return {"score": float(rewards_P.mean()), "error": error, "prompts": len(rewards_P)}


def curves(config: RejectionConfig, model: Pretrained, data: Data, mesh: Mesh, name: str) -> dict[float, Curve]:
    """Rewards of held-out prompts by number of samples, at each temperature; the model stays."""
    wanted, size = config.curves, config.rollout.prompts
    prompts = data.heldout[: wanted.prompts]
    require(bool(prompts), "CurvesConfig.prompts: no prompts are held out (PromptDataConfig.holdout_fraction)")
    starts = range(0, len(prompts), size)
    found = {}
    with _drawing(model, mesh, f"{name}: samples and temperatures", len(starts) * len(wanted.temperatures)) as drawing:
        params, architecture, advance = drawing
        for temperature in wanted.temperatures:
            settings = config.rollout.sampled(temperature=temperature, num_samples=wanted.samples)
            settings = dataclasses.replace(settings, rows=0)
            rewards = []
            for start in starts:
                batch: Sequence[Prompt] = prompts[start : start + size]
                streams = range(start, start + len(batch))
                rewards.append(rejection.draw(params, architecture, batch, settings, data, streams).rewards_PK)
                advance()
            found[temperature] = best_of.curve(np.concatenate(rewards))
    return found


@contextmanager
def _drawing(
    model: Pretrained, mesh: Mesh, what: str, total: int
) -> Iterator[tuple[Any, ModelConfig, Callable[[], None]]]:
    """The parameters and the config to draw with, laid out once, and a progress bar's step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        with jax.set_mesh(mesh), rollout.generation_layout(model.params, model.config) as (architecture, params):
            yield params, architecture, lambda: progress.advance(task)
