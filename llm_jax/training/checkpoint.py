"""Checkpoints through Orbax: asynchronous, atomic, self-describing, restored onto any mesh.

A checkpoint holds three items: `params`, `training` (the optimiser's state) and `config` (the model's configuration as
JSON), so that a model can be loaded without its run.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from llm_jax import models
from llm_jax.config import CheckpointConfig, ModelConfig, from_config_dict
from llm_jax.errors import UserError, require
from llm_jax.parallel import rules
from llm_jax.training.state import TrainState

FOLDER = "checkpoints"


class Checkpointer:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last write."""

    def __init__(self, workdir: Path, config: CheckpointConfig, model: ModelConfig, tokens_per_step: int) -> None:
        policies: list[Any] = [checkpoint_managers.LatestN(config.keep_last)]
        if config.keep_every_tokens:
            interval_steps = max(1, round(config.keep_every_tokens / tokens_per_step))
            interval_steps = -(-interval_steps // config.every_steps) * config.every_steps
            policies.append(checkpoint_managers.EveryNSteps(interval_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self.config = config
        self._model = model
        self._manager = ocp.CheckpointManager((workdir / FOLDER).absolute(), options=options)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._manager.close()

    def save(self, state: TrainState, step: int) -> None:
        """Start writing the state; the copy is taken now, so the state may be donated at once. Saved steps are kept."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                training=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                config=ocp.args.JsonSave(dataclasses.asdict(self._model)),
            ),
        )

    def wait(self) -> None:
        """Block until everything saved so far is whole on disk."""
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state at `step`, in the layout of `abstract`. Raises `UserError` if it is another model's."""
        _check_architecture(_read_config(self._manager, step), self._model, str(self._manager.directory))
        restored = _restore(
            self._manager,
            step,
            params=ocp.args.StandardRestore(abstract.params),
            training=ocp.args.StandardRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
        )
        training = restored["training"]
        return TrainState(training["step"], restored["params"], training["opt_state"])

    def is_model_alone(self, step: int) -> bool:
        """Whether the checkpoint is of a model without an optimiser's state, as `save_model` writes it."""
        return not (Path(self._manager.directory) / str(step) / "training").exists()

    def restore_params(self, abstract: TrainState, step: int) -> Any:
        """The parameters at `step` alone, in the layout and the dtype of `abstract`."""
        saved = dataclasses.replace(_read_config(self._manager, step), param_dtype=self._model.param_dtype)
        _check_architecture(saved, self._model, str(self._manager.directory))
        return _restore(self._manager, step, params=ocp.args.StandardRestore(abstract.params))["params"]


def _restore(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax raises `Exception` itself for data that is cut short
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"checkpoint {manager.directory}/{step} cannot be read ({first_line}); if it is damaged, move that folder "
            "away to continue from an earlier one"
        ) from error


def _read_config(manager: ocp.CheckpointManager, step: int) -> ModelConfig:
    return from_config_dict(ModelConfig, _restore(manager, step, config=ocp.args.JsonRestore())["config"], "checkpoint")


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
    with ocp.CheckpointManager(folder) as manager:
        manager.save(0, args=_model_alone(config, params))


def replace_model(workdir: Path, config: ModelConfig, params: Any, step: int) -> None:
    """Write the model of a step beside a run, as the only checkpoint of `workdir`; returns when it is whole on disk.

    The one that was there goes only then. A step that is there already is left alone.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
    with ocp.CheckpointManager((workdir / FOLDER).absolute(), options=options) as manager:
        if step not in manager.all_steps():
            manager.save(step, args=_model_alone(config, params))


def _model_alone(config: ModelConfig, params: Any) -> ocp.args.Composite:
    model = ocp.args.JsonSave(dataclasses.asdict(config))
    return ocp.args.Composite(params=ocp.args.StandardSave(params), config=model)


def load_model(
    workdir: Path, step: int | None = None, mesh: Mesh | None = None, **overrides: Any
) -> tuple[ModelConfig, Any, int]:
    """A trained model: its configuration, its parameters and their step.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None = the newest.
      mesh: where to put the parameters, sharded by their logical axes; None = the default device.
      **overrides: fields of `ModelConfig` that do not change the weights, e.g. `compute_dtype`.

    Raises:
      UserError: no checkpoint there, or none of that step.
    """
    folder = (workdir / FOLDER).absolute()
    require(folder.is_dir(), f"no checkpoints in {workdir}: is this the --workdir of a training run?")
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        steps = sorted(manager.all_steps())
        require(bool(steps), f"{folder} holds no whole checkpoint yet")
        step = steps[-1] if step is None else step
        require(step in steps, f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        config = dataclasses.replace(_read_config(manager, step), **overrides)
        target = ocp.args.StandardRestore(placed(config, mesh))
        return config, _restore(manager, step, params=target)["params"], step


def placed(config: ModelConfig, mesh: Mesh | None) -> Any:
    """The parameters' shapes, dtypes and shardings on a mesh, or on the default device; nothing is allocated."""
    abstract = models.abstract(config)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        layout = jax.tree.map(lambda _: device, abstract)
    else:
        layout = rules.shardings(models.logical_axes(config), abstract, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
