"""The loop around the train step: data on the mesh, logs, held-out evaluation, checkpoints, and a clean stop.

The loop knows nothing of what is trained: pre-training, fine-tuning and the rest hand it a step, batches and an
evaluation.
"""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llm_jax.config import TrainConfig
from llm_jax.errors import UserError
from llm_jax.parallel import rules, shares
from llm_jax.training import supervised
from llm_jax.training.metrics import FAILED
from llm_jax.training.state import TrainState
from llm_jax.training.step import Metrics, StepFunction

Evaluation = Callable[[Any], Mapping[str, float]]
AGREE_EVERY = 8  # steps between two times that processes ask each other whether one was told to stop


def place(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a global batch as global arrays [B, ...] on the mesh, split over its data axes."""

    def one(rows: Any) -> jax.Array:
        sharding = NamedSharding(mesh, rules.partition_spec(("batch", *(None,) * (rows.ndim - 1))))
        shape = (rows.shape[0] * jax.process_count(), *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(one, batch)


class StopSignal:
    """Turns the first SIGTERM or SIGINT inside a `with` block into a flag; a second SIGINT interrupts as usual.

    Blocks may be nested: what asks the inner one to stop asks the outer one too, and one that begins after that is
    asked from its start. So who starts several runs learns of a signal that reached the last evaluation of one.

    `agreed()` is the flag of all processes together: a signal reaches hosts at different steps, and they must stop
    after the same one. As they wait for each other, and for what the devices still do, they ask only now and then.
    """

    def __init__(self) -> None:
        self.requested = False
        self._asked = 0
        self._previous: dict[int, Any] = {}
        self._outer: StopSignal | None = None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
            owner = getattr(self._previous[signal.SIGINT], "__self__", None)
            if isinstance(owner, StopSignal):
                self._outer, self.requested = owner, self.requested or owner.requested
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._request()

    def _request(self) -> None:
        self.requested = True
        if self._outer:
            self._outer._request()

    def agreed(self, every: int = AGREE_EVERY) -> bool:
        """Whether any process was asked to stop, as of every so many calls. Every process must call this equally often.

        Raises `UserError` where another process does not come, as `distributed.wait_for_all`.
        """
        if jax.process_count() == 1:
            return self.requested
        self._asked += 1
        return (self._asked - 1) % every == 0 and any(shares.gather(self.requested))

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class Throughput:
    """Tokens per second and model FLOPs utilisation since the last reading, excluding evaluations and saves."""

    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None
    steps: int = 0
    seconds: float = 0.0

    def read(self) -> dict[str, float]:
        """The rates over the steps since the last call; `mfu` only where the device's peak is known."""
        rate = self.tokens_per_step * self.steps / max(self.seconds, 1e-9)
        self.steps, self.seconds = 0, 0.0
        rates = {"tokens_per_second": rate}
        if self.peak_flops:
            rates["mfu"] = rate * self.flops_per_token / self.peak_flops
        return rates


class Profiler:
    """Traces steps [profile_start, profile_start + profile_steps) to `workdir/profile`, for TensorBoard or XProf."""

    def __init__(self, config: TrainConfig, workdir: Path) -> None:
        self._steps = range(config.profile_start, config.profile_start + config.profile_steps)
        self._folder = str(workdir / "profile")
        self._tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def at(self, step: int) -> None:
        """Start or stop the trace before `step` is taken."""
        if step in self._steps and not self._tracing:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif step not in self._steps:
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False

    def __exit__(self, *exc_info: object) -> None:
        self._stop()


FINITE = ("loss", "gradient_norm", "parameter_norm")  # metrics whose value tells whether a run can go on


class Records(Protocol):
    """Where the loop's numbers go: a `metrics.Recorder`, or those of several runs."""

    def advance(self, step: int) -> None:
        """Show that a step was taken."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one record."""

    def status(self, step: int, total_steps: int, text: str, seconds_left: float) -> None:
        """Show how the run stands."""


class Checkpoints(Protocol):
    """Where the loop's states go: a `Checkpointer`, or those of several runs."""

    def save(self, state: TrainState, step: int) -> None:
        """Start writing a state, of which the copy is taken now."""

    def wait(self) -> None:
        """Block until everything saved so far is whole on disk."""


class DivergedError(UserError):
    """A run whose numbers are not finite; the same run would come to the same end again."""


def check_finite(step: int, metrics: Metrics) -> None:
    """Raise `DivergedError`, naming the step and its batch, if the loss, gradient or parameters are not finite."""
    values = dict(zip(FINITE, map(float, jax.device_get([metrics[name] for name in FINITE]))))
    if not all(map(math.isfinite, values.values())):
        found = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
        raise DivergedError(
            f"non-finite {found} at step {step}, global batch {step - 1}: stopped before it was saved; resume from "
            "the last checkpoint with a lower learning rate or look at that batch"
        )


@dataclasses.dataclass
class Loop:
    """One run of the train step from `start_step` to `config.steps`.

    Several runs may go together: then states, batches and metrics have a leading axis, and what takes them here
    (`recorder`, `checkpointer`, `check`, `evaluate`) tells the runs apart.
    """

    config: TrainConfig
    mesh: Mesh
    step_function: StepFunction
    evaluate: Evaluation
    checkpointer: Checkpoints
    recorder: Records
    throughput: Throughput
    workdir: Path
    check: Callable[[int, Metrics], None] = check_finite  # of every step, before anything of it is kept
    evaluated: Callable[[TrainState, int, Mapping[str, float]], None] | None = None  # is told of every evaluation

    def run(self, state: TrainState, batches: Iterator[Any], start_step: int) -> TrainState:
        """Train until the last step or a stop signal; either way the last state is checkpointed and returned."""
        pending: tuple[int, Metrics] | None = None
        step = start_step
        worker = supervised.worker()
        with StopSignal() as stop, jax.set_mesh(self.mesh), Profiler(self.config, self.workdir) as profiler:
            while step < self.config.steps and not stop.agreed():
                profiler.at(step)
                start = time.perf_counter()
                batch = place(next(batches), self.mesh)
                with jax.transfer_guard("disallow"):
                    state, metrics = self.step_function(state, batch)
                if pending is not None:  # one step behind, so that the device always has work queued
                    self._check(*pending)
                step, pending = step + 1, (step + 1, metrics)
                due = self._due(step) or (worker is not None and worker.due(step))
                if due:
                    self._check(*pending)
                self._count(step, time.perf_counter() - start)
                if due:
                    self._report(state, step, metrics)
                if worker:
                    worker.stepped(state, step)
            if pending is not None:
                self._check(*pending)
            self.checkpointer.save(state, step)
            self.checkpointer.wait()
        return state

    def _check(self, step: int, metrics: Metrics) -> None:
        try:
            self.check(step, metrics)
        except DivergedError:
            self.recorder.write(FAILED, step, {name: metrics[name] for name in FINITE})
            raise

    def _count(self, step: int, seconds: float) -> None:
        self.throughput.steps += 1
        self.throughput.seconds += seconds
        self.recorder.advance(step)

    def _due(self, step: int) -> bool:
        config = self.config
        intervals = (config.log_every, config.eval_every, config.checkpoint.every_steps)
        return step == config.steps or any(interval and step % interval == 0 for interval in intervals)

    def _report(self, state: TrainState, step: int, metrics: Metrics) -> None:
        config, last = self.config, step == self.config.steps
        if last or step % config.log_every == 0:
            self._log(step, metrics)
        if last or (config.eval_every and step % config.eval_every == 0):
            self._evaluate(state, step)
        if step % config.checkpoint.every_steps == 0:
            self.checkpointer.save(state, step)

    def _evaluate(self, state: TrainState, step: int) -> None:
        values = self.evaluate(state.params)
        self.recorder.write("heldout", step, {"tokens": self._tokens(step), **values})
        if self.evaluated is not None:
            self.evaluated(state, step, values)

    def _tokens(self, step: int) -> int:
        return step * self.throughput.tokens_per_step

    def _log(self, step: int, metrics: Metrics) -> None:
        values = {**jax.device_get(metrics), **self.throughput.read()}
        self.recorder.write("train", step, {"tokens": self._tokens(step), **values})
        mfu = f" mfu {values['mfu']:.1%}" if "mfu" in values else ""
        text = f"loss {_range(values['loss'])} {values['tokens_per_second']:,.0f} tokens/s{mfu}"
        seconds_left = (self.config.steps - step) * self.throughput.tokens_per_step / values["tokens_per_second"]
        self.recorder.status(step, self.config.steps, text, seconds_left)


def _range(losses: np.ndarray) -> str:
    """One run's loss, or the lowest and the highest of several."""
    low, high = np.nanmin(losses), np.nanmax(losses)
    return f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
