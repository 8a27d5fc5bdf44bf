"""Pre-train a decoder on a tokenised dataset: resumable at any step, on any mesh.

    python -m experiments.pretrain --config=configs/pretrain/small.py --workdir=runs/small \\
        --config.data.dataset=runs/data/dataset

Writes to --workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/ and the dataset's tokenizer. Run the
same command again to continue after a stop. A --workdir into which experiments.convert has imported a model begins with
that model.
"""

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from experiments import runner
from llm_jax import config as config_lib
from llm_jax import models
from llm_jax.config import EXECUTION_FIELDS, MeshConfig, TrainConfig
from llm_jax.data import identity, loader
from llm_jax.errors import require
from llm_jax.evaluation import perplexity
from llm_jax.optim import schedules
from llm_jax.parallel import distributed
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.scaling.flops import training_flops_per_token
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.training import language_model, metrics, state, step, supervised, together
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.loop import Loop, StopSignal, Throughput

# What may change when a run is continued; everything else decides its numbers.
CHANGEABLE = ("steps", "microbatches", "log_every", "eval_every", "eval_batches", "profile_start", "profile_steps")
CHANGEABLE_GROUPS = ("mesh", "checkpoint")
TOGETHER_MAY_DIFFER = ("seed", "data.seed", "optimizer.learning_rate")


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """The settings, flattened to dotted names, that a continued run must share with its beginning."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in CHANGEABLE + CHANGEABLE_GROUPS}
    values["model"] = {k: v for k, v in values["model"].items() if k not in EXECUTION_FIELDS}
    values["data"] = {k: v for k, v in values["data"].items() if k not in ("prefetch", "dataset")}
    if config.model.is_stochastic():
        values["microbatches"] = config.microbatches  # each draws its own numbers
    if not config.optimizer.decay_steps and config.optimizer.schedule != "constant":
        values["steps"] = config.steps  # the schedule ends with the run
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def check_workdir(config: TrainConfig, workdir: Path) -> None:
    """Raise `UserError` if `workdir` holds a run whose numbers `config` would not continue."""
    path = workdir / "config.json"
    if not path.exists():
        return
    old, new = _decisive(config_lib.load(TrainConfig, path)), _decisive(config)
    differences = [f"{k} {old.get(k)} -> {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]
    require(
        not differences,
        f"{workdir} holds a run of another config ({', '.join(differences[:4])}); choose a new --workdir, or "
        "continue with the old settings",
    )


def check_dataset(config: TrainConfig, info: loader.DatasetInfo, workdir: Path) -> None:
    """Raise `UserError` if the dataset has more token ids than the model, or is not the one the run began with."""
    require(
        info.vocab_size <= config.model.vocab_size,
        f"dataset {config.data.dataset} has a vocabulary of {info.vocab_size}, config.model.vocab_size is "
        f"{config.model.vocab_size}: set it to {info.vocab_size} or more",
    )
    require(
        identity.read(workdir) in (None, identity.of(info)),
        f"{workdir} holds a run on another dataset than {config.data.dataset}: choose a new --workdir, or continue "
        "with the old dataset",
    )


def record_start(config: TrainConfig, info: loader.DatasetInfo, workdir: Path) -> None:
    """Write the config, the dataset's identity and the tokenizer into `workdir`: once, by the first process."""
    if distributed.is_first():
        config_lib.save(config, workdir / "config.json")
        identity.write(info, workdir)
        tokenizers.copy(info.tokenizer, workdir)
    distributed.wait_for_all("record_start")


def heldout_evaluation(
    config: TrainConfig, info: loader.DatasetInfo, mesh: Mesh, together: bool = False
) -> Callable[[Any], Mapping[str, Any]]:
    """A function from parameters to held-out loss and bits per byte of every source, over `eval_batches` batches.

    Sources without held-out documents are left out. With `together`, parameters and values are those of several runs.
    """
    score = perplexity.scorer(config.model, config.loss, mesh, together)
    share = jax.process_index(), jax.process_count()

    def evaluate(params: Any) -> dict[str, Any]:
        values = {}
        nats: Any = 0.0
        tokens = 0.0
        for source, sizes in info.sources.items():
            batches = loader.heldout_batches(
                config.data, source, max_batches=config.eval_batches, process_index=share[0], process_count=share[1]
            )
            result = score(params, batches)
            if result.tokens:
                # All but the first token of a document are predicted; a part of them stands for as much of the text.
                predicted = sizes.heldout.tokens - sizes.heldout.documents
                values[f"loss/{source}"] = result.loss
                values[f"bits_per_byte/{source}"] = result.bits_per_byte(
                    sizes.heldout.text_bytes * result.tokens / predicted
                )
            nats, tokens = nats + result.nats, tokens + result.tokens
        return {"loss": perplexity.Heldout(nats, tokens).loss, **values} if tokens else {}

    return evaluate


def describe(config: TrainConfig, info: loader.DatasetInfo, mesh: Mesh) -> str:
    """What is about to run, in one line."""
    tokens = config.steps * tokens_per_step(config)
    return (
        f"{models.count_parameters(config.model):,} parameters, {config.steps:,} steps, {tokens:,} tokens "
        f"({tokens / info.tokens:.2f} epochs of {info.tokens:,}), mesh {dict(mesh.shape)}"
    )


def run(config: TrainConfig, workdir: Path) -> None:
    """Train until `config.steps`, continuing from the newest checkpoint in `workdir`."""
    require(config.data.dataset != "", "set --config.data.dataset to the folder that prepare_data wrote")
    distributed.initialize()
    mesh = mesh_lib.build(config.mesh)
    stochastic = config.model.is_stochastic()
    microbatches = supervised.microbatches(config.data.batch_size, config.microbatches, mesh, stochastic)
    step.check_batch(config.data.batch_size, microbatches, mesh)
    info = loader.describe(config.data)
    check_dataset(config, info, workdir)
    check_workdir(config, workdir)
    schedule = schedules.learning_rate(config.optimizer, config.steps)
    state.abstract_state(config.model, state.optimizer(config.model, config.optimizer), mesh)  # refuses misfits
    record_start(config, info, workdir)
    if distributed.is_first():
        print(describe(config, info, mesh))
    train(dataclasses.replace(config, microbatches=microbatches), workdir, mesh, info, schedule)


def open_checkpoints(config: TrainConfig, workdir: Path) -> Checkpointer:
    """The checkpoints of a run."""
    return Checkpointer(workdir, config.checkpoint, config.model, tokens_per_step(config))


def tokens_per_step(config: TrainConfig) -> int:
    """Tokens of a global batch."""
    return config.data.batch_size * config.data.sequence_length


def throughput(config: TrainConfig) -> Throughput:
    """The meter of a run's speed."""
    flops = training_flops_per_token(config.model, config.data.sequence_length)
    return Throughput(tokens_per_step(config), flops, metrics.peak_flops())


def first_state(config: TrainConfig, checkpointer: Checkpointer, mesh: Mesh) -> tuple[state.TrainState, int]:
    """The state of the newest checkpoint that is whole, and its step; without one, of step 0."""
    optimizer = state.optimizer(config.model, config.optimizer)
    abstract = state.abstract_state(config.model, optimizer, mesh)

    def read(step: int) -> state.TrainState:
        if not checkpointer.is_model_alone(step):
            return checkpointer.restore(abstract, step)
        print("beginning with the model of the checkpoint in the run's folder")
        return state.state_of(checkpointer.restore_params(abstract, step), optimizer, abstract)

    current, start, source = supervised.first_state(
        abstract,
        checkpointer,
        read,
        lambda: state.init_state(config.model, optimizer, mesh, jax.random.key(config.seed)),
    )
    if start and distributed.is_first():
        print(f"continuing from step {start} of {source}")
    return current, start


def train(
    config: TrainConfig, workdir: Path, mesh: Mesh, info: loader.DatasetInfo, schedule: schedules.Schedule
) -> None:
    """Restore or initialise the state, and run the loop."""
    optimizer = state.optimizer(config.model, config.optimizer)
    update = language_model.compiled_update(config.model, config.loss, optimizer, config.microbatches, mesh)
    with open_checkpoints(config, workdir) as checkpointer:
        current, start = first_state(config, checkpointer, mesh)
        batches = loader.train_batches(
            config.data, start_step=start, process_index=jax.process_index(), process_count=jax.process_count()
        )
        with metrics.Recorder(workdir, start, config.steps) as recorder:
            Loop(
                config=config,
                mesh=mesh,
                step_function=step.bind(update, step.seed_number(config.seed), schedule),
                evaluate=heldout_evaluation(config, info, mesh),
                checkpointer=checkpointer,
                recorder=recorder,
                throughput=throughput(config),
                workdir=workdir,
            ).run(current, batches, start)


def run_together(configs: Sequence[TrainConfig], workdirs: Sequence[Path]) -> None:
    """Train several runs of one shape in one compiled step, each in its own folder, with the results of `run`.

    The configs may differ in `seed`, `data.seed` and `optimizer.learning_rate`. All runs share one device of one
    process. Each is continued from its newest checkpoint; those at the same step advance together, finished ones are
    left out. A run that diverges is stopped, and the others go on. A single config is passed to `run`.

    Raises:
      UserError: the configs differ in more, or ask for a mesh of several devices; what `run` refuses of one of them;
        and, after all others are finished and saved, runs that diverged. After a signal to stop, none of these.
    """
    require(len(configs) == len(workdirs), f"{len(configs)} configs for {len(workdirs)} folders")
    if len(configs) == 1:
        return run(configs[0], workdirs[0])
    check_alike(configs, workdirs)
    mesh = mesh_lib.build(MeshConfig(), jax.local_devices()[:1])
    info = loader.describe(configs[0].data)
    for config, workdir in zip(configs, workdirs):
        check_dataset(config, info, workdir)
        check_workdir(config, workdir)
        schedules.learning_rate(config.optimizer, config.steps)  # refuses a warm-up that is too long
    for config, workdir in zip(configs, workdirs):
        record_start(config, info, workdir)
    print(f"{len(configs)} runs together, each of {describe(configs[0], info, mesh)}")
    failures: dict[str, str] = {}
    with StopSignal() as stop:
        for start, members in _by_step(configs, workdirs).items():
            if not stop.requested:
                runs = [configs[i] for i in members], [workdirs[i] for i in members]
                failures |= _train_group(*runs, mesh, info, start)
    if stop.requested:  # a run that diverged will do so again when the others go on
        return
    listed = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
    require(not failures, f"{len(failures)} of {len(configs)} runs trained together diverged: {listed}")


def check_alike(configs: Sequence[TrainConfig], workdirs: Sequence[Path]) -> None:
    """Raise `UserError` unless these runs can be trained in one compiled step."""
    require(len(set(workdirs)) == len(workdirs), "runs trained together need a folder each")
    first = _shape(configs[0])
    for config, workdir in zip(configs, workdirs):
        shape = _shape(config)
        differences = [f"{key} {first[key]} and {shape[key]}" for key in first if first[key] != shape[key]]
        require(
            not differences,
            f"{workdirs[0]} and {workdir} cannot be trained together: they differ in {', '.join(differences[:4])}; "
            f"only {', '.join(TOGETHER_MAY_DIFFER)} may differ",
        )
    mesh = configs[0].mesh
    require(
        mesh.replica * mesh.tensor * max(mesh.data, 1) == 1 and jax.process_count() == 1,
        f"runs trained together share one device of one process, but config.mesh is {dataclasses.asdict(mesh)} in "
        f"{jax.process_count()} processes: train them one by one",
    )
    require(not configs[0].profile_steps, "runs trained together are not profiled: set config.profile_steps=0")
    require(configs[0].data.dataset != "", "set config.data.dataset to the folder that prepare_data wrote")


def _shape(config: TrainConfig) -> dict[str, Any]:
    """All settings, by dotted name, that runs trained together share."""
    keys = [key for key, hint in config_lib.keys(TrainConfig) if not dataclasses.is_dataclass(hint)]
    return {key: operator.attrgetter(key)(config) for key in keys if key not in TOGETHER_MAY_DIFFER}


def _by_step(configs: Sequence[TrainConfig], workdirs: Sequence[Path]) -> dict[int, list[int]]:
    """The unfinished runs by the step of their newest checkpoint."""
    groups: dict[int, list[int]] = {}
    for i, (config, workdir) in enumerate(zip(configs, workdirs)):
        with open_checkpoints(config, workdir) as checkpointer:
            start = checkpointer.latest_step() or 0
        if start < config.steps:
            groups.setdefault(start, []).append(i)
    return groups


def _train_group(
    configs: Sequence[TrainConfig],
    workdirs: Sequence[Path],
    mesh: Mesh,
    info: loader.DatasetInfo,
    start: int,
) -> dict[str, str]:
    """Train runs from one step to their end, or until they are asked to stop; why each that diverged did so."""
    first = configs[0]
    optimizer = state.optimizer(first.model, first.optimizer)
    with contextlib.ExitStack() as stack:
        checkpointers = [stack.enter_context(open_checkpoints(*run)) for run in zip(configs, workdirs)]
        states = [first_state(*run, mesh) for run in zip(configs, checkpointers)]
        fallen = [str(workdir) for (_, step), workdir in zip(states, workdirs) if step != start]
        require(
            not fallen, f"the newest checkpoint of {', '.join(fallen)} was damaged: start again from the one before"
        )
        current = together.stack([one for one, _ in states])
        recorders = [
            stack.enter_context(metrics.Recorder(workdir, start, first.steps, shows=workdir == workdirs[0]))
            for workdir in workdirs
        ]
        runs = together.Runs([str(workdir) for workdir in workdirs], recorders, checkpointers)
        step_function = together.step_function(
            first.model,
            first.loss,
            optimizer,
            [config.seed for config in configs],
            [schedules.learning_rate(config.optimizer, config.steps) for config in configs],
            microbatches=first.microbatches,
        )
        data = {config.data.seed: config.data for config in configs}
        batches = together.stacked_batches(
            [config.data.seed for config in configs], lambda seed: loader.train_batches(data[seed], start_step=start)
        )
        loop = Loop(
            config=first,
            mesh=mesh,
            step_function=step_function,
            evaluate=heldout_evaluation(first, info, mesh, together=True),
            checkpointer=runs,
            recorder=runs,
            throughput=throughput(first),
            workdir=workdirs[0],
            check=runs.check,
        )
        with contextlib.suppress(together.NoneLeftError):
            loop.run(current, batches, start)
        return runs.failures


if __name__ == "__main__":
    runner.main(run, TrainConfig, "configs/pretrain/small.py", save_config=False)
