"""Self-instruct for tools: a model writes samples of using tools from a few that people wrote (Qwen, section 3.4).

    python -m experiments.self_instruct --config=configs/self_instruct/small.py --workdir=runs/self_instruct

Rules keep the samples that can be parsed, use the tool they should, give it valid arguments and ask something new.
They become conversations: --workdir/train/tools.jsonl and --workdir/heldout/tools.jsonl for experiments.sft, and the
held-out ones' calls in --workdir/exercises.jsonl for experiments.exercises. report.md and report.json say how many each
rule took away. Run the same command again to continue after a stop, or with a higher --config.count for more.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from experiments import runner
from llm_jax import config as config_lib
from llm_jax.alignment import conversations, instructions, tool_use
from llm_jax.alignment.config import SelfInstructConfig
from llm_jax.alignment.conversations import Conversation, Tally
from llm_jax.alignment.instructions import Exercise
from llm_jax.alignment.tool_use import Outcome
from llm_jax.data.documents import text_hash
from llm_jax.errors import UserError, require
from llm_jax.evaluation import tables
from llm_jax.evaluation.tables import Table
from llm_jax.interop import pretrained
from llm_jax.sampling.text import Completion, complete

WRITTEN, KEPT = "written.jsonl", "tools.jsonl"
TABLE_WIDTH = 110
STOPS = (tool_use.STOP, "\n\n")  # a sample is one paragraph
CHANGEABLE = ("count", "holdout_fraction")  # when a run is continued


def run(config: SelfInstructConfig, workdir: Path) -> None:
    """Let the model write what is missing, judge all of it, and write what is kept."""
    for name in ("model", "tools", "seeds"):
        require(getattr(config, name) != "", f"set --config.{name}: see configs/self_instruct/small.py")
    tools, seeds = tool_use.read_tools(config.tools), tool_use.read_samples(config.seeds)
    check_folder(config, workdir)
    outcomes = tool_use.write(
        lambda prompts: continuations(config, workdir, prompts),
        tools,
        seeds,
        config.count,
        shown=config.shown,
        seed=config.seed,
    )
    report(workdir, outcomes, [tool.name for tool in tools])
    kept = [tool_use.conversation(outcome.sample, tools) for outcome in outcomes if outcome.sample]
    require(bool(kept), f"the rules keep none of {config.count} samples: {tally(outcomes)}; see {workdir / WRITTEN}")
    write(workdir, *conversations.split(kept, config.holdout_fraction))


def check_folder(config: SelfInstructConfig, workdir: Path) -> None:
    """Note the config in the folder; `UserError` if what is there was written with another one."""
    path = workdir / "config.json"
    if path.exists():
        old = dataclasses.asdict(config_lib.load(SelfInstructConfig, path))
        changed = [key for key, value in dataclasses.asdict(config).items() if value != old[key]]
        decisive = [key for key in changed if key not in CHANGEABLE]
        require(not decisive, f"{workdir} holds samples of another {', '.join(decisive)}: choose a new --workdir")
    config_lib.save(config, path)


def continuations(config: SelfInstructConfig, workdir: Path, prompts: Sequence[str]) -> list[str]:
    """What the model writes after each prompt; those of an earlier run are read from the folder."""
    path = workdir / WRITTEN
    written = list(read_written(path, prompts))
    if len(written) == len(prompts):
        return written
    finish = model_of(config)
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("writing", total=len(prompts), completed=len(written))
        with path.open("a", encoding="utf-8") as file:
            while len(written) < len(prompts):
                first = len(written)
                asked = prompts[first : first + config.batch_size]
                texts = finish(asked, first)
                written += texts
                records = ({"prompt": text_hash(prompt), "text": text} for prompt, text in zip(asked, texts))
                file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
                file.flush()
                progress.advance(bar, len(texts))
    return written


def read_written(path: Path, prompts: Sequence[str]) -> Iterator[str]:
    """What an earlier run wrote after these prompts; a last line that it did not finish is taken out of the file."""
    *lines, unfinished = (path.read_text(encoding="utf-8") if path.exists() else "").split("\n")
    if unfinished:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for number, (line, prompt) in enumerate(zip(lines, prompts), start=1):
        try:
            record = json.loads(line)
            same, text = record["prompt"] == text_hash(prompt), str(record["text"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number} is damaged: choose a new --workdir") from None
        require(same, f"{path} was written with other tools or seeds: choose a new --workdir")
        yield text


def model_of(config: SelfInstructConfig) -> Callable[[Sequence[str], int], list[str]]:
    """A function of prompts, and the number of the first of them, to what the model writes after them."""
    model = pretrained.load_to_generate(config.model, quantize=config.quantize)

    def finish(prompts: Sequence[str], first: int) -> list[str]:
        # Another seed for each batch, or its first rows would be drawn with the same random numbers as the last one's.
        sampling = dataclasses.replace(config.sampling, seed=text_hash(f"{config.seed} {first}") % 2**31)
        found = complete(model.params, model.config, model.tokenizer, prompts, sampling, stop_strings=STOPS)
        return [whole_lines(each) for each in found]

    return finish


def whole_lines(completion: Completion) -> str:
    """What was written, without a last line in which it was cut."""
    if completion.finished == "stop":
        return completion.completion
    return completion.completion.rpartition("\n")[0]


def write(workdir: Path, train: Sequence[Conversation], heldout: Sequence[Conversation]) -> None:
    """Write both sides, and the held-out samples' calls as exercises."""
    for side, found in (("train", train), ("heldout", heldout)):
        (workdir / side).mkdir(exist_ok=True)
        instructions.write(workdir / side / KEPT, found)
    calls = (dataclasses.replace(each, messages=each.messages[:3]) for each in heldout)
    instructions.write_exercises(workdir / "exercises.jsonl", (Exercise(instructions.TOOL, call) for call in calls))
    print(f"{workdir}: {len(train):,} conversations to train on, {len(heldout):,} held out")


def tally(outcomes: Sequence[Outcome]) -> Tally:
    """How many samples each rule took away, and the first of each."""
    found = Tally()
    for number, outcome in enumerate(outcomes, start=1):
        if outcome.sample is None:
            found.add(outcome.reason, f"sample {number}", outcome.detail)
    return found


def report(workdir: Path, outcomes: Sequence[Outcome], tools: Sequence[str]) -> None:
    """Print the yield, and write it."""
    counts = {name: collections.Counter(o.reason for o in outcomes if o.tool == name) for name in tools}
    table = yield_table(counts)
    Console(width=max(Console().width, TABLE_WIDTH)).print(tables.as_rich(table))
    first = tally(outcomes).first
    by_tool = {name: {reason or "kept": count for reason, count in each.items()} for name, each in counts.items()}
    summary: dict[str, Any] = {"written": len(outcomes), "by_tool": by_tool, "first": first}
    (workdir / "report.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (workdir / "report.md").write_text(tables.as_markdown(table), encoding="utf-8")


def yield_table(counts: Mapping[str, collections.Counter[str]]) -> Table:
    """How many samples were written for each tool and for all, kept, and taken away by each rule."""
    total = sum(counts.values(), collections.Counter())
    headings = ("tool", "written", "kept", "kept (%)", *tool_use.REASONS)

    def row(name: str, found: collections.Counter[str]) -> tuple[str, ...]:
        numbers = [f"{found[reason]:,}" for reason in tool_use.REASONS]
        share = f"{100 * found[''] / found.total():.1f}" if found else ""
        return (name, f"{found.total():,}", f"{found['']:,}", share, *numbers)

    rows = (*(row(name, found) for name, found in counts.items()), row("all", total))
    notes = ("A sample is counted at the first rule that it breaks, from left to right.",)
    return Table("Samples of using tools", headings, rows, frozenset(headings[1:]), notes)


if __name__ == "__main__":
    runner.main(run, SelfInstructConfig, "configs/self_instruct/small.py", save_config=False)
