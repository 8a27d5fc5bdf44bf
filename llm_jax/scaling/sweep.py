"""Sweeps: the trials of a grid, which of them train in one compiled step, and what came of them.

A trial is an ordinary pre-training run in a folder of its own, named after it; a finished one is recognised by what
that run wrote there.
"""

import ast
import dataclasses
import functools
import itertools
import json
import math
import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax import config as config_lib
from llm_jax.config import EXECUTION_FIELDS, DataConfig, ModelConfig, TrainConfig
from llm_jax.data import identity, loader
from llm_jax.data.records import SUMMARY
from llm_jax.errors import UserError, require
from llm_jax.optim import schedules
from llm_jax.scaling import flops
from llm_jax.scaling.config import GridConfig, LauncherConfig, ScalingConfig, SizeConfig
from llm_jax.scaling.trial import CONFIG, FAILURE, Trial, TrialResult
from llm_jax.training import checkpoint, metrics

LOGS = 20  # of a short trial's training loss; a long one logs as often as the base
# What the grid sets for each trial, and `vary` therefore cannot.
GRID_KEYS = ("steps", "seed", "data.seed", "eval_every", "model.hidden_size", "model.num_layers", "model.num_heads")
# Settings in which a finished run may differ from its trial: they do not decide its numbers.
INDIFFERENT = (
    *("microbatches", "log_every", "eval_every", "profile_start", "profile_steps", "data.dataset", "data.prefetch"),
    *(f"model.{field}" for field in EXECUTION_FIELDS),
)
INDIFFERENT_GROUPS = ("mesh.", "checkpoint.")


class UnfinishedError(UserError):
    """A trial that has not been trained to its end; training it again would go on from where it stopped."""


def expand(config: ScalingConfig, learning_rates: Mapping[str, float] = {}) -> tuple[list[Trial], list[str]]:
    """The trials of a study's grid: sizes x budgets x varied keys x seeds, each with the base run's other settings.

    Args:
      config: the study.
      learning_rates: the peak of each size, by its name; the base's for the rest, and where `vary` sets it.

    Returns:
      The trials, and a line for every size, trial or group of trials that was left out, saying why.

    Raises:
      UserError: no trial is left, or `vary` names a key that does not exist or that the grid sets.
    """
    grid = config.grid
    trials: list[Trial] = []
    problems: list[str] = []
    for name, variation, base in _bases(config, learning_rates, problems):
        for budget, tokens in _budgets(grid, base):
            try:
                trials += _seeds(config, base, name, budget, tokens, variation)
            except UserError as error:
                problems.append(f"{_trial_name(name, budget, variation, None)} is left out: {error}")
    trials = _within_limits(trials, grid, problems)
    trials = _distinct(trials, problems)
    require(bool(trials), f"the grid has no trials: {problems[0] if problems else _what_is_missing(grid)}")
    return trials, problems


def _bases(
    config: ScalingConfig, learning_rates: Mapping[str, float], problems: list[str]
) -> Iterator[tuple[str, dict[str, Any], TrainConfig]]:
    """Every size's name with every combination of varied keys, and the base run with both of them."""
    variations = _variations(config.grid.vary)
    seen: set[str] = set()
    for size in config.grid.sizes:
        name = size_name(size)
        if name in seen:
            problems.append(f"size {name} is listed twice: only the first one is trained")
            continue
        seen.add(name)
        try:
            model = sized(config.base.model, size)
        except UserError as error:
            problems.append(f"size {name} is left out: {error}")
            continue
        for variation in variations:
            try:
                varied = _varied(config, model, variation, learning_rates.get(name))
                if "eval_batches" not in variation:
                    varied = _scored_alike(config.base, varied, f"size {name}{_in_words(variation)}", problems)
                yield name, variation, varied
            except UserError as error:
                problems.append(f"size {name}{_in_words(variation)} is left out: {error}")


def size_name(size: SizeConfig) -> str:
    """The size's name; of its width and depth where it has none."""
    return size.name or f"d{size.hidden_size}l{size.num_layers}"


def sized(model: ModelConfig, size: SizeConfig) -> ModelConfig:
    """The base's model at another size. Raises `UserError` if its heads do not divide its width."""
    changes = {field.name: getattr(size, field.name) for field in dataclasses.fields(size) if field.name != "name"}
    width, heads = size.hidden_size or model.hidden_size, size.num_heads or model.num_heads
    if size.num_heads:
        changes["num_kv_heads"] = size.num_kv_heads or heads
    if (size.hidden_size or size.num_heads) and not size.head_dim:
        require(
            width % heads == 0,
            f"hidden_size={width} is not a multiple of num_heads={heads}: change one of them, or set head_dim",
        )
        changes["head_dim"] = width // heads
    return dataclasses.replace(model, **{name: value for name, value in changes.items() if value})


def _what_is_missing(grid: GridConfig) -> str:
    if not grid.sizes:
        return "set config.grid.sizes"
    return "set config.grid.tokens, config.grid.compute or config.grid.tokens_per_parameter"


def _variations(vary: Sequence[str]) -> list[dict[str, Any]]:
    """All combinations of the varied keys' values."""
    choices: dict[str, list[Any]] = {}
    known = [key for key, _ in config_lib.keys(TrainConfig)]
    for entry in vary:
        key, equals, values = entry.partition("=")
        key = key.strip()
        require(bool(equals and values), f"config.grid.vary: {entry!r} should read KEY=VALUE,VALUE")
        if key not in known:
            raise UserError(f"config.grid.vary: {config_lib.unknown_key(key, known)}")
        require(key not in GRID_KEYS, f"config.grid.vary: {key} follows from the grid's sizes, budgets and seeds")
        require(key not in choices, f"config.grid.vary: {key} is listed twice")
        choices[key] = [_value(text.strip()) for text in values.split(",")]
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def _value(text: str) -> Any:
    """A number or a truth value where the text is one, else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float) else text


def _varied(config: ScalingConfig, model: ModelConfig, variation: Mapping[str, Any], rate: float | None) -> TrainConfig:
    """The base run with one size's model, its learning rate, and one combination of the varied keys."""
    values = dataclasses.asdict(config.base)
    values["model"] = dataclasses.asdict(model)
    if config.learning_rate.rule == "mup":
        values["model"]["mup_base_width"] = config.learning_rate.mup_base_width
    if rate is not None:
        values["optimizer"]["learning_rate"] = rate
    for key, value in variation.items():
        *groups, name = key.split(".")
        group = values
        for part in groups:
            group = group[part]
        group[name] = value
    return config_lib.from_config_dict(TrainConfig, values)


def _scored_alike(base: TrainConfig, varied: TrainConfig, label: str, problems: list[str]) -> TrainConfig:
    """The varied run, scored on as much held-out text as the base in batches of its own size."""
    wanted, per_batch = (c.data.batch_size * c.data.sequence_length for c in (base, varied))
    wanted *= base.eval_batches
    batches = max(1, round(wanted / per_batch))
    if batches * per_batch != wanted:
        problems.append(
            f"{label} is scored on {batches * per_batch:,} tokens of held-out text instead of {wanted:,}: choose "
            "config.base.eval_batches so that its batches divide them"
        )
    return dataclasses.replace(varied, eval_batches=batches)


def _budgets(grid: GridConfig, base: TrainConfig) -> Iterator[tuple[str, float]]:
    """Each budget's part of a trial's name, and its training tokens."""
    for tokens in grid.tokens:
        yield f"{_short(tokens)}tokens", tokens
    per_token = flops.training_flops_per_token(base.model, base.data.sequence_length)
    for compute in grid.compute:
        yield _short(compute), compute / per_token
    parameters = flops.count(base.model).total
    for ratio in grid.tokens_per_parameter:
        yield f"{_short(ratio)}x", ratio * parameters


def _short(value: float) -> str:
    """20, 2.5e12: as few characters as tell the value exactly enough for a name."""
    if value < 1e6:
        return f"{value:.12g}"
    mantissa, exponent = f"{value:.12e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _seeds(
    config: ScalingConfig, base: TrainConfig, size: str, budget: str, tokens: float, variation: Mapping[str, Any]
) -> Iterator[Trial]:
    """One trial per seed, or one alone where its compute is above the grid's limit for more."""
    per_step = base.data.batch_size * base.data.sequence_length
    steps = round(tokens / per_step)
    require(
        steps > 0, f"its {tokens:,.0f} tokens are less than a step of {per_step:,}: lower config.base.data.batch_size"
    )
    optimizer = base.optimizer
    if config.warmup_fraction:
        optimizer = dataclasses.replace(optimizer, warmup_steps=round(config.warmup_fraction * steps))
    schedules.learning_rate(optimizer, steps)  # refuses a warm-up that is longer than the trial
    compute = flops.training_flops(base.model, base.data.sequence_length, steps * per_step)
    limit = config.grid.seeds_up_to
    for seed in config.grid.seeds if not limit or compute <= limit else config.grid.seeds[:1]:
        trained = dataclasses.replace(
            base,
            steps=steps,
            seed=seed,
            log_every=max(1, min(base.log_every, steps // LOGS)),
            eval_every=math.ceil(steps / config.curve_points),
            optimizer=optimizer,
            data=dataclasses.replace(base.data, seed=seed),
        )
        varied = tuple(f"{key}={value}" for key, value in variation.items())
        yield Trial(_trial_name(size, budget, variation, seed), size, trained, varied)


def _trial_name(size: str, budget: str, variation: Mapping[str, Any], seed: int | None) -> str:
    """Readable, and safe as a folder's name: d64-1e12-weight_decay=0.1-s0."""
    last = [key.rpartition(".")[2] for key in variation]
    keys = [short if last.count(short) == 1 else key for short, key in zip(last, variation)]
    parts = [size, budget, *(f"{key}={value}" for key, value in zip(keys, variation.values()))]
    parts += [] if seed is None else [f"s{seed}"]
    return re.sub(r"[^\w.=+-]", "_", "-".join(parts)).lstrip(".")


def _in_words(variation: Mapping[str, Any]) -> str:
    return "".join(f", {key}={value}" for key, value in variation.items())


def _within_limits(trials: list[Trial], grid: GridConfig, problems: list[str]) -> list[Trial]:
    """The trials that see neither too few nor too many tokens per parameter; one line counts the others."""
    low, high = grid.least_tokens_per_parameter, grid.most_tokens_per_parameter or math.inf
    ratios = {trial.name: trial.tokens / flops.count(trial.config.model).total for trial in trials}
    outside = [trial.name for trial in trials if not low <= ratios[trial.name] <= high]
    if outside:
        examples = ", ".join(f"{name} ({ratios[name]:.3g})" for name in outside[:3])
        more = ", ..." if len(outside) > 3 else ""
        problems.append(f"{len(outside)} trials outside {low:g} to {high:g} tokens per parameter: {examples}{more}")
    return [trial for trial in trials if trial.name not in outside]


def _distinct(trials: list[Trial], problems: list[str]) -> list[Trial]:
    """The trials without repetitions of a config or a name; a line for each of these."""
    by_config: dict[str, str] = {}
    names: set[str] = set()
    kept = []
    for trial in trials:
        first = by_config.setdefault(_identity(trial.config), trial.name)
        if first != trial.name:
            problems.append(f"{trial.name} is left out: it is the same run as {first}")
        elif trial.name in names:
            problems.append(f"{trial.name} is left out: another trial has the same name")
        else:
            names.add(trial.name)
            kept.append(trial)
    return kept


def _identity(config: TrainConfig) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


# Trials in one compiled step


def together(trials: Sequence[Trial], launcher: LauncherConfig) -> list[list[Trial]]:
    """Groups of trials that train in one compiled step: they differ in their seeds and learning rate alone.

    A group holds at most `launcher.together` trials, none of more than `launcher.together_up_to` FLOPs, and the groups
    of one shape are as equal as can be. Trials that use several devices or processes train alone, as those do whose
    mesh takes all devices where the launcher gives a trial several: set `mesh.data=1` for one device each.
    """
    shapes: dict[str, list[Trial]] = {}
    for trial in trials:
        shapes.setdefault(trial.name if _is_alone(trial, launcher) else _shape(trial.config), []).append(trial)
    groups = []
    for members in shapes.values():
        count = math.ceil(len(members) / launcher.together)
        groups += [members[i * len(members) // count : (i + 1) * len(members) // count] for i in range(count)]
    return groups


def _is_alone(trial: Trial, launcher: LauncherConfig) -> bool:
    mesh = trial.config.mesh
    processes = launcher.nodes * launcher.tasks_per_node if launcher.kind == "slurm" else 1
    large = bool(launcher.together_up_to) and trial.compute > launcher.together_up_to
    all_devices = mesh.data == -1 and launcher.gpus_per_node > 1
    return large or processes > 1 or all_devices or mesh.replica * mesh.tensor * max(mesh.data, 1) > 1


def _shape(config: TrainConfig) -> str:
    """What the trials of a group share: all but the seeds and the learning rate."""
    data = dataclasses.replace(config.data, seed=0)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1.0)
    return _identity(dataclasses.replace(config, seed=0, data=data, optimizer=optimizer))


# What came of them


def collect(trials: Sequence[Trial], folder: Path, failed: Collection[str] = ()) -> tuple[list[TrialResult], list[str]]:
    """The results of the finished trials, and a line for every other one but the `failed`; see `result`.

    One more line for each dataset that is gone, so that `unique_tokens` cannot be known.
    """
    results, problems, gone = [], [], set()
    for trial in trials:
        if trial.name in failed:
            continue
        try:
            results.append(result(trial, folder))
        except UserError as error:
            problems.append(str(error))
        else:
            data = trial.config.data
            gone |= {data.dataset} if data.dataset and _dataset(data) is None else set()
    problems += [f"no whole dataset at {each}: its trials count as if they read no text twice" for each in sorted(gone)]
    return results, problems


def result(trial: Trial, folder: Path) -> TrialResult:
    """What came of a trial, from the run in `folder / trial.name`; `unique_tokens` from its dataset, if that is there.

    Raises:
      UnfinishedError: the run is not at its end.
      UserError: the folder holds another run or one on another dataset, the loss diverged, or its metrics are damaged
        or were edited.
    """
    records = heldout_records(trial, folder)
    config, length = trial.config, trial.config.data.sequence_length
    parameters = flops.count(config.model)
    return TrialResult(
        name=trial.name,
        size=trial.size,
        model=config.model,
        sequence_length=length,
        parameters=parameters.total,
        non_embedding_parameters=parameters.non_embedding,
        tokens=trial.tokens,
        unique_tokens=_unique_tokens(trial),
        compute=trial.compute,
        learning_rate=config.optimizer.learning_rate,
        seed=config.seed,
        loss=records[-1]["loss"],
        curve=tuple((int(record["tokens"]), record["loss"]) for record in records),
        varied=trial.varied,
    )


def heldout_records(trial: Trial, folder: Path) -> list[dict[str, float]]:
    """The held-out evaluations of a finished trial, the last one at its end. Raises as `result` does."""
    run = folder / trial.name
    stored = stored_config(trial, folder)
    _check_dataset(trial, run)
    if stored is None or not (run / metrics.FILE).is_file():
        raise UnfinishedError(f"{trial.name} is not trained yet: no run in {run}{_failure(run)}")
    try:
        records, failed = metrics.read(run, "heldout"), metrics.read(run, metrics.FAILED)
        steps = [int(record["step"]) for record in records]
        finite = all(math.isfinite(record["loss"]) and record["loss"] > 0 for record in records)
        tokens = [int(record["tokens"]) for record in records]
        diverged = [int(record["step"]) for record in failed]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        missing = "no held-out text in its dataset" if error.args == ("loss",) else "lines that are no records"
        raise _incomplete(trial, run, missing) from None
    if diverged:
        raise UserError(
            f"{trial.name} diverged at step {diverged[0]}: lower its learning rate, or delete {run} to train it again"
        )
    require(finite, f"{trial.name} diverged: a loss in {run / metrics.FILE} is not a positive number")
    if steps != _evaluated(stored):
        last = steps[-1] if steps else 0
        raise _incomplete(trial, run, f"evaluations up to step {last} of {stored.steps}, {len(steps)} in all")
    per_step = trial.tokens // trial.config.steps
    require(
        tokens == [step * per_step for step in steps],
        f"{trial.name}: {run / metrics.FILE} was edited: its tokens are not those of its steps; delete {run} to train "
        "it again",
    )
    return records


def stored_config(trial: Trial, folder: Path) -> TrainConfig | None:
    """The config of the run in a trial's folder; None where there is none. `UserError` if it is another trial's."""
    path = folder / trial.name / CONFIG
    if not path.exists():
        return None
    stored = config_lib.load(TrainConfig, path)
    differing = [
        f"{key} {old} instead of {new}"
        for (key, old), new in zip(_decisive(stored).items(), _decisive(trial.config).values())
        if old != new
    ]
    require(
        not differing,
        f"{trial.name}: {path} is of another run ({', '.join(differing[:3])}): choose another --workdir, or delete "
        "that folder",
    )
    return stored


def _check_dataset(trial: Trial, run: Path) -> None:
    """Raise `UserError` if a run was trained on another dataset than its trial names, wherever these lie."""
    noted, info = identity.read(run), _dataset(trial.config.data)
    require(
        info is None or noted in (None, identity.of(info)),
        f"{trial.name}: {run} was trained on another dataset than {trial.config.data.dataset}: choose another "
        "--workdir, or delete that folder",
    )


def _unique_tokens(trial: Trial) -> int:
    """How many different tokens a trial reads: of each source its share, but no more than there are."""
    info = _dataset(trial.config.data)
    if info is None:
        return trial.tokens
    return round(sum(min(s * trial.tokens, info.sources[name].train.tokens) for name, s in info.weights.items()))


def _dataset(data: DataConfig) -> loader.DatasetInfo | None:
    """A trial's dataset; None where it is gone or damaged, which does not matter to finished trials."""
    try:
        changed = (Path(data.dataset) / SUMMARY).stat().st_mtime_ns
        return _described(data.dataset, tuple(data.weights.items()), changed)
    except (OSError, UserError):
        return None


@functools.lru_cache
def _described(dataset: str, weights: tuple[tuple[str, float], ...], changed: int) -> loader.DatasetInfo:
    """The dataset as it was when it had last `changed`."""
    return loader.describe(DataConfig(dataset=dataset, weights=dict(weights)))


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's numbers, by dotted name."""
    leaves = [key for key, hint in config_lib.keys(TrainConfig) if not dataclasses.is_dataclass(hint)]
    chosen = [key for key in leaves if key not in INDIFFERENT and not key.startswith(INDIFFERENT_GROUPS)]
    return {key: operator.attrgetter(key)(config) for key in chosen}


def _evaluated(config: TrainConfig) -> list[int]:
    """The steps after which a run is evaluated."""
    every = config.eval_every or config.steps
    return sorted({*range(every, config.steps + 1, every), config.steps})


def _incomplete(trial: Trial, run: Path, found: str) -> UserError:
    """Unfinished, or a finished run whose record has been damaged: its last checkpoint tells."""
    where = run / metrics.FILE
    if (run / checkpoint.FOLDER / str(trial.config.steps)).exists():
        return UserError(f"{trial.name}: {where} is damaged or was edited ({found}): delete {run} to train it again")
    return UnfinishedError(f"{trial.name} is unfinished: {where} has {found}{_failure(run)}")


def _failure(run: Path) -> str:
    """ "; REASON" of a trial's last try, where that failed."""
    path = run / FAILURE
    lines = path.read_text().splitlines() if path.exists() else []
    return f"; its last try failed: {lines[0]}" if lines else ""
