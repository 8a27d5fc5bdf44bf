"""Training a trained model further: loading it, the shared step and loop, resuming, and what is kept.

Fine-tuning, reward models and preference losses differ in their batches and their loss alone, which they hand over as
a `Task`. All parameters are trained, or low-rank adapters beside a frozen (perhaps quantised) model.

A run's folder is that of a model: `checkpoints` (with adapters: `adapters/checkpoints` until the end, when the merged
model is written), the tokenizer and its chat template; `best` holds the model of the lowest held-out loss.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from llm_jax import config as config_lib
from llm_jax import models
from llm_jax.alignment.config import FineTuneConfig
from llm_jax.config import DataConfig, ModelConfig, TrainConfig
from llm_jax.errors import UserError, require
from llm_jax.interop import pretrained
from llm_jax.interop.pretrained import Pretrained
from llm_jax.losses.weighted import LossOutput
from llm_jax.models import lora
from llm_jax.optim import schedules
from llm_jax.parallel import distributed, shares
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.scaling.flops import training_flops_per_token
from llm_jax.training import checkpoint, metrics, state, step, supervised
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.loop import Loop, Throughput
from llm_jax.training.state import Adapters, TrainState
from llm_jax.training.step import LossFunction

CONFIG, DATA, BEST, ADAPTERS = "config.json", "data.json", "best", "adapters"
# What may change when a run is continued; everything else decides its numbers.
CHANGEABLE = ("log_every", "eval_every", "keep_best", "attention", "remat", "offload")
CHANGEABLE_GROUPS = ("mesh", "checkpoint")
Evaluated = Callable[[TrainState, int, Mapping[str, float]], None]  # is told of an evaluation after a step


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run is trained on, and how it is judged."""

    loss: Callable[[ModelConfig], LossFunction]  # of a model's parameters
    batches: Callable[[int], Iterator[Any]]  # this process's rows from a step on, without end
    evaluate: Callable[[ModelConfig, Any], Mapping[str, float]]  # of a model; of its values, "loss" judges
    steps_per_epoch: int
    batch_size: int
    sequence_length: int
    fingerprint: str  # of the data
    show: Callable[[ModelConfig, Any, int], None] | None = None  # what a model says, when it is judged after a step

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch, padding included."""
        return self.batch_size * self.sequence_length


def fingerprint(arrays: Any) -> str:
    """What tells token data from others: a hash of all arrays and numbers in a tree, in order."""
    found = hashlib.sha256()
    for array in map(np.asarray, jax.tree.leaves(arrays)):
        found.update(str((array.shape, array.dtype)).encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def load(config: FineTuneConfig, mesh: Mesh, *, writes: bool = True) -> Pretrained:
    """The model that is trained further, its parameters in float32 on the mesh, with the run's settings.

    Raises `UserError` where there is none, and for a reward model, unless nothing is to be written by it.
    """
    require(config.model != "", "set --config.training.model to the model to begin with: a folder, a file or a name")
    changed: dict[str, Any] = {
        "dropout_rate": config.dropout_rate,
        "neftune_alpha": config.neftune_alpha,
        "compute_dtype": config.compute_dtype,
        "attention": config.attention,
        "remat": config.remat,
    }
    if config.max_length:
        changed["max_length"] = config.max_length
    model = pretrained.load(config.model, mesh=mesh, dtype="float32", **changed)
    require(
        not writes or model.config.output == "logits",
        f"{config.model} is a reward model, which writes nothing: name a language model",
    )
    return model


def build_mesh(config: FineTuneConfig) -> Mesh:
    """The mesh of this job's devices."""
    distributed.initialize()
    return mesh_lib.build(config.mesh)


class Part(NamedTuple):
    """What a run trains of a model: all of it, or adapters beside it."""

    config: ModelConfig  # of the parameters to compute with
    first: Callable[[], TrainState]  # the state before the first step
    abstract: TrainState
    optimizer: optax.GradientTransformationExtraArgs
    frozen: tuple[Any, ...]  # the parameters that are not trained
    attach: Callable[..., Any]  # (trained, *frozen) -> the parameters to compute with
    merge: Callable[..., Any]  # (trained, *frozen) -> the parameters to keep
    folder: str  # of the checkpoints, inside the run's


def train(config: FineTuneConfig, model: Pretrained, task: Task, workdir: Path, mesh: Mesh, whole: Any) -> bool:
    """Train until the last step or a signal to stop, continuing from the newest checkpoint; whether it came to its end.

    Args:
      config: the run's.
      model: as it begins; its parameters are given away.
      task: what it is trained on.
      workdir: the run's folder.
      mesh: where the parameters are.
      whole: the experiment's config, which the run's folder keeps and with which it may be continued.

    Raises:
      UserError: what `check` and the loop raise.
    """
    settings = check(config, model, task, workdir, mesh, whole)
    part = part_of(config, model, mesh)
    write_start(whole, model, task.fingerprint, workdir)
    with Checkpointer(workdir / part.folder, config.checkpoint, model.config, task.tokens_per_step) as checkpointer:
        current, start, _ = supervised.first_state(
            part.abstract,
            checkpointer,
            lambda step: checkpointer.restore(part.abstract, step) if step else part.first(),
            part.first,
        )
        with metrics.Recorder(workdir, start, settings.steps) as recorder:
            loop = _loop(settings, part, model, task, workdir, mesh, checkpointer, recorder, config.keep_best)
            current = loop.run(current, task.batches(start), start)
    finished = int(current.step) == settings.steps
    if part.folder and finished:
        checkpoint.replace_model(workdir, model.config, part.merge(current.params, *part.frozen), settings.steps)
    return finished


def check(config: FineTuneConfig, model: Pretrained, task: Task, workdir: Path, mesh: Mesh, whole: Any) -> TrainConfig:
    """The run that `train` would begin or continue with the same arguments, as the loop takes it.

    Raises `UserError` where the folder holds another run, the data has changed, or settings fit neither each other nor
    model, data and mesh.
    """
    check_folder(whole, task.fingerprint, workdir)
    stochastic = model.config.is_stochastic()
    microbatches = supervised.microbatches(task.batch_size, config.microbatches, mesh, stochastic)
    step.check_batch(task.batch_size, microbatches, mesh)
    settings = dataclasses.replace(_settings(config, model.config, task), microbatches=microbatches)
    schedules.learning_rate(settings.optimizer, settings.steps)  # refuses a warm-up that is too long
    return settings


def part_of(config: FineTuneConfig, model: Pretrained, mesh: Mesh) -> Part:
    """What a run of `config` trains of a model, whose parameters are given away."""
    return _adapters(config, model, mesh) if config.lora.rank else _everything(config, model, mesh)


def _everything(config: FineTuneConfig, model: Pretrained, mesh: Mesh) -> Part:
    optimizer = state.optimizer(model.config, config.optimizer)
    abstract = state.abstract_state(model.config, optimizer, mesh)

    def first() -> TrainState:
        return state.state_of(model.params, optimizer, abstract)

    return Part(model.config, first, abstract, optimizer, (), lambda params: params, lambda params: params, "")


def _adapters(config: FineTuneConfig, model: Pretrained, mesh: Mesh) -> Part:
    trained = Adapters(model.config, config.lora)
    optimizer = state.optimizer(trained, config.optimizer)
    base_config, base = model.config, model.params
    if config.quantize != "none":
        base_config, base = models.quantize(base, base_config, config.quantize, donate=True)

    def first() -> TrainState:
        fresh = state.init_state(trained, optimizer, mesh, jax.random.key(config.seed))
        heads = {name: jax.tree.map(jnp.copy, base[name]) for name in fresh.params if name == "reward_head"}
        return fresh._replace(params={**fresh.params, **heads})

    def merge(adapters: Any, base: Any) -> Any:
        whole = models.dequantize(base, base_config)[1] if config.quantize != "none" else base
        return lora.merge(whole, adapters, config.lora)

    return Part(
        base_config,
        first,
        state.abstract_state(trained, optimizer, mesh),
        optimizer,
        (base,),
        lambda adapters, base: lora.attach(base, adapters, config.lora),
        merge,
        ADAPTERS,
    )


def _loop(
    settings: TrainConfig,
    part: Part,
    model: Pretrained,
    task: Task,
    workdir: Path,
    mesh: Mesh,
    checkpointer: Checkpointer,
    recorder: metrics.Recorder,
    keep_best: bool,
) -> Loop:
    """The shared loop over the shared step."""
    loss_fn = task.loss(part.config)

    def loss_of_part(params: Any, batch: Any, key: jax.Array, *frozen: Any) -> LossOutput:
        return loss_fn(part.attach(params, *frozen), batch, key)

    update = jax.jit(step.update_function(loss_of_part, part.optimizer, settings.microbatches), donate_argnums=0)
    schedule = schedules.learning_rate(settings.optimizer, settings.steps)
    flops = training_flops_per_token(model.config, task.sequence_length)
    return Loop(
        config=settings,
        mesh=mesh,
        step_function=step.bind(update, step.seed_number(settings.seed), schedule, *part.frozen),
        evaluate=lambda params: task.evaluate(part.config, part.attach(params, *part.frozen)),
        checkpointer=checkpointer,
        recorder=recorder,
        throughput=Throughput(task.tokens_per_step, flops, metrics.peak_flops()),
        workdir=workdir,
        evaluated=_after_evaluation(part, task, keeper(part, model, workdir) if keep_best else None),
    )


def _after_evaluation(part: Part, task: Task, keep: Evaluated | None) -> Evaluated:
    def evaluated(state: TrainState, step: int, values: Mapping[str, float]) -> None:
        if task.show is not None:
            task.show(part.config, part.attach(state.params, *part.frozen), step)
        if keep is not None:
            keep(state, step, values)

    return evaluated


def keeper(part: Part, model: Pretrained, workdir: Path) -> Evaluated:
    """Keeps the model of the lowest held-out loss so far, those before the run was continued included."""

    def earlier(step: int) -> list[float]:
        return [record["loss"] for record in metrics.read(workdir, "heldout") if record["step"] < step]

    def evaluated(state: TrainState, step: int, values: Mapping[str, float]) -> None:
        if "loss" not in values:
            return
        if shares.from_first(lambda: bool(values["loss"] < min(earlier(step), default=math.inf))):
            if distributed.is_first():
                write_companions(model, workdir / BEST)
            checkpoint.replace_model(workdir / BEST, model.config, part.merge(state.params, *part.frozen), step)

    return evaluated


def check_folder(whole: Any, data: str, workdir: Path) -> None:
    """Raise `UserError` if `workdir` holds a run whose numbers this config, or data of this fingerprint, changes."""
    if not (workdir / CONFIG).exists():
        return
    try:
        before = config_lib.load(type(whole), workdir / CONFIG)
    except UserError as error:
        raise UserError(
            f"{workdir} holds another experiment's run, or a damaged {CONFIG}: choose another --workdir ({error})"
        ) from None
    old, new = _decisive(before), _decisive(whole)
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    differences = [f"{key} {old.get(key)} -> {new.get(key)}" for key in changed]
    require(
        not differences,
        f"{workdir} holds a run of another config ({', '.join(differences[:4])}); choose a new --workdir, or "
        "continue with the old settings",
    )
    path = workdir / DATA
    try:
        noted = json.loads(path.read_text()).get("fingerprint") if path.is_file() else data
    except (ValueError, AttributeError):
        raise UserError(f"{path} is damaged, so that its data cannot be told: choose a new --workdir") from None
    require(
        noted == data,
        f"{workdir} holds a run on other data: the files, the tokenizer or the chat template have changed since; "
        "choose a new --workdir",
    )


def _decisive(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings, flattened to dotted names, that a continued run must share with its beginning."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and field.name not in CHANGEABLE_GROUPS:
            flat |= _decisive(value, f"{prefix}{field.name}.")
        elif field.name not in CHANGEABLE + CHANGEABLE_GROUPS:
            flat[prefix + field.name] = value
    return flat


def write_start(whole: Any, model: Pretrained, data: str, workdir: Path) -> None:
    """What makes the folder a model's, and tells with what it may be continued: once, by the first process."""
    if distributed.is_first():
        write_companions(model, workdir)
        (workdir / DATA).write_text(json.dumps({"fingerprint": data}) + "\n")
        config_lib.save(whole, workdir / CONFIG)  # last: its presence says that the rest is there
    distributed.wait_for_all("finetune_start")


def write_companions(model: Pretrained, folder: Path) -> None:
    """What a model's folder holds beside its checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    model.tokenizer.save(folder)
    if model.chat_template:
        (folder / pretrained.TEMPLATE_FILE).write_text(model.chat_template, encoding="utf-8")


def _settings(config: FineTuneConfig, model: ModelConfig, task: Task) -> TrainConfig:
    """The run as the loop takes it."""
    steps = config.steps or max(1, math.ceil(config.epochs * task.steps_per_epoch))
    warmup = max(config.optimizer.warmup_steps, math.ceil(config.warmup_fraction * steps))
    return TrainConfig(
        steps=steps,
        seed=config.seed,
        microbatches=config.microbatches,
        log_every=config.log_every,
        eval_every=config.eval_every,
        model=model,
        loss=config.loss,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=warmup),
        mesh=config.mesh,
        data=DataConfig(sequence_length=task.sequence_length, batch_size=task.batch_size, seed=config.seed),
        checkpoint=config.checkpoint,
    )
