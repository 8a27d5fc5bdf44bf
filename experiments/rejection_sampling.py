"""Rejection sampling fine-tuning: of many responses to a prompt the best by reward is learned, round after round.

    python -m experiments.rejection_sampling --config=configs/rejection_sampling/small.py \\
        --workdir=runs/rejection --config.training.model=MODEL --config.prompts.path=PROMPTS.jsonl \\
        --config.reward=runs/reward

LLaMA-2's (section 3.2.3): each round draws rollout.sampling.num_samples responses to each prompt from the newest model,
and fine-tunes it on the best response that any round so far gave (--config.memory=last forgets the earlier rounds). The
reward is the folder of a reward model, or MODULE:FUNCTION, as for experiments.ppo. With --config.temperatures each
round chooses its own.

--workdir becomes a folder of the model, from which experiments.ppo can go on; round_N/chosen.jsonl are conversations
from which a smaller model learns by experiments.sft. With --config.curves.prompts it also writes what more samples and
other temperatures are worth, before the first round and after the last: report.md, report.json, best_of.png and
temperature.png. Run the same command again to continue after a stop.
"""

import json
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from experiments import ppo, runner
from llm_jax.alignment import finetune, prompts, rejection_run
from llm_jax.alignment.ppo import Data
from llm_jax.alignment.prompts import PromptStream
from llm_jax.alignment.rejection_config import RejectionConfig
from llm_jax.alignment.rewards import Reward
from llm_jax.evaluation import best_of, tables
from llm_jax.evaluation.best_of import Curve
from llm_jax.evaluation.tables import Table
from llm_jax.interop.pretrained import Pretrained

BEFORE, AFTER = "as it was", "after the last round"


def run(config: RejectionConfig, workdir: Path) -> None:
    """Do all rounds that are not done yet, then report."""
    mesh = finetune.build_mesh(config.training)
    scores = ppo.load_reward(config, "reward", mesh)
    model = finetune.load(config.training, mesh)
    data = load(config, model, scores)
    if rejection_run.train(config, model, data, workdir, mesh):
        report(config, data, workdir, mesh)


def load(config: RejectionConfig, model: Pretrained, scores: Reward) -> Data:
    """The prompts, and what scores the responses to them."""
    template = prompts.choose_template(config.prompts, model.tokenizer, model.chat_template)
    found = prompts.load(config.prompts, model.tokenizer, template)
    print(ppo.describe(found))
    stream = PromptStream(found.train, config.rollout.prompts, config.training.seed + config.prompts.seed)
    return Data(stream, found.heldout, scores, model.tokenizer, template, fingerprint=ppo.fingerprint(found))


def report(config: RejectionConfig, data: Data, workdir: Path, mesh: Mesh) -> None:
    """Print and write the rounds' table and, where they are asked for, the curves and their figures."""
    made = [rounds_table(workdir)]
    values: dict[str, Any] = {"rounds": rejection_run.read_rounds(workdir)}
    if config.curves.prompts:
        found = curves(config, data, workdir, mesh)
        middle = sorted(config.curves.temperatures)[len(config.curves.temperatures) // 2]
        at_middle = {name: by[middle] for name, by in found.items()}
        best_of.draw_best_and_median(at_middle, workdir / "best_of.png")
        best_of.draw_by_temperature(found, workdir / "temperature.png")
        rows = {f"{name}, T = {t:g}": curve for name, by in found.items() for t, curve in by.items()}
        made.append(best_of.table("Reward of held-out prompts by samples and temperature", rows))
        values["curves"] = {name: {t: curve._asdict() for t, curve in by.items()} for name, by in found.items()}
    (workdir / "report.md").write_text("\n".join(["# Rejection sampling", "", *map(tables.as_markdown, made)]))
    (workdir / "report.json").write_text(json.dumps(values, indent=2) + "\n")
    for table in made:
        Console().print(tables.as_rich(table))
    print(f"{workdir} holds the model; report.md has these tables")


def rounds_table(workdir: Path) -> Table:
    """What each round drew, learned and came to."""
    rows = []
    for record in rejection_run.read_rounds(workdir):
        drawn: tuple[str, ...] = ("",) * 6
        if record["samples"]:
            drawn = (
                f"{record['samples']:,}",
                f"{record['temperature']:g}",
                *(f"{record[name]:.3f}" for name in ("mean", "median", "best")),
                f"{record['chosen']:,}",
            )
        heldout = record["heldout"]
        score = f"{heldout['score']:.3f} ± {heldout['error']:.3f}" if heldout else ""
        rows.append((str(record["round"]), *drawn, score))
    headings = ("round", "samples", "temperature", "mean", "median", "best", "learned", "held-out reward")
    return Table("Rounds", headings, tuple(rows), frozenset(headings), ("Rewards over the prompts of the round.",))


def curves(config: RejectionConfig, data: Data, workdir: Path, mesh: Mesh) -> dict[str, dict[float, Curve]]:
    """By number of samples and temperature, of the model before and after."""
    found = {}
    for name, number in ((BEFORE, 0), (AFTER, config.rounds)):
        model = rejection_run.load(config, workdir, number, mesh)
        found[name] = rejection_run.curves(config, model, data, mesh, name)
    return found


if __name__ == "__main__":
    runner.main(run, RejectionConfig, "configs/rejection_sampling/small.py", save_config=False)
