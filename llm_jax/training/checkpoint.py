"""Checkpoints through Orbax: asynchronous, atomic, self-describing, verified, restored onto any mesh.

A checkpoint holds four items: `params`, `training` (the optimiser's state), `config` (the model's configuration as
JSON, so that a model can be loaded without its run) and `integrity` (the fingerprint of every array). Every process of
a job writes and reads its own shards, of which it alone needs to hold the whole.
"""

import dataclasses
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from llm_jax import models
from llm_jax.config import CheckpointConfig, ModelConfig, from_config_dict
from llm_jax.errors import UserError, require
from llm_jax.parallel import distributed, rules, shares
from llm_jax.training.fingerprint import differing, fingerprints
from llm_jax.training.state import TrainState

logger = logging.getLogger(__name__)
T = TypeVar("T")
FOLDER = "checkpoints"
PUBLISHED = "published"  # a folder for each: PUBLISHED/220B is a run's folder whose only checkpoint is that one
DAMAGED = "damaged"  # where checkpoints that cannot be used are moved
# Errors of reading that are no damage; TensorStore has their words in errors of its own.
NAMES = "EIO ENOSPC EDQUOT EACCES EPERM ENOMEM EMFILE ENFILE ESTALE ETIMEDOUT EBUSY EINTR EAGAIN ENOTCONN EHOSTDOWN"
PASSING = frozenset(getattr(errno, name) for name in NAMES.split())
UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


class DamagedError(UserError):
    """A checkpoint that cannot be read, or that has other values than were written."""


@dataclasses.dataclass(frozen=True)
class Publication:
    """Which checkpoints are published: the first at, or after, every so many tokens; a policy of Orbax's too."""

    every_tokens: int  # 0 = none
    tokens_per_step: int
    every_steps: int  # that a checkpoint is written
    keep: int  # 0 = all of them
    folder: Path  # of those that are published

    def tokens(self, step: int) -> int:
        """The multiple of `every_tokens` that a checkpoint is published for; 0 for one that is not."""
        if not self.every_tokens or step % self.every_steps:
            return 0
        passed, before = (s * self.tokens_per_step // self.every_tokens for s in (step, step - self.every_steps))
        return passed * self.every_tokens if passed > before else 0

    def kept(self, steps: Iterable[int]) -> list[int]:
        """Those of the steps that are published and stay so, also if it was under other settings than now."""
        linked = {link.name for link in self.folder.glob(f"*/{FOLDER}/*")}
        return [step for step in sorted(steps) if self.tokens(step) or str(step) in linked][-self.keep :]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question of every checkpoint whether it stays."""
        kept = self.kept(info.step for info in checkpoints)
        return [info.step in kept for info in checkpoints]


class Checkpointer:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last write."""

    def __init__(self, workdir: Path, config: CheckpointConfig, model: ModelConfig, tokens_per_step: int) -> None:
        self._publication = Publication(
            config.keep_every_tokens, tokens_per_step, config.every_steps, config.keep_published, workdir / PUBLISHED
        )
        policies = [checkpoint_managers.LatestN(config.keep_last), self._publication]
        self.config = config
        self._model = model
        self._workdir = workdir
        self._manager = _manager(
            workdir / FOLDER,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind is None or jax.process_count() == 1:  # else the others may never come to the end of a write
            self.wait()
            self._manager.close()

    def save(self, state: TrainState, step: int) -> None:
        """Start writing the state; the copy is taken now, so the state may be donated at once. Saved steps are kept."""
        if step in self._manager.all_steps():
            return
        training = {"step": state.step, "opt_state": state.opt_state}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                training=ocp.args.StandardSave(training),
                config=ocp.args.JsonSave(dataclasses.asdict(self._model)),
                integrity=_integrity(params=state.params, training=training),
            ),
        )
        self._publish(without=step)

    def wait(self) -> None:
        """Block until everything saved so far is whole on disk."""
        self._manager.wait_until_finished()
        self._publish()

    def _publish(self, without: int | None = None) -> None:
        """Give the published checkpoints that are whole on disk their folders, and take those away that have gone."""
        if not distributed.is_first():
            return
        steps = [step for step in self._publication.kept(self._manager.all_steps()) if step != without]
        names = {_amount(tokens): step for step in steps if (tokens := self._publication.tokens(step))}
        for name, step in names.items():
            _publish(self._workdir, name, step)
        for folder in (self._workdir / PUBLISHED).glob("*"):
            if folder.name not in names and not any(link.exists() for link in (folder / FOLDER).glob("*")):
                shutil.rmtree(folder)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def newest(self, read: Callable[[int], T]) -> tuple[T, int] | None:
        """What `read` makes of the newest checkpoint's step, and that step; None without a checkpoint.

        Where that raises `DamagedError` and an earlier checkpoint does not, the later ones are moved to `DAMAGED`, with
        a warning. Raises the first error if no checkpoint can be read.
        """
        found, damaged = _newest(self._manager.all_steps(), read)
        for step, error in damaged.items():
            logger.warning("%s: moved to %s", error, self._workdir / DAMAGED)
            if distributed.is_first():
                _move_away(self._step(step), self._workdir / DAMAGED)
        if damaged:
            distributed.wait_for_all("damaged checkpoints")
            self._manager.reload()
        return found

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state at `step`, in the layout of `abstract`.

        Raises `UserError` if it is another model's, and `DamagedError` if it is not what was written.
        """
        _check_architecture(_read_config(self._step(step)), self._model, str(self._manager.directory))
        training = {"step": abstract.step, "opt_state": abstract.opt_state}
        restored = _restore(self._step(step), params=abstract.params, training=training)
        return TrainState(restored["training"]["step"], restored["params"], restored["training"]["opt_state"])

    def _step(self, step: int) -> Path:
        return Path(self._manager.directory) / str(step)

    def is_model_alone(self, step: int) -> bool:
        """Whether the checkpoint is of a model without an optimiser's state, as `save_model` writes it."""
        return not (self._step(step) / "training").exists()

    def restore_params(self, abstract: TrainState, step: int) -> Any:
        """The parameters at `step` alone, in the layout and the dtype of `abstract`."""
        saved = dataclasses.replace(_read_config(self._step(step)), param_dtype=self._model.param_dtype)
        _check_architecture(saved, self._model, str(self._manager.directory))
        return _restore(self._step(step), params=abstract.params)["params"]


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    """Orbax's manager of a folder's checkpoints, whose processes meet where the job's do, and not on their devices.

    Left to itself, it has the devices add up numbers in order to wait: see `shares.settled` for what comes of that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everybody = set(range(jax.process_count())) if jax.process_count() > 1 else None
    processes = ocp.options.MultiprocessingOptions(active_processes=everybody, barrier_sync_key_prefix="checkpoints")
    manager = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=processes, **options)
    return ocp.CheckpointManager(folder.absolute(), options=manager)


def _newest(steps: Iterable[int], read: Callable[[int], T]) -> tuple[tuple[T, int] | None, dict[int, DamagedError]]:
    """What is read of the newest checkpoint that can be, its step, and why later ones cannot."""
    damaged: dict[int, DamagedError] = {}
    for step in sorted(steps, reverse=True):
        try:
            return (read(step), step), damaged
        except DamagedError as error:
            damaged[step] = error
    if damaged:
        raise next(iter(damaged.values()))
    return None, {}


def _move_away(path: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    taken = len(list(folder.glob(f"{path.name}*")))
    path.rename(folder / (f"{path.name}.{taken}" if taken else path.name))


def _publish(workdir: Path, name: str, step: int) -> None:
    """Make `PUBLISHED/name` a run's folder by links to what it consists of."""
    folder = workdir / PUBLISHED / name
    if folder.exists():
        return
    partial = folder.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / FOLDER).mkdir(parents=True)
    (partial / FOLDER / str(step)).symlink_to(Path("..", "..", "..", FOLDER, str(step)))
    for path in workdir.iterdir():
        if path.is_file() and path.suffix != ".jsonl":
            (partial / path.name).symlink_to(Path("..", "..", path.name))
    partial.rename(folder)


def _amount(tokens: int) -> str:
    """A number of tokens as people say it: 220B."""
    unit, letter = next(((unit, letter) for unit, letter in UNITS if tokens % unit == 0), (1, ""))
    return f"{tokens // unit}{letter}"


def _integrity(**items: Any) -> ocp.args.JsonSave:
    return ocp.args.JsonSave({name: fingerprints(tree) for name, tree in items.items()})


def _restore(folder: Path, **items: Any) -> dict[str, Any]:
    """The items of a checkpoint in the layout of abstract trees, verified, or `DamagedError` in all processes."""
    handler = ocp.StandardCheckpointHandler()

    def read() -> tuple[dict[str, Any], Any]:
        arrays = {
            name: handler.restore(epath.Path(folder / name), args=ocp.args.StandardRestore(tree))
            for name, tree in items.items()
        }
        known = (folder / "integrity").is_dir()  # not in checkpoints of earlier versions
        return arrays, _json(folder / "integrity") if known else {}

    arrays, noted = _together(folder, read)
    changed = [
        f"{name}/{path}" for name, tree in arrays.items() if name in noted for path in differing(tree, noted[name])
    ]
    if changed:
        listed = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise DamagedError(f"checkpoint {folder} is damaged: {listed} changed since it was written")
    return arrays


def _together(folder: Path, read: Callable[[], T]) -> T:
    """What this process reads, if no process fails to: all must come to the same end.

    Raises `DamagedError`, or `UserError` where a disk or its host may be better later.
    """
    result: Any = None
    problem, passes = "", False
    try:
        result = read()
    except Exception as error:  # Orbax raises `Exception` itself for data that is cut short
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = problem if jax.process_count() == 1 else f"{distributed.name_of(jax.process_index())}: {problem}"
        passes = _passes(error)
    problems = [(reason, passing) for reason, passing in shares.gather([problem, passes]) if reason]
    for reason, passing in problems:
        require(not passing, f"checkpoint {folder} cannot be read now ({reason}); start again when it can")
    if problems:
        reason = problems[0][0]
        raise DamagedError(
            f"checkpoint {folder} cannot be read ({reason}); if it is damaged, move that folder away to continue from "
            "an earlier one"
        )
    return result


def _passes(error: Exception) -> bool:
    """Whether an error tells of the disk, the network or the host, and not of what is on the disk."""
    if isinstance(error, OSError):
        return error.errno in PASSING
    return isinstance(error, MemoryError) or any(os.strerror(number) in str(error) for number in PASSING)


def _read_config(folder: Path) -> ModelConfig:
    return from_config_dict(ModelConfig, _together(folder, lambda: _json(folder / "config")), "checkpoint")


def _json(folder: Path) -> Any:
    return ocp.JsonCheckpointHandler().restore(epath.Path(folder))


def _check_architecture(saved: ModelConfig, wanted: ModelConfig, where: str) -> None:
    old, new = saved.architecture(), wanted.architecture()
    differences = [f"{key} {old[key]!r} instead of {new[key]!r}" for key in new if old[key] != new[key]]
    require(not differences, f"the checkpoint in {where} is of another model: {', '.join(differences)}")


def save_model(workdir: Path, config: ModelConfig, params: Any) -> None:
    """Write a model that no run of ours has trained, as the checkpoint of step 0; returns when it is whole on disk.

    Raises `UserError` if the folder has checkpoints already, or for parameters laid out for decoding.
    """
    folder = (workdir / FOLDER).absolute()
    require(not folder.exists() or not any(folder.iterdir()), f"{folder} has checkpoints already: choose a new folder")
    require(models.is_stacked(params), "parameters laid out for decoding are not saved: save those they were made of")
    with _manager(folder) as manager:
        manager.save(0, args=_model_alone(config, params))


def replace_model(workdir: Path, config: ModelConfig, params: Any, step: int) -> None:
    """Write the model of a step beside a run, as the only checkpoint of `workdir`; returns when it is whole on disk.

    The one that was there goes only then. A step that is there already is left alone.
    """
    with _manager(workdir / FOLDER, max_to_keep=1, cleanup_tmp_directories=True) as manager:
        if step not in manager.all_steps():
            manager.save(step, args=_model_alone(config, params))


def _model_alone(config: ModelConfig, params: Any) -> ocp.args.Composite:
    model = ocp.args.JsonSave(dataclasses.asdict(config))
    return ocp.args.Composite(params=ocp.args.StandardSave(params), config=model, integrity=_integrity(params=params))


def load_model(
    workdir: Path, step: int | None = None, mesh: Mesh | None = None, **overrides: Any
) -> tuple[ModelConfig, Any, int]:
    """A trained model: its configuration, its parameters and their step.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None = the newest that is whole.
      mesh: where to put the parameters, sharded by their logical axes; None = the default device.
      **overrides: fields of `ModelConfig` that do not change the weights, e.g. `compute_dtype`.

    Raises:
      UserError: no checkpoint there, or none of that step.
    """
    folder = (workdir / FOLDER).absolute()
    require(folder.is_dir(), f"no checkpoints in {workdir}: is this the --workdir of a training run?")
    with _manager(folder, read_only=True) as manager:
        steps = sorted(manager.all_steps())
        require(bool(steps), f"{folder} holds no whole checkpoint yet")
        require(
            step is None or step in steps,
            f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}",
        )

    def read(step: int) -> tuple[ModelConfig, Any]:
        config = dataclasses.replace(_read_config(folder / str(step)), **overrides)
        return config, _restore(folder / str(step), params=placed(config, mesh))["params"]

    found, damaged = _newest(steps if step is None else [step], read)
    for error in damaged.values():
        logger.warning("%s; taking the one before", error)
    assert found is not None
    (config, params), step = found
    return config, params, step


def placed(config: ModelConfig, mesh: Mesh | None) -> Any:
    """The parameters' shapes, dtypes and shardings on a mesh, or on the default device; nothing is allocated."""
    abstract = models.abstract(config)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        layout = jax.tree.map(lambda _: device, abstract)
    else:
        layout = rules.shardings(models.logical_axes(config), abstract, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
