"""Does a model keep to an instruction given long ago? LLaMA-2's Ghost Attention, with and without, turn by turn.

    python -m experiments.ghost_attention --config=configs/ghost_attention/smollm2.py --workdir=runs/ghost_attention

In stages, each of which is done once and continued by the same command: `dialogues` samples dialogues of many turns
from config.training.model with an instruction in every message, and writes what each variant learns of them; `runs`
fine-tunes the model on each variant with each seed, and lets it, and the model as it was, talk over held-out questions
under instructions that only the first message gives; `report` makes of that the table by turn (LLaMA-2, table 30) and
the figures, also of the attention (figure 10).

Runs may go side by side: first --stages=dialogues, then processes with --stages=runs --only=base/0,ghost/0 and so on,
and --stages=report in the end.

Writes to --workdir: dialogues/VARIANT.jsonl and yield.json, a folder for each VARIANT/seed_N (the model, obedience.json
and replies.jsonl), and report.md, report.json, obedience.png, attention.png.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import runner, sft
from experiments.stages import (
    check_finished,
    check_names,
    check_workdir,
    command_of,
    define_flags,
    is_done,
    write_tables,
)
from llm_jax.alignment import constraints, finetune, ghost_attention, instructions, questions
from llm_jax.alignment.config import SftConfig
from llm_jax.alignment.constraints import CONSTRAINTS, Instruction
from llm_jax.alignment.ghost_attention import VARIANTS, Dialogue, Told, Yield
from llm_jax.alignment.ghost_attention_config import GhostAttentionConfig
from llm_jax.alignment.sft import choose_template
from llm_jax.alignment.speaker import Speaker
from llm_jax.config import SamplingConfig
from llm_jax.errors import require
from llm_jax.evaluation import attention_map, obedience
from llm_jax.evaluation.attention_map import Attention
from llm_jax.evaluation.obedience import Shares
from llm_jax.evaluation.rewards import Proportion
from llm_jax.evaluation.tables import Table
from llm_jax.files import write_json
from llm_jax.tokenization.chat import Message

STAGES = ("dialogues", "runs", "report")
BASE, REPEATED = "base", "repeated"  # the model as it was, told once or in every message
TITLES = {
    BASE: "as it was",
    REPEATED: "as it was, told in every message",
    **{name: variant.title for name, variant in VARIANTS.items()},
}
MAPPED = (BASE, "baseline", "ghost")
ALL, SAID_BEFORE = "all", "said before"
TABLE_TITLES = {SAID_BEFORE: "Replies that are an earlier one again, word for word (%)"}
DIALOGUES, YIELD, OBEDIENCE, REPLIES = "dialogues", "yield.json", "obedience.json", "replies.jsonl"
CHANGEABLE = ("seeds", "variants", "mapped_dialogues")  # between two calls with one --workdir: what is new is added
LEAST_QUESTION = 4  # tokens that a question must be allowed to have
_STAGES, _ONLY = define_flags(STAGES, "ghost/0")


def run(config: GhostAttentionConfig, workdir: Path, stages: Sequence[str] = STAGES, only: Sequence[str] = ()) -> None:
    """Do the stages; `only` are the runs to be done now, as "ghost/0", () = all."""
    known = [f"{name}/{seed}" for seed in config.seeds for name in (BASE, REPEATED, *config.variants)]
    check_names(stages, STAGES, only, known)
    check_workdir(config, workdir, CHANGEABLE)
    if "dialogues" in stages:
        make_dialogues(config, workdir)
    if "runs" in stages:
        made = (workdir / DIALOGUES / YIELD).is_file()
        require(made, f"{workdir} has no dialogues yet: do the stage `dialogues` first")
        for each in only or known:
            name, _, seed = each.partition("/")
            do_run(config, workdir, name, int(seed))
    if "report" in stages:
        report(config, workdir)


@contextmanager
def speaking(
    config: GhostAttentionConfig, model: str | Path, sampling: SamplingConfig, what: str, total: int | None
) -> Iterator[Speaker]:
    """A model that is ready to reply, under a progress bar over so many replies."""
    mesh = finetune.build_mesh(config.training)
    loaded = finetune.load(dataclasses.replace(config.training, model=str(model)), mesh)
    template = choose_template(config.data, loaded.tokenizer, loaded.chat_template)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        advance = lambda replied: progress.advance(task, replied)  # noqa: E731
        yield Speaker(loaded, template, sampling, mesh, config.batch_size, advance)


def longest_question(config: GhostAttentionConfig, speaker: Speaker, turns: int) -> int:
    """With how many tokens of each question so many turns fit into the model's context.

    Raises `UserError` where no question would fit.
    """
    count = lambda text: len(speaker.template.tokenizer.encode(text))  # noqa: E731
    names = (*config.constraints, *config.new_constraints)
    asked = sorted(max(count(CONSTRAINTS[n].instruction), count(CONSTRAINTS[n].reworded)) for n in names)
    marks = len(speaker.template.encode(([Message("user", "a"), Message("assistant", "a")] * turns)[:-1]))
    new_tokens = max(config.sampling.max_new_tokens, config.judging.max_new_tokens)
    context = speaker.model.config.max_length
    limit = (context - marks) // turns - new_tokens - sum(asked[-config.most_constraints :])
    require(
        limit >= LEAST_QUESTION,
        f"{turns} turns with replies of {new_tokens} tokens do not fit into the model's context of {context}: lower "
        "turns and judged_turns, or max_new_tokens, or raise training.max_length",
    )
    return limit


def questions_that_fit(config: GhostAttentionConfig, speaker: Speaker, turns: int) -> tuple[list[str], list[str]]:
    """(to train on, held out): the questions with which so many turns fit into the model's context."""
    count = lambda text: len(speaker.template.tokenizer.encode(text))  # noqa: E731
    limit = longest_question(config, speaker, turns)
    train, heldout, tally = questions.load(config.questions, config.holdout_fraction)
    if str(tally):
        print(f"questions, left out: {tally}")
    fitting = [[question for question in pool if count(question) <= limit] for pool in (train, heldout)]
    missing = len(train) + len(heldout) - sum(map(len, fitting))
    if missing:
        print(f"{missing:,} questions have more than the {limit} tokens that fit {turns} times, and are not asked")
    return fitting[0], fitting[1]


def make_dialogues(config: GhostAttentionConfig, workdir: Path) -> None:
    """Sample what is trained on, and write it for every variant: once."""
    folder = workdir / DIALOGUES
    if (folder / YIELD).is_file():
        print(f"{folder}: made earlier")
        return
    with speaking(config, config.training.model, config.sampling, "dialogues", None) as speaker:
        longest_question(config, speaker, max(config.judged_turns))  # refused now, and not after the sampling
        kept, found = sample(config, speaker)
        require(
            bool(kept),
            f"no reply of {config.training.model} keeps to its instruction: choose other constraints, a larger model, "
            "or replies='mended'",
        )
        asked = [told.questions for told in kept]
        untold = ghost_attention.converse(asked, [""] * len(asked), speaker.reply)
    folder.mkdir(exist_ok=True)
    for name in VARIANTS:
        instructions.write(folder / f"{name}.jsonl", ghost_attention.training_data(name, kept, untold))
    print(f"{found.kept:,} of {found.sampled:,} dialogues have a reply that obeys; {len(kept):,} are trained on")
    if len(kept) < config.dialogues:
        print(f"warning: {config.dialogues:,} were asked for: raise config.rounds")
    lengths = np.bincount([len(each) for each in asked]).tolist()
    values = {"sampled": found.sampled, "kept": found.kept, "used": len(kept), "dialogues_by_turns": lengths}
    write_json(folder / YIELD, {**values, "obeyed": found.shares(), "replies": dict(found.replies)})


def sample(config: GhostAttentionConfig, speaker: Speaker) -> tuple[list[Told], Yield]:
    """As many dialogues as are wanted, or as some rounds of sampling give."""
    pool, _ = questions_that_fit(config, speaker, config.turns)
    kept: list[Told] = []
    found = Yield()
    for number in range(config.rounds):
        missing = config.dialogues - len(kept)
        count = -(-missing // config.batch_size) * config.batch_size
        if missing > 0:
            generator = np.random.default_rng([config.sampling.seed, number])
            told, more = ghost_attention.build(
                questions.dialogues(pool, count, config.turns, generator),
                speaker.reply,
                constraints=[CONSTRAINTS[name] for name in config.constraints],
                most_constraints=config.most_constraints,
                mended=config.replies == "mended",
                seed=number,
            )
            kept, found = kept + told, found + more
    return kept[: config.dialogues], found


def do_run(config: GhostAttentionConfig, workdir: Path, name: str, seed: int) -> None:
    """Train a variant, or take the model as it was, and judge it: once."""
    folder = workdir / name / f"seed_{seed}"
    if is_done(folder / OBEDIENCE):
        return
    if name in VARIANTS:
        check_finished(sft.run(run_config(config, workdir, name, seed), folder), folder)
    judge(config, folder if name in VARIANTS else config.training.model, folder, name, seed)


def run_config(config: GhostAttentionConfig, workdir: Path, name: str, seed: int) -> SftConfig:
    """The fine-tuning on one variant."""
    path = str(workdir / DIALOGUES / f"{name}.jsonl")
    # Dropped where it is too long: cut at a turn, a dialogue would end with a reply that perhaps disobeys.
    changes: dict[str, Any] = {"supervise": VARIANTS[name].supervise, "too_long": "drop", "seed": seed}
    return SftConfig(
        training=dataclasses.replace(config.training, seed=seed),
        data=dataclasses.replace(config.data, path=path, **changes),
        samples=0,
    )


def judged_instructions(config: GhostAttentionConfig, seed: int) -> list[tuple[str, Instruction]]:
    """What is asked for in the dialogues that are judged, with its kind: the same for every model."""
    generator = np.random.default_rng([seed, 1])
    known, new = ([CONSTRAINTS[n] for n in names] for names in (config.constraints, config.new_constraints))
    pairs = constraints.held_out_pairs(known) if config.most_constraints > 1 else []

    def trained() -> Instruction:
        return constraints.draw(known, config.most_constraints, generator)

    kinds: dict[str, Callable[[], Instruction]] = {
        "as trained": trained,
        "in other words": lambda: constraints.reword(trained().constraints),
        "combined anew": lambda: constraints.put(pairs[generator.integers(len(pairs))], generator),
        "new constraints": lambda: constraints.put([new[generator.integers(len(new))]], generator),
    }
    usable = [kind for kind in kinds if (pairs or kind != "combined anew") and (new or kind != "new constraints")]
    return [(kind, kinds[kind]()) for kind in usable for _ in range(config.judged_dialogues)]


def judge(config: GhostAttentionConfig, model: str | Path, folder: Path, name: str, seed: int) -> None:
    """Let a model talk under every instruction, and write what it said and how much of it obeyed."""
    drawn = judged_instructions(config, seed)
    turns = max(config.judged_turns)
    with speaking(config, model, config.judging, f"judging {name}, seed {seed}", len(drawn) * turns) as speaker:
        _, pool = questions_that_fit(config, speaker, turns)
        asked = questions.dialogues(pool, len(drawn), turns, np.random.default_rng([seed, 2]))
        told = [instruction.text for _, instruction in drawn]
        dialogues = ghost_attention.converse(asked, told, speaker.reply, first_only=name != REPEATED)
    obeyed = ghost_attention.obedience([instruction for _, instruction in drawn], dialogues)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / REPLIES).open("w", encoding="utf-8") as file:
        for (kind, instruction), dialogue, right in zip(drawn, dialogues, obeyed):
            said = [message.content for message in dialogue]
            record = {"kind": kind, "instruction": instruction.text, "constraints": instruction.name}
            file.write(json.dumps({**record, "said": said, "obeyed": right}, ensure_ascii=False) + "\n")
    found = {
        kind: obedience.shares([right for (each, _), right in zip(drawn, obeyed) if kind in (ALL, each)])
        for kind in (ALL, *dict(drawn))
    }
    again = [ghost_attention.said_before([message.content for message in each[1::2]]) for each in dialogues]
    found[SAID_BEFORE] = obedience.shares(again)
    values = {kind: {turn: dataclasses.asdict(share) for turn, share in row.items()} for kind, row in found.items()}
    write_json(folder / OBEDIENCE, values)  # last: its presence says that the rest is there


def report(config: GhostAttentionConfig, workdir: Path) -> None:
    """Print and write the tables and the figures of all runs."""
    names = (BASE, REPEATED, *config.variants)
    found = {name: [read_obedience(workdir / name / f"seed_{seed}") for seed in config.seeds] for name in names}
    made = [
        obedience.table(
            TABLE_TITLES.get(kind, f"Replies that keep to the instruction (%), {kind}"),
            {TITLES[name]: [run[kind] for run in runs] for name, runs in found.items()},
            config.judged_turns,
        )
        for kind in found[BASE][0]
    ]
    made.append(yield_table(json.loads((workdir / DIALOGUES / YIELD).read_text())))
    attention = attend(config, workdir) if config.mapped_dialogues else {}
    command = command_of("ghost_attention")
    note = "The first message alone gives the instruction. Mean ± standard error over seeds; of one, Wilson's interval."
    curves = {TITLES[name]: [run[ALL] for run in runs] for name, runs in found.items()}
    obedience.draw(curves, workdir / "obedience.png")
    values: dict[str, Any] = {
        "command": command,
        "obedience": {name: [as_json(run) for run in runs] for name, runs in found.items()},
        "attention_to_instruction": {  # mean over heads, by layer and turn
            name: obedience.instruction_share(each).tolist() for name, each in attention.items()
        },
    }
    write_json(workdir / "report.json", values)
    if attention:
        obedience.draw_attention({TITLES[n]: each for n, each in attention.items()}, workdir / "attention.png")
    write_tables(workdir, "Ghost Attention", command, made, note)
    print(f"{workdir / 'report.md'}: these tables; obedience.png and attention.png: the figures")


def read_obedience(folder: Path) -> dict[str, Shares]:
    """What `judge` wrote, by kind of instruction; `UserError` where it has not been there."""
    path = folder / OBEDIENCE
    require(path.is_file(), f"{folder} is not judged yet: do the stage `runs` first")
    found = json.loads(path.read_text())
    return {kind: {int(turn): Proportion(**share) for turn, share in row.items()} for kind, row in found.items()}


def yield_table(found: Mapping[str, Any]) -> Table:
    """How often the model obeyed when every message told it to, by what it was told."""
    rows = tuple((name, f"{100 * share:.1f}", f"{found['replies'][name]:,}") for name, share in found["obeyed"].items())
    note = (
        f"{found['kept']:,} of {found['sampled']:,} dialogues have a reply after the first that obeys, with which they "
        f"can end; {found['used']:,} are trained on."
    )
    headings = ("instruction", "obeyed (%)", "replies")
    return Table("Replies sampled to train on", headings, rows, frozenset(headings[1:]), (note,))


def attend(config: GhostAttentionConfig, workdir: Path) -> dict[str, Attention]:
    """Where models look in the same dialogues: those of the model that was told in every message, told once."""
    seed = config.seeds[0]
    lines = (workdir / REPEATED / f"seed_{seed}" / REPLIES).read_text(encoding="utf-8").splitlines()
    shown = [json.loads(line) for line in lines[: config.mapped_dialogues]]
    found = {}
    for name in [name for name in MAPPED if name == BASE or name in config.variants]:
        model = config.training.model if name == BASE else workdir / name / f"seed_{seed}"
        with speaking(config, model, config.judging, f"attention of {name}", len(shown)) as speaker:
            each = [attend_once(speaker, record["instruction"], record["said"]) for record in shown]
        found[name] = Attention(*(np.mean(values, axis=0) for values in zip(*each)))
    return found


def attend_once(speaker: Speaker, instruction: str, said: Sequence[str]) -> Attention:
    """Where the model looks in one dialogue."""
    dialogue: Dialogue = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said))
    told = ghost_attention.attach(dialogue, instruction, first_only=True)
    ids, parts = attention_map.parts_of(speaker.template, told, dialogue)
    speaker.advance(1)
    return attention_map.by_part(speaker.model.params, speaker.model.config, ids, parts)


def as_json(run: Mapping[str, Shares]) -> dict[str, dict[int, float]]:
    """Shares by kind of instruction and turn."""
    return {kind: {turn: share.share for turn, share in row.items()} for kind, row in run.items()}


def main(config: GhostAttentionConfig, workdir: Path) -> None:
    """Run what the flags name."""
    run(config, workdir, _STAGES.value, _ONLY.value)


if __name__ == "__main__":
    runner.main(main, GhostAttentionConfig, "configs/ghost_attention/smollm2.py", save_config=False)
