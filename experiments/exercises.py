"""How many held-out exercises a model solves: exact answers, by kind, before or after fine-tuning.

    python -m experiments.exercises --workdir=runs/exercises --config.model=runs/sft/best

--config.path names the exercises that experiments.prepare_instructions or experiments.self_instruct held out. A
function counts if it parses and has the name and the parameters that were asked for; it is not run. Writes
replies.jsonl and exercises.json.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from experiments import runner
from llm_jax.alignment import instructions
from llm_jax.alignment.config import ExercisesConfig
from llm_jax.alignment.instructions import Exercise
from llm_jax.errors import require
from llm_jax.evaluation import tables
from llm_jax.evaluation.rewards import Proportion, percent
from llm_jax.evaluation.tables import Table
from llm_jax.interop import pretrained
from llm_jax.interop.pretrained import Pretrained
from llm_jax.sampling.generate import generate
from llm_jax.tokenization import chat
from llm_jax.tokenization.chat import ChatTemplate


def run(config: ExercisesConfig, workdir: Path) -> None:
    """Let the model answer, and count what is right."""
    require(config.model != "", "set --config.model to the model that is to answer: a folder, a file or a name")
    require(config.path != "", "set --config.path to the exercises: a file that experiments.prepare_instructions wrote")
    asked = instructions.read_exercises(config.path)[: config.limit or None]
    model = pretrained.load_to_generate(config.model)
    template = chat.choose(config.template, model.tokenizer, model.chat_template)
    replies = answer(config, model, template, asked)
    right = [instructions.solves(reply, exercise) for reply, exercise in zip(replies, asked)]
    kinds = list(dict.fromkeys(exercise.kind for exercise in asked))
    found = {kind: _count([r for r, exercise in zip(right, asked) if exercise.kind == kind]) for kind in kinds}
    found["all"] = _count(right)
    write(workdir, asked, replies, right, found)


def answer(config: ExercisesConfig, model: Pretrained, template: ChatTemplate, asked: Sequence[Exercise]) -> list[str]:
    """The model's reply to each exercise; "" where the request does not fit."""
    prompts = [template.encode(exercise.conversation.messages[:-1]) for exercise in asked]
    room = model.config.max_length - config.sampling.max_new_tokens
    fitting = sorted((i for i, prompt in enumerate(prompts) if len(prompt) <= room), key=lambda i: len(prompts[i]))
    missing = len(asked) - len(fitting)
    if missing:
        print(
            f"{missing:,} of {len(asked):,} exercises leave no room for a reply of {config.sampling.max_new_tokens} "
            f"tokens in the model's context of {model.config.max_length:,}: they are not asked, and count as unsolved"
        )
    require(
        bool(fitting), "no exercise fits: lower --config.sampling.max_new_tokens, or take a model of longer context"
    )
    replies = [""] * len(asked)
    for start in track(range(0, len(fitting), config.batch_size), "answering", console=Console(stderr=True)):
        chosen = fitting[start : start + config.batch_size]
        found = generate(
            model.params, model.config, [prompts[i] for i in chosen], config.sampling, stop_ids=template.stop_ids
        )
        for i, generation in zip(chosen, found):
            replies[i] = template.reply_text(generation.tokens)
    return replies


def _count(right: Sequence[bool]) -> Proportion:
    return Proportion(float(sum(right)), len(right))


def write(
    workdir: Path,
    asked: Sequence[Exercise],
    replies: Sequence[str],
    right: Sequence[bool],
    found: dict[str, Proportion],
) -> None:
    """Print the table, and write it and every reply."""
    rows = tuple((kind, percent([share]), f"{share.total:,}") for kind, share in found.items())
    headings = ("exercise", "solved (%)", "asked")
    notes = ("With Wilson's 95% interval. Made by rule: they measure what was trained, not a general ability.",)
    Console().print(tables.as_rich(Table("Held-out exercises", headings, rows, frozenset(headings[1:]), notes)))
    workdir.mkdir(parents=True, exist_ok=True)
    summary = {kind: dataclasses.asdict(share) | {"share": share.share} for kind, share in found.items()}
    (workdir / "exercises.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (workdir / "replies.jsonl").open("w", encoding="utf-8") as file:
        for exercise, reply, is_right in zip(asked, replies, right):
            request = exercise.conversation.messages[-2].content
            record = {"kind": exercise.kind, "request": request, "answer": exercise.answer}
            file.write(json.dumps(record | {"reply": reply, "right": is_right}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    runner.main(run, ExercisesConfig, "configs/sft/exercises.py")
