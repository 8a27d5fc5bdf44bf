"""Rollouts beside plain `generate` of the same prompts, and rows that are taken over beside batches that all end.

    python -m benchmarks.rollout [--shape=S] [--rounds=5] [--batch=32]

The model has random float32 weights. Prints one JSON line for each way:

- generate: all responses at full length, from weights that lie as generation wants them;
- roll: the same as rollouts, with logprobs over the temperature and kept mass, written into rows of a batch;
- roll_with_layout: the same from weights as they are trained, laid out anew as in every iteration of PPO;
- waited: four times as many responses that end after very different lengths, `batch` rows at a time until all end;
- taken_over: the same, where the next prompts take over the rows that are done.

The ways take turns in one process; ratios are of tokens a second, medians of those within a round.
`busy_elsewhere` is the share of the machine that other programs took meanwhile; `processor_speed_over_...`, of tokens a
second of processor time, suffers less from them.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.peers.ours_generate import model_config
from benchmarks.peers.shapes import GENERATIONS
from benchmarks.peers.turns import machine_busy_seconds
from llm_jax import models
from llm_jax.alignment import rollout
from llm_jax.alignment.policy_config import RolloutConfig
from llm_jax.alignment.prompts import Prompt
from llm_jax.config import SamplingConfig
from llm_jax.host_memory import keep_freed_memory
from llm_jax.sampling.generate import generate

BASES = {"roll": "generate", "roll_with_layout": "generate", "taken_over": "waited"}
MORE = 4  # times as many prompts where lengths differ
ENDING_SHARE = 0.03  # of the vocabulary: a response ends after 1 / 0.03 tokens on average, or at its limit


def ways(options: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """What is measured: each draws once and says how many tokens that gave."""
    shape = GENERATIONS[options.shape]
    config = model_config(shape)
    params = models.init(config, jax.random.key(0))
    decoding, laid_out = models.for_decoding(params, config)
    random = np.random.default_rng(0)
    tokens = random.integers(3, shape.vocabulary, (MORE * options.batch, shape.prompt)).tolist()
    prompts = [Prompt((), tuple(row)) for row in tokens]
    sampling = SamplingConfig(max_new_tokens=shape.new_tokens)
    settings = RolloutConfig(max_prompt_tokens=shape.prompt, sampling=sampling)
    taken_over = dataclasses.replace(settings, rows=options.batch)
    stop_ids = random.choice(shape.vocabulary, round(ENDING_SHARE * shape.vocabulary), replace=False).tolist()

    def plain() -> int:
        found = generate(laid_out, decoding, tokens[: options.batch], sampling)
        return sum(len(generation.tokens) for generation in found)

    def roll(weights: Any, model: Any, asked: Sequence[Prompt], how: RolloutConfig, ends: Sequence[int]) -> int:
        return int(rollout.roll(weights, model, asked, how, stop_ids=ends).lengths_B.sum())

    def waited() -> int:
        # Streams differ from those of one call, so the responses do, too: they are as long on average.
        parts = [prompts[first : first + options.batch] for first in range(0, len(prompts), options.batch)]
        return sum(roll(laid_out, decoding, part, settings, stop_ids) for part in parts)

    return {
        "generate": plain,
        "roll": lambda: roll(laid_out, decoding, prompts[: options.batch], settings, ()),
        "roll_with_layout": lambda: roll(params, config, prompts[: options.batch], settings, ()),
        "waited": waited,
        "taken_over": lambda: roll(laid_out, decoding, prompts, taken_over, stop_ids),
    }


def take_turn(draw: Callable[[], int]) -> dict[str, float]:
    """Draw once."""
    start, busy, own = time.perf_counter(), machine_busy_seconds(), time.process_time()
    tokens = draw()
    seconds, processor = time.perf_counter() - start, time.process_time() - own
    capacity = seconds * (os.cpu_count() or 1)
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_processor_second": tokens / processor,
        "busy_elsewhere": max(0.0, (machine_busy_seconds() - busy - processor) / capacity),
    }


def report(name: str, turns: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> dict[str, Any]:
    """The JSON line of one way."""

    def median(key: str) -> float:
        return statistics.median(turn[key] for turn in turns[name])

    def ratio(key: str) -> float:
        pairs = zip(turns[name], turns[BASES[name]], strict=True)
        return round(statistics.median(mine[key] / theirs[key] for mine, theirs in pairs), 3)

    line = {
        "benchmark": "rollout",
        "implementation": name,
        "shape": options.shape,
        "batch": options.batch,
        "rounds": options.rounds,
        "tokens_per_second": round(median("tokens_per_second")),
        "tokens_per_processor_second": round(median("tokens_per_processor_second")),
        "busy_elsewhere": round(median("busy_elsewhere"), 3),
    }
    if name in BASES:
        line[f"speed_over_{BASES[name]}"] = ratio("tokens_per_second")
        line[f"processor_speed_over_{BASES[name]}"] = ratio("tokens_per_processor_second")
    return line


def main(arguments: list[str]) -> None:
    """Measure all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S", choices=list(GENERATIONS))
    parser.add_argument("--batch", type=int, default=32, help="rows drawn at once")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    drawn = ways(options)
    for draw in drawn.values():  # which compiles
        draw()
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in drawn}
    for _ in range(options.rounds):
        for name, draw in drawn.items():
            turns[name].append(take_turn(draw))
    for name in drawn:
        print(json.dumps(report(name, turns, options)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
