"""What happened in a supervised run: `status.json`, a page that shows it, and a line for each event."""

import dataclasses
import html
import json
import shlex
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from llm_jax import files

FILE, PAGE = "status.json", "status.html"
PROGRESS_SECONDS = 1.0  # between two writes of how far the run is
STYLE = "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:.3em .8em;text-align:left}"
STYLE += "tr:nth-child(even){background:#eee}"


@dataclasses.dataclass
class Fault:
    """One fault and what it cost."""

    what: str
    host: str
    process: int
    step: int  # the last one taken before it
    processes: int  # that there were
    last_words: str  # of the process's log
    time: str = ""
    processes_after: int = 0
    resumed_step: int = -1  # what the state was restored to
    restored_from: str = ""
    downtime_seconds: float = -1.0  # from the last sign of a step before to the first step after

    @property
    def lost_steps(self) -> int:
        """Steps that had to be taken again; -1 while that is not known."""
        return self.step - self.resumed_step if self.restored_from else -1


@dataclasses.dataclass
class Status:
    """The run so far. A supervisor that is started again goes on with it."""

    folder: str
    command: str
    run_id: str  # names the hosts' folders of copies
    state: str = "starting"
    rounds: int = 0  # starts of the processes
    most_processes: int = 0  # that there have been at once
    hosts: list[str] = dataclasses.field(default_factory=list)
    step: int = -1
    restored: bool = False  # whether the processes of this round have a state
    faults: list[Fault] = dataclasses.field(default_factory=list)
    events: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, command: Sequence[str]) -> "Status":
        """The status in a folder, or that of a new run."""
        fresh = cls(str(folder), shlex.join(command), uuid.uuid4().hex[:12])
        try:
            values = json.loads((folder / FILE).read_text())
            faults = [Fault(**{k: v for k, v in fault.items() if k != "lost_steps"}) for fault in values["faults"]]
            old = {"run_id": values["run_id"], "rounds": values["rounds"], "events": values["events"]}
            old["most_processes"] = values.get("most_processes", 0)
        except (OSError, ValueError, KeyError, TypeError):
            return fresh
        return dataclasses.replace(fresh, faults=faults, **old)

    def __post_init__(self) -> None:
        self._last_step = self._written = time.monotonic()

    def say(self, text: str) -> None:
        """An event: printed, and kept."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        self.events.append(line)
        self._write()

    def begin_round(self, hosts: Sequence[str]) -> None:
        """The processes are being started."""
        self.rounds += 1
        self.hosts, self.state, self.restored = list(hosts), "starting", False
        for fault in self.faults:
            fault.processes_after = fault.processes_after or len(hosts)
        self.say(f"start {self.rounds} with {len(hosts)} processes on {', '.join(hosts)}")

    def restored_at(self, step: int, source: str) -> None:
        """The processes have a state again."""
        self.state, self.restored, self.step = "running", True, step
        for fault in self.faults:
            if not fault.restored_from:
                fault.resumed_step, fault.restored_from = step, source
        self.say(f"going on from step {step} of {source}")

    def progress(self, step: int) -> None:
        """A step was taken."""
        self.step, now = step, time.monotonic()
        for fault in self.faults:
            if fault.downtime_seconds < 0:
                fault.downtime_seconds = round(now - self._last_step, 2)
                self.say(f"{fault.what} cost {fault.lost_steps} steps and {fault.downtime_seconds:.1f} s")
        self._last_step = now
        if now - self._written > PROGRESS_SECONDS:
            self._write()

    def fault(self, fault: Fault) -> None:
        """Something went wrong."""
        fault.time = time.strftime("%Y-%m-%d %H:%M:%S")
        self.faults.append(fault)
        self.state = "restarting"
        words = f" ({fault.last_words})" if fault.last_words and "never" not in fault.what else ""
        self.say(f"{fault.what}: process {fault.process} on {fault.host} after step {fault.step}{words}")

    def end(self, outcome: str) -> None:
        """The supervisor ends."""
        self.state = outcome
        self.say(f"{outcome} at step {self.step}, after {len(self.faults)} faults and {self.rounds} starts")

    def _write(self) -> None:
        self._written = time.monotonic()
        values = dataclasses.asdict(self)
        for fault, written in zip(self.faults, values["faults"]):
            written["lost_steps"] = fault.lost_steps
        files.write_json(Path(self.folder) / FILE, values)
        with files.replacing(Path(self.folder) / PAGE) as partial:
            partial.write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """The status as a page that loads itself again every few seconds."""
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)}</tr>"
            for cells in ((*dataclasses.astuple(fault), fault.lost_steps) for fault in reversed(self.faults))
        )
        heads = "".join(f"<th>{field.name.replace('_', ' ')}</th>" for field in dataclasses.fields(Fault))
        events = html.escape("\n".join(reversed(self.events[-200:])))
        return (
            f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="5"><title>{self.state}</title>'
            f"<style>{STYLE}</style><h1>{html.escape(self.state)}: step {self.step}, {len(self.hosts)} processes</h1>"
            f"<p><code>{html.escape(self.command)}</code></p><p>{html.escape(', '.join(self.hosts))}</p>"
            f"<h2>{len(self.faults)} faults</h2><table><tr>{heads}<th>lost steps</th></tr>{rows}</table>"
            f"<h2>Events</h2><pre>{events}</pre>\n"
        )
