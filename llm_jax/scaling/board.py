"""What a running sweep shows: a live table of its trials, or a line per change where there is no terminal."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llm_jax.scaling.trial import Trial
from llm_jax.training import metrics

# In the order of the table's rows.
RUNNING, FAILED, WAITING, DONE = "running", "failed", "waiting", "done"
STYLES = {RUNNING: "bold", FAILED: "red", WAITING: "dim", DONE: "green"}
TAIL_BYTES = 8192  # of a trial's metrics: some records
FRAME_LINES = 8  # of the terminal that the table's rows cannot have


class Board:
    """The state of every trial, on a console.

    Args:
      trials: all trials of the sweep.
      folder: where their run folders are.
      live: whether to draw a table; else, and where the console is no terminal, each change is a line.
      console: where; None = standard error.
    """

    def __init__(self, trials: Sequence[Trial], folder: Path, *, live: bool, console: Console | None = None) -> None:
        self._trials = list(trials)
        self._folder = folder
        self._console = console or Console(stderr=True)
        self._states = dict.fromkeys((trial.name for trial in trials), WAITING)
        self._compute = {trial.name: trial.compute for trial in trials}
        self._start = time.monotonic()
        self._compute_at_start: float | None = None
        self._live = Live(console=self._console, auto_refresh=False) if live and self._console.is_terminal else None

    def __enter__(self) -> "Board":
        self._compute_at_start = self._computed()
        if self._live:
            self._live.start()
        self.refresh()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live:
            self.refresh()
            self._live.stop()

    def set(self, trial: Trial, state: str, note: str = "") -> None:
        """Change a trial's state; `note` says why."""
        self._states[trial.name] = state
        if state == DONE:
            note = note or self._final(trial)
        if self._live is None and self._compute_at_start is not None:
            self.say(f"{trial.name} {state}{f': {note}' if note else ''} ({self._summary()})")
        elif note and state != DONE:
            self.say(f"{trial.name} {state}: {note}")

    def say(self, text: str) -> None:
        """A line above the table."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def refresh(self) -> None:
        """Draw the table again."""
        if self._live:
            self._live.update(Group(self._table(), Text(self._summary())), refresh=True)

    def _final(self, trial: Trial) -> str:
        loss = last_record(self._folder / trial.name, "heldout").get("loss")
        return f"loss {loss:.4f}" if loss is not None else ""

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("trial", no_wrap=True, overflow="ellipsis")
        for name in ("size", "tokens", "FLOPs", "state", "step", "loss", "tokens/s"):
            table.add_column(name, justify="left" if name in ("size", "state") else "right", no_wrap=True)
        order = sorted(self._trials, key=lambda trial: list(STYLES).index(self._states[trial.name]))
        shown = order[: max(1, self._console.height - FRAME_LINES)]
        for trial in shown:
            table.add_row(*self._cells(trial), style=STYLES[self._states[trial.name]])
        if len(order) > len(shown):
            table.add_row(f"... and {len(order) - len(shown)} more")
        return table

    def _cells(self, trial: Trial) -> list[str]:
        state, run = self._states[trial.name], self._folder / trial.name
        record = {} if state == WAITING else last_record(run, "train")
        loss = last_record(run, "heldout").get("loss") if state == DONE else record.get("loss")
        return [
            trial.name,
            trial.size,
            f"{trial.tokens:.3g}",
            f"{self._compute[trial.name]:.3g}",
            state,
            f"{record.get('step', 0):.0f}/{trial.config.steps}",
            "" if loss is None else f"{loss:.3f}",
            f"{record['tokens_per_second']:,.0f}" if "tokens_per_second" in record and state == RUNNING else "",
        ]

    def _summary(self) -> str:
        counts = Counter(self._states.values())
        parts = [f"{counts[state]} {state}" for state in (DONE, RUNNING, WAITING, FAILED) if counts[state]]
        return ", ".join(parts) + self._time_left()

    def _time_left(self) -> str:
        """At the rate of this start of the sweep, in FLOP/s."""
        done, total = self._computed(), sum(self._compute[name] for name, s in self._states.items() if s != FAILED)
        gained, seconds = done - (self._compute_at_start or 0.0), time.monotonic() - self._start
        if gained <= 0 or done >= total:
            return ""
        left = (total - done) / gained * seconds
        return f", about {left / 60:.0f} minutes left" if left > 120 else f", about {left:.0f} s left"

    def _computed(self) -> float:
        """FLOPs of what is trained, running trials counted as far as they are."""
        total = 0.0
        for trial in self._trials:
            state = self._states[trial.name]
            if state == DONE:
                total += self._compute[trial.name]
            elif state == RUNNING:
                step = last_record(self._folder / trial.name, "train").get("step", 0.0)
                total += self._compute[trial.name] * step / trial.config.steps
        return total


def last_record(run: Path, kind: str) -> dict[str, float]:
    """The newest whole record of a kind near the end of a run's metrics; {} without one."""
    path = run / metrics.FILE
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut short: being written, or the middle of a line
        if isinstance(record, dict) and record.get("kind") == kind:
            return record
    return {}
