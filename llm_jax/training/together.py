"""Several runs of one shape in one compiled step: same results as each alone.

States and batches lie on a leading axis of runs. The update and the score are those of single runs, mapped over that
axis; seeds and schedules are arguments. On an accelerator all runs advance side by side, which fills it better than
one small model does. On a CPU the compiled step takes one run after the other, so that each one's arrays stay in the
cache; what is shared there is compiling, starting and reading.

R runs, B batch, T length.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.config import LossConfig, ModelConfig
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.optim.schedules import Schedule
from llm_jax.training import language_model, step
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.loop import FINITE, DivergedError, check_finite
from llm_jax.training.metrics import FAILED, Recorder
from llm_jax.training.state import TrainState
from llm_jax.training.step import Metrics, StepFunction


def map_runs(function: Callable[..., Any], vectorize: bool) -> Callable[..., Any]:
    """`function` over the leading axis of its arguments: at once, or one after the other in one compiled loop."""
    if vectorize:
        return jax.vmap(function)
    return lambda *arguments: jax.lax.map(lambda each: function(*each), arguments)


def vectorizes() -> bool:
    """Whether runs advance side by side on this device."""
    return jax.default_backend() != "cpu"


@functools.lru_cache
def _update(
    model: ModelConfig,
    loss: LossConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    microbatches: int,
    vectorize: bool,
) -> Callable[..., Any]:
    update = step.update_function(language_model.loss_function(model, loss), optimizer, microbatches)
    return jax.jit(map_runs(update, vectorize), donate_argnums=0)


def step_function(
    model: ModelConfig,
    loss: LossConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    seeds: Sequence[int],
    schedules: Sequence[Schedule],
    *,
    microbatches: int = 1,
    vectorize: bool | None = None,
) -> StepFunction:
    """The step `(states, batches) -> (states, metrics)` of R runs, all leaves with a leading R; jitted, donating.

    Args:
      model: of all runs, like the three below.
      loss: see `language_model.loss_function`.
      optimizer: as `state.optimizer` gives it.
      seeds: of each run.
      schedules: of each run; alike in kind and final fraction.
      microbatches: of each step.
      vectorize: side by side or one after the other; None = what suits the device.
    """
    vectorize = vectorizes() if vectorize is None else vectorize
    numbers = np.array([step.seed_number(seed) for seed in seeds]), jax.tree.map(lambda *x: np.array(x), *schedules)
    return step.bind(_update(model, loss, optimizer, microbatches, vectorize), *numbers)


@jax.jit
def stack(states: Sequence[TrainState]) -> TrainState:
    """One state whose leaves are those of R states, [R, ...]."""
    stacked: TrainState = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return stacked


@jax.jit
def take(states: TrainState, index: int) -> TrainState:
    """The state of one of the runs."""
    taken: TrainState = jax.tree.map(lambda leaf: leaf[index], states)
    return taken


def stacked_batches(seeds: Sequence[int], read: Callable[[int], Iterator[Batch]]) -> Iterator[Batch]:
    """Batches [R, B, T] of runs whose data have these seeds; runs of one seed share one reading."""
    readers = {seed: read(seed) for seed in dict.fromkeys(seeds)}
    while True:
        batches = {seed: next(reader) for seed, reader in readers.items()}
        yield jax.tree.map(lambda *rows: np.stack(rows), *(batches[seed] for seed in seeds))


class NoneLeftError(UserError):
    """All of the runs that were trained together have diverged."""


class Runs:
    """Where the loop's numbers and states go: to each run's own folder, until that run diverges.

    A run whose loss, gradient or parameters are not finite is left as it was: its record ends with one of kind
    `FAILED`, nothing of that step or later is saved, and the others go on.
    """

    def __init__(
        self, names: Sequence[str], recorders: Sequence[Recorder], checkpointers: Sequence[Checkpointer]
    ) -> None:
        self.failures: dict[str, str] = {}
        self._members = list(zip(names, recorders, checkpointers, strict=True))

    def _alive(self) -> list[tuple[int, str, Recorder, Checkpointer]]:
        return [(i, *member) for i, member in enumerate(self._members) if member[0] not in self.failures]

    def check(self, step: int, metrics: Metrics) -> None:
        """Note the runs that have diverged. Raises `NoneLeftError` when no run is left."""
        values = dict(zip(FINITE, jax.device_get([metrics[name] for name in FINITE])))
        for i, name, recorder, _ in self._alive():
            own = {key: value[i] for key, value in values.items()}
            if all(map(math.isfinite, own.values())):
                continue
            try:
                check_finite(step, own)
            except DivergedError as error:
                self.failures[name] = str(error)
                recorder.write(FAILED, step, own)
        if not self._alive():
            raise NoneLeftError("every run trained together diverged")

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a record to each run's: its own element of the values that are arrays [R]."""
        for i, _, recorder, _ in self._alive():
            recorder.write(kind, step, {name: value[i] if np.ndim(value) else value for name, value in values.items()})

    def advance(self, step: int) -> None:
        """Move the progress bar of the group."""
        self._members[0][1].advance(step)

    def status(self, step: int, total_steps: int, text: str, seconds_left: float) -> None:
        """Show how the group stands."""
        self._members[0][1].status(step, total_steps, f"{len(self._alive())} runs, each: {text}", seconds_left)

    def save(self, state: TrainState, step: int) -> None:
        """Start writing each run's state to its own folder."""
        for i, _, _, checkpointer in self._alive():
            checkpointer.save(take(state, i), step)

    def wait(self) -> None:
        """Block until everything saved so far is whole on disk."""
        for _, _, checkpointer in self._members:
            checkpointer.wait()
