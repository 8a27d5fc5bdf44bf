"""Which method makes most of the same number of samples? Word tasks with exact answers, for a model that reads bytes.

    python -m experiments.words --config=configs/words/small.py --workdir=runs/words

Spelling words backwards, sorting and counting their letters, and continuing sequences of numbers. Stages, each of which
is done once and continued by the same command: `start` makes the tasks and a small model, and fine-tunes it on answers
until it solves some of the held-out tasks (config.target), or takes a trained model as it is (config.base); `runs` goes
on from there with each method and each seed, paid by exact answers alone, and judges what comes of it on held-out
tasks; `report` makes the table and the figure.

Runs may go side by side: first --stages=start, then processes with --stages=runs --only=ppo/0,grpo/0 and so on, and
--stages=report in the end.

Writes to --workdir: tasks/, start/ (a model, unless it is config.base), METHOD/seed_N (a model and result.json), and
report.md, report.json, words.png.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import methods, runner, sft
from experiments.methods import Drawing, Start
from experiments.stages import (
    check_finished,
    check_names,
    check_workdir,
    command_of,
    define_flags,
    is_done,
    write_tables,
)
from llm_jax import models
from llm_jax.alignment import finetune, prompts, rejection_run, words
from llm_jax.alignment.policy_config import PromptDataConfig
from llm_jax.alignment.ppo import Data
from llm_jax.alignment.preferences import Pair
from llm_jax.alignment.prompts import Prompt, PromptStream
from llm_jax.alignment.rejection import Drawn
from llm_jax.alignment.words import Task
from llm_jax.alignment.words_config import TITLES, WordsConfig
from llm_jax.config import CheckpointConfig, SamplingConfig
from llm_jax.errors import require
from llm_jax.evaluation.figures import SERIES, figure, legend_beside
from llm_jax.evaluation.tables import Table
from llm_jax.files import write_json
from llm_jax.interop import pretrained
from llm_jax.interop.pretrained import Pretrained
from llm_jax.sampling.generate import generate
from llm_jax.tokenization import byte_level, chat
from llm_jax.training import checkpoint, metrics

STAGES = ("start", "runs", "report")
TASKS, TRAIN, HELDOUT = "tasks", "train.jsonl", "heldout.jsonl"
RANDOM, SFT, START, PAIRS, RESULT = "random", "sft", "start", "pairs.jsonl", "result.json"
JUDGED_AT_ONCE = 128
EVERY_CHECKPOINT = 1_000_000
POLICY_GRADIENTS = ("ppo", "grpo")
MEMORIES = {"rejection": "all", "rejection_forgets": "last"}
CHANGEABLE = ("seeds", "methods")  # between two calls with one --workdir: what is new is added
_STAGES, _ONLY = define_flags(STAGES, "ppo/0")


def run(config: WordsConfig, workdir: Path, stages: Sequence[str] = STAGES, only: Sequence[str] = ()) -> None:
    """Do the stages; `only` are the runs to be done now, as "ppo/0", () = all."""
    known = [f"{method}/{seed}" for seed in config.seeds for method in config.methods]
    check_names(stages, STAGES, only, known)
    check_workdir(config, workdir, CHANGEABLE)
    if "start" in stages:
        start(config, workdir)
    if "runs" in stages:
        require((workdir / START / RESULT).is_file(), f"{workdir} has no start yet: do the stage `start` first")
        for each in only or known:
            method, _, seed = each.partition("/")
            do_run(config, workdir, method, int(seed))
    if "report" in stages:
        report(config, workdir)


def start(config: WordsConfig, workdir: Path) -> None:
    """Make the tasks, and judge the model that all methods begin with."""
    if is_done(workdir / START / RESULT):
        return
    make_tasks(config, workdir / TASKS)
    if config.base:
        training = dataclasses.replace(config.ppo.training, model=config.base)
        model = finetune.load(training, finetune.build_mesh(training))
        (workdir / START).mkdir(exist_ok=True)
        write_json(workdir / START / RESULT, judge(config, model, workdir))
    else:
        fine_tune(config, workdir)


def fine_tune(config: WordsConfig, workdir: Path) -> None:
    """A small model, fine-tuned until it solves about `config.target`; all of its checkpoints are kept."""
    make_model(config, workdir / RANDOM)
    steps, every = config.sft.training.steps, config.sft.training.checkpoint.every_steps
    settings = dataclasses.replace(
        config.sft,
        training=dataclasses.replace(
            config.sft.training,
            model=str(workdir / RANDOM),
            checkpoint=CheckpointConfig(every_steps=every, keep_last=EVERY_CHECKPOINT),
        ),
        data=dataclasses.replace(
            config.sft.data, path=str(workdir / TASKS / f"sft_{TRAIN}"), heldout_path=str(workdir / TASKS / HELDOUT)
        ),
    )
    check_finished(sft.run(settings, workdir / SFT), workdir / SFT)
    mesh = finetune.build_mesh(settings.training)
    for step in sorted({*range(every, steps, every), steps}):
        model = pretrained.load(workdir / SFT, mesh=mesh, step=step, dtype="float32")
        found = judge(config, model, workdir)
        solved = share(found["sampled"])
        print(f"after {step} steps of fine-tuning: {solved:.1%} of the held-out tasks solved")
        if solved >= config.target:
            break
    else:
        print(f"fine-tuning never reached {config.target:.0%}: its end is the start; raise sft.training.steps")
    finetune.write_companions(model, workdir / START)
    checkpoint.replace_model(workdir / START, model.config, model.params, step)
    write_json(workdir / START / RESULT, {"steps": step, **found})


def make_tasks(config: WordsConfig, folder: Path) -> None:
    """Write the tasks to train on, those that the start is shown the answers of, and the held-out ones."""
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout = words.make(words.read_words(config.words), config.kinds, config.holdout_fraction)
    forms = {words.read(task.request)[:2]: task for task in train}
    examples = list(forms.values())[: config.examples]
    train = [task for task in train if task not in examples]
    limit = config.demonstrations or len(train)
    shown = [task for kind in config.kinds for task in [each for each in train if each.kind == kind][:limit]]
    for name, tasks in ((TRAIN, train), (f"sft_{TRAIN}", shown), (HELDOUT, heldout)):
        order = np.random.default_rng(0).permutation(len(tasks))  # of kinds, so that the first ones are of all
        records = [{"kind": tasks[i].kind, "messages": _messages(*examples, tasks[i])} for i in order]
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{len(train):,} tasks to train on, {len(heldout):,} held out")


def _messages(*tasks: Task) -> list[dict[str, str]]:
    return [dataclasses.asdict(message) for task in tasks for message in words.conversation(task).messages]


def make_model(config: WordsConfig, folder: Path) -> None:
    """A model with random weights that reads bytes, unless it is there."""
    if (folder / checkpoint.FOLDER).is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    byte_level.build().save(folder)
    key = jax.random.key(config.sft.training.seed)
    checkpoint.save_model(folder, config.model, models.init(config.model, key))


def do_run(config: WordsConfig, workdir: Path, method: str, seed: int) -> None:
    """One method with one seed, from the start to its result: once."""
    folder = workdir / method / f"seed_{seed}"
    if is_done(folder / RESULT):
        return
    mesh = finetune.build_mesh(config.sft.training)
    print(f"{TITLES[method]}, seed {seed}")
    check_finished(take_on(config, workdir, method, folder, seed, mesh), folder)
    model = pretrained.load(folder, mesh=mesh, dtype="float32")
    write_json(folder / RESULT, {**judge(config, model, workdir), "curve": curve_of(config, method, folder)})


def data_of(config: WordsConfig, workdir: Path, model: Pretrained, at_once: int, seed: int) -> Data:
    """The tasks as prompts, paid by exact answers."""
    train, heldout = (read_prompts(config, workdir / TASKS / name, model) for name in (TRAIN, HELDOUT))
    template = chat.choose(config.template, model.tokenizer, model.chat_template)
    tokens = [[np.array(prompt.tokens, np.int32) for prompt in side] for side in (train, heldout)]
    stream = PromptStream(train, at_once, seed)
    return Data(stream, heldout, words.exact_match, model.tokenizer, template, fingerprint=finetune.fingerprint(tokens))


def read_prompts(config: WordsConfig, path: Path, model: Pretrained) -> list[Prompt]:
    """The tasks of a file."""
    template = chat.choose(config.template, model.tokenizer, model.chat_template)
    settings = PromptDataConfig(path=str(path), max_tokens=config.ppo.rollout.max_prompt_tokens)
    return prompts.load(settings, model.tokenizer, template).train


def start_of(config: WordsConfig, workdir: Path) -> Start:
    """What all methods begin with."""
    return Start(
        Path(config.base) if config.base else workdir / START,
        config.template,
        functools.partial(data_of, config, workdir),
    )


def take_on(config: WordsConfig, workdir: Path, method: str, folder: Path, seed: int, mesh: Mesh) -> bool:
    """The start taken on with a method; whether it came to its end."""
    begun = start_of(config, workdir)
    if method in POLICY_GRADIENTS:
        return methods.run_ppo(getattr(config, method), begun, folder, seed, mesh)
    if method in MEMORIES:
        rounds = dataclasses.replace(config.rejection, memory=MEMORIES[method])
        return methods.run_rejection(rounds, begun, folder, seed, mesh)
    # As many samples as the others draw, all from the start; a right and a wrong one of a prompt are a pair.
    batches = config.rejection.rounds * config.rejection.batches
    drawing = Drawing(config.rejection.rollout, batches, pairs_of)
    pairs = methods.draw_pairs(config.dpo.training, begun, drawing, folder / PAIRS, seed, mesh)
    return methods.run_dpo(config.dpo, begun, pairs, folder, seed, mesh)


def pairs_of(drawn: Drawn) -> list[Pair]:
    """Of each prompt the right response, if there is one, over every different wrong one."""
    found = []
    for prompt, responses in zip(drawn.prompts, drawn.responses):
        right = next((each.text for each in responses if each.reward > 0), "")
        wrong = dict.fromkeys(each.text for each in responses if each.text.strip() and each.text.strip() != right)
        found += [Pair(prompt.messages, right, text) for text in wrong if right]
    return found


def judge(config: WordsConfig, model: Pretrained, workdir: Path) -> dict[str, dict[str, list[int]]]:
    """(solved, asked) by kind of task, of held-out ones: with one sample of each at temperature 1, and greedily."""
    asked = read_prompts(config, workdir / TASKS / HELDOUT, model)[: config.judged]
    template = chat.choose(config.template, model.tokenizer, model.chat_template)
    architecture, params = models.for_decoding(model.params, model.config)
    found: dict[str, dict[str, list[int]]] = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        sampling = SamplingConfig(max_new_tokens=config.max_new_tokens, temperature=temperature, seed=1)
        right: list[bool] = []
        for first in range(0, len(asked), JUDGED_AT_ONCE):
            batch = asked[first : first + JUDGED_AT_ONCE]
            filled = [batch[i % len(batch)].tokens for i in range(JUDGED_AT_ONCE)]  # so that one program serves all
            streams = range(first, first + JUDGED_AT_ONCE)
            drawn = generate(params, architecture, filled, sampling, stop_ids=template.stop_ids, streams=[*streams])
            right += [
                each.finished == "stop" and template.reply_text(each.tokens) == prompt.answer
                for prompt, each in zip(batch, drawn)
            ]
        kinds = [words.read(prompt.messages[-1].content)[0] for prompt in asked]
        found[name] = {
            kind: [sum(r for r, k in zip(right, kinds) if k == kind), kinds.count(kind)] for kind in config.kinds
        }
    return found


def share(found: Mapping[str, Sequence[int]]) -> float:
    """Of all kinds of tasks together."""
    return sum(solved for solved, _ in found.values()) / sum(asked for _, asked in found.values())


def curve_of(config: WordsConfig, method: str, folder: Path) -> list[list[float]]:
    """[samples drawn, held-out tasks solved] as a run went on; [] where it does not say."""
    if method in POLICY_GRADIENTS:
        rollout = getattr(config, method).rollout
        drawn = rollout.prompts * rollout.sampling.num_samples
        return [[record["step"] * drawn, record["score"]] for record in metrics.read(folder, "heldout")]
    if method in MEMORIES:
        rounds = rejection_run.read_rounds(folder)
        return [[record["round"] * config.rejection.samples, record["heldout"]["score"]] for record in rounds]
    return []


def report(config: WordsConfig, workdir: Path) -> None:
    """Print and write the table and the figure of all runs that are done."""
    begun = json.loads((workdir / START / RESULT).read_text())
    found = {
        method: [json.loads(path.read_text()) for path in sorted((workdir / method).glob(f"seed_*/{RESULT}"))]
        for method in config.methods
    }
    found = {method: runs for method, runs in found.items() if runs}
    require(bool(found), f"{workdir} has no finished run: do the stage `runs` first")
    samples = config.samples(config.methods[0])
    command = command_of("words")
    values = {"command": command, "samples": samples, "start": begun, "methods": found}
    write_json(workdir / "report.json", values)
    draw(begun, found, samples, workdir / "words.png")
    made = [table(config, begun, found, name, samples) for name in ("sampled", "greedy")]
    write_tables(workdir, "Word tasks", command, made)
    print(f"{workdir / 'report.md'}: these tables; words.png: the figure")


def table(config: WordsConfig, begun: Any, found: Mapping[str, Sequence[Any]], name: str, samples: int) -> Table:
    """Exact answers to held-out tasks, by kind and method."""

    def shares(results: Sequence[Any], kind: str) -> list[float]:
        return [share(result[name] if kind == "all" else {kind: result[name][kind]}) for result in results]

    kinds = ("all", *config.kinds)
    rows = [("the start", *(_mean(shares([begun], kind)) for kind in kinds), "")]
    for method, runs in found.items():
        gains = [each - share(begun[name]) for each in shares(runs, "all")]
        rows.append(
            (TITLES[method], *(_mean(shares(runs, kind)) for kind in kinds), f"+{_mean(gains)}".replace("+-", "-"))
        )
    headings = ("method", *kinds, "gain")
    how = "one sample of each at temperature 1" if name == "sampled" else "greedy"
    seeds = max(map(len, found.values()))
    spread = f"mean ± standard error of {seeds} seeds" if seeds > 1 else "one seed"
    notes = (f"{samples:,} samples each; {spread}.",)
    return Table(f"Held-out tasks solved (%), {how}", headings, tuple(rows), frozenset(headings[1:]), notes)


def _mean(values: Sequence[float]) -> str:
    """In percent, with the standard error if there are several."""
    text = f"{100 * np.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {100 * np.std(values, ddof=1) / math.sqrt(len(values)):.1f}"


def draw(begun: Any, found: Mapping[str, Sequence[Any]], samples: int, path: Path) -> None:
    """Held-out tasks solved over the samples drawn: the mean of the seeds, and its standard error as a band."""
    with figure(path, 8.5, 4.2, "Held-out tasks solved, by samples drawn") as axes:
        axes.axhline(100 * share(begun["sampled"]), color=SERIES[0], linewidth=0.8, linestyle=":", label="the start")
        for number, (method, runs) in enumerate(found.items()):
            colour = SERIES[1 + number % (len(SERIES) - 1)]
            curves = [run["curve"] or [[samples, share(run["sampled"])]] for run in runs]
            drawn = [point[0] for point in curves[0]]
            values = 100 * np.array([[point[1] for point in curve] for curve in curves])
            errors = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0 * values[0]
            means = values.mean(axis=0)
            axes.errorbar(drawn, means, yerr=errors, fmt="o-", color=colour, markersize=3, label=TITLES[method])
        axes.set_xlabel("samples drawn")
        axes.set_ylabel("solved, one sample at temperature 1 (%)")
        legend_beside(axes)


def main(config: WordsConfig, workdir: Path) -> None:
    """Run what the flags name."""
    run(config, workdir, _STAGES.value, _ONLY.value)


if __name__ == "__main__":
    runner.main(main, WordsConfig, "configs/words/small.py", save_config=False)
