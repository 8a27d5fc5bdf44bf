"""What a model says in the course of its training: samples.jsonl in the folder of its run."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from llm_jax.config import ModelConfig, SamplingConfig
from llm_jax.sampling.generate import generate
from llm_jax.training import metrics

FILE = "samples.jsonl"


class Asked(NamedTuple):
    """What is asked at every evaluation."""

    record: str  # where it was read
    text: str
    tokens: list[int]  # all that the model reads before it replies


class Says(NamedTuple):
    """How replies end, and how their ids are read."""

    stop_ids: Sequence[int]
    text_of: Callable[[Sequence[int]], str]


def append_samples(
    workdir: Path,
    step: int,
    asked: Sequence[Asked],
    says: Says,
    sampling: SamplingConfig,
    params: Any,
    model: ModelConfig,
    mesh: Mesh,
) -> None:
    """Append what the model replies after a step; a job of several processes writes none.

    Args:
        workdir: the run's folder.
        step: what was written of it and of later ones, before the run was continued, is dropped.
        asked: nothing is written for nothing, or where there is no room for a reply.
        says: what a reply is.
        sampling: how replies are drawn, as many of each as its `num_samples`.
        params: the model's parameters.
        model: the model.
        mesh: where the parameters are.
    """
    room = model.max_length - max((len(each.tokens) for each in asked), default=0)
    if not asked or room < 1 or jax.process_count() > 1:
        return
    drawn = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    with jax.set_mesh(mesh):
        found = generate(params, model, [each.tokens for each in asked], drawn, stop_ids=says.stop_ids)
    repeated = (each for each in asked for _ in range(drawn.num_samples))
    metrics.keep_until(workdir / FILE, step - 1)
    with (workdir / FILE).open("a", encoding="utf-8") as file:
        for each, generation in zip(repeated, found, strict=True):
            record = {
                "step": step,
                "record": each.record,
                "asked": each.text,
                "reply": says.text_of(generation.tokens),
                "finished": generation.finished,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
