"""What a good run of PPO looks like, and bad ones: the same run with one thing wrong at a time, and their curves.

    python -m experiments.ppo_faults --config=configs/ppo/faults.py --workdir=runs/ppo_faults \\
        --config.training.model=MODEL

A model that writes English is paid for the letter e. Every run has a folder of its own in --workdir, as experiments.ppo
writes it; curves.png and table.md are over all of them. Run the same command again to continue after a stop.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import ppo, runner
from llm_jax.alignment.policy_config import PpoConfig
from llm_jax.alignment.rewards import Prompt, Response
from llm_jax.evaluation.figures import DOTS_PER_INCH, SERIES, smooth
from llm_jax.training import metrics

SUBJECTS = ("The old man", "My sister", "A doctor", "The city", "Our teacher", "The company", "A small dog", "The king")
VERBS = ("went to", "said that", "wanted", "found", "was known for", "began with", "could not", "has been")
PANELS = {
    "score": "score",
    "kl": "KL of a response from the reference (nats)",
    "entropy": "entropy of a token (nats)",
    "distinct_2": "different bigrams (share)",
    "policy/approximate_kl": "KL of an update (nats a token)",
    "policy/clip_fraction": "tokens clipped (share)",
    "explained_variance": "returns that the critic explains (share)",
    "advantage_std": "standard deviation of advantages",
}
LAST = 5  # iterations that the table's means are over


def share_of_e(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
    """The share of the letter e among the characters of each response, float32 [B]."""
    return np.array([response.text.count("e") / max(1, len(response.text)) for response in responses], np.float32)


def variants(config: PpoConfig) -> dict[str, PpoConfig]:
    """The run as it is, and with one thing wrong."""

    def faster(by: float) -> PpoConfig:
        rate = by * config.training.optimizer.learning_rate
        optimizer = dataclasses.replace(config.training.optimizer, learning_rate=rate)
        return dataclasses.replace(config, training=dataclasses.replace(config.training, optimizer=optimizer))

    def price(coefficient: float) -> PpoConfig:
        return dataclasses.replace(config, kl=dataclasses.replace(config.kl, coefficient=coefficient))

    slow = dataclasses.replace(config.critic.optimizer, learning_rate=1e-9)
    return {
        "good": config,
        "no price on KL": price(0.0),
        "too high a price": price(30 * config.kl.coefficient),
        "too fast": faster(20.0),
        "critic that does not learn": dataclasses.replace(
            config, critic=dataclasses.replace(config.critic, optimizer=slow)
        ),
    }


def run(config: PpoConfig, workdir: Path) -> None:
    """Train all variants, then draw their curves."""
    workdir.mkdir(parents=True, exist_ok=True)
    prompts = workdir / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{subject} {verb}"}) for subject, verb in itertools.product(SUBJECTS, VERBS)]
    prompts.write_text("".join(f"{line}\n" for line in lines))
    config = dataclasses.replace(config, prompts=dataclasses.replace(config.prompts, path=str(prompts)))
    runs = {}
    for name, variant in variants(config).items():
        folder = workdir / name.replace(" ", "_")
        print(f"{name}:")
        ppo.run(variant, folder)
        runs[name] = metrics.read(folder, "train")
    draw(runs, workdir / "curves.png")
    (workdir / "table.md").write_text(table(runs))
    print(table(runs))


def draw(runs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """A panel for each number, a line for each run."""
    canvas = Figure(figsize=(14, 6.4), layout="constrained")
    for axes, (name, label) in zip(canvas.subplots(2, 4).flat, PANELS.items()):
        for (run_name, records), colour in zip(runs.items(), (*SERIES[1:], SERIES[0])):
            values = [record[name] for record in records]
            axes.plot([record["step"] for record in records], smooth(values), color=colour, label=run_name, lw=1.4)
        axes.set_title(label, fontsize=9, loc="left")
        axes.set_xlabel("iteration", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    canvas.savefig(path, dpi=DOTS_PER_INCH)


def table(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The means over the last iterations, as Markdown."""
    lines = [f"| run | {' | '.join(PANELS.values())} |", f"|---|{'---:|' * len(PANELS)}"]
    for name, records in runs.items():
        means = [np.mean([record[column] for record in records[-LAST:]]) for column in PANELS]
        lines.append(f"| {name} | {' | '.join(f'{mean:.3g}' for mean in means)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    runner.main(run, PpoConfig, "configs/ppo/faults.py", save_config=False)
