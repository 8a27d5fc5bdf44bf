"""The training side of a supervised run: signs of life, copies of the state, and more microbatches on fewer hosts."""

import functools
import math
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from llm_jax.errors import require
from llm_jax.parallel import distributed, rules, supervision
from llm_jax.parallel.supervision import Assignment
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.copies import Copies


class Worker:
    """This process, as its supervisor sees it."""

    def __init__(self, own: Assignment, signs: supervision.Signs) -> None:
        self._own, self._signs = own, signs
        self._copies = Copies(own)

    def due(self, step: int) -> bool:
        """Whether `stepped` will need the state after this step, which must have been checked before."""
        return self._copies.due(step)

    def stepped(self, state: Any, step: int) -> None:
        """Tell of a step that was taken, and keep copies of the state after it where they are due."""
        if self.due(step):
            self._copies.keep(state, step)
        self._signs.tell(step=step)

    def rescued(self, abstract: Any, checkpoint_step: int | None) -> tuple[Any, int] | None:
        """A state later than the newest checkpoint's, with its step, from the copies that hosts have kept."""
        step = self._copies.newest_step()
        found = self._copies.restore(abstract, step) if step > (checkpoint_step or 0) else None
        self._copies.forget()
        return None if found is None else (found, step)

    def begins(self, step: int, source: str) -> None:
        """Tell where the run goes on, and what the state was restored from."""
        self._signs.tell(step=step, restored_step=step, restored_from=source)

    @property
    def shrunk(self) -> float:
        """The full number of hosts over the present one."""
        return self._own.most_processes / self._own.processes


@functools.cache
def worker() -> Worker | None:
    """This process's part in a supervised run; None where no supervisor has started it."""
    own, signs = supervision.assignment(), supervision.signs()
    return Worker(own, signs) if own and signs else None


def first_state(
    abstract: Any, checkpointer: Checkpointer, read: Callable[[int], Any], begin: Callable[[], Any]
) -> tuple[Any, int, str]:
    """The latest state that there is, its step, and where it is from: what `read` makes of a checkpoint's step, copies
    that a supervisor has rescued, or what `begin` makes."""
    own = worker()
    rescued = own.rescued(abstract, checkpointer.latest_step()) if own else None
    if rescued:
        result: tuple[Any, int, str] = (*rescued, "the hosts' copies")
    else:
        found = checkpointer.newest(read)
        result = (*found, "the checkpoint") if found else (begin(), 0, "the start")
    if own:
        own.begins(*result[1:])
    return result


def microbatches(batch_size: int, wanted: int, mesh: Mesh, is_stochastic: bool) -> int:
    """How many microbatches a step takes: those wanted, or, in a supervised run that has lost hosts, so many that no
    device holds more rows at once than before; then a line says so, and what it means for a stochastic model.

    Raises `UserError` if a batch does not divide over the devices that are left.
    """
    own = worker()
    if own is None or own.shrunk == 1:
        return wanted
    shares = rules.axis_size(mesh, "batch")
    require(
        batch_size % shares == 0,
        f"batch_size={batch_size} does not divide over the {shares} data-parallel devices that are left: give the "
        "supervisor the numbers of hosts that do, --config.sizes",
    )
    rows = batch_size // shares
    least = min(math.ceil(wanted * own.shrunk), rows)
    count = next(count for count in range(least, rows + 1) if rows % count == 0)
    if count != wanted and distributed.is_first():
        drawn = "; dropout and noise draw other numbers than with all hosts" if is_stochastic else ""
        print(f"{count} microbatches instead of {wanted}, on 1/{own.shrunk:g} of the hosts{drawn}", flush=True)
    return count
