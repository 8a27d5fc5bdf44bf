"""The supervisor of a training whose hosts come and go: it starts, watches, stops and starts again.

One process runs on each host, beside an agent (`llm_jax.parallel.agent`). When a process or a host dies or freezes, or
the list of hosts changes, the processes that are left are ended and new ones are started on the hosts that there are
then. They meet, lay the model out over fewer or more devices, take the state from the copies that the hosts have kept
(or from a checkpoint), and go on with the batch after its step. The supervisor needs neither JAX nor an accelerator.
"""

import dataclasses
import math
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from llm_jax.errors import UserError
from llm_jax.parallel import member as members
from llm_jax.parallel.agent import Task
from llm_jax.parallel.elastic_config import ElasticConfig
from llm_jax.parallel.elastic_status import Fault, Status
from llm_jax.parallel.hosts import Hosts
from llm_jax.parallel.member import Member
from llm_jax.parallel.supervision import Assignment

FOLDER = "elastic"  # of the run's folder
POLL_SECONDS = 0.1
FAREWELL_SECONDS = 20.0  # for agents to end
REQUEUE, STOPPED, FINISHED, CHANGED, FAULT = "requeue", "stopped", "finished", "hosts changed", "fault"
# Of several faults at once, the one that the others follow from.
CAUSES = (members.LOST, members.FROZEN, members.LATE, members.KILLED, members.FAILED)


class Supervisor:
    """Keeps one command alive."""

    def __init__(self, config: ElasticConfig, command: Sequence[str], workdir: Path) -> None:
        self._config, self._command = config, tuple(command)
        self._folder = (workdir / FOLDER).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._hosts = Hosts(config)
        self._asked = ""  # what a signal asks for
        self._best_step = -1
        self._without_progress = 0
        self.status = Status.open(self._folder, command)

    def run(self) -> str:
        """Keep the command alive until it is finished, or a signal asks for the end; what it came to.

        Raises `UserError` where the same fault comes again and again, or too few hosts for too long.
        """
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._handle)
        try:
            while True:
                team = self._wait_for_hosts()
                outcome = self._round(team) if team else self._asked
                if outcome in (FINISHED, STOPPED, REQUEUE):
                    self.status.end(outcome)
                    return outcome
        except UserError as error:
            self.status.end(f"failed: {error}")
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = REQUEUE if number == signal.SIGUSR1 else STOPPED

    def _wait_for_hosts(self) -> list[str]:
        """The hosts of the next round; none if a signal came first."""
        deadline = time.monotonic() + self._config.wait_seconds
        waits = False
        while not self._asked:
            self._hosts.refresh()
            if team := self._hosts.team():
                return team
            if not waits:
                waits = True
                self.status.say(f"waiting for hosts: {len(self._hosts.usable())} are too few")
            if time.monotonic() > deadline:
                raise UserError(f"{len(self._hosts.usable())} hosts were too few for {self._config.wait_seconds:g} s")
            time.sleep(POLL_SECONDS)
        return []

    def _round(self, team: list[str]) -> str:
        """Start the command on a team of hosts, and see it to some end."""
        self._bring_from_spares(team)
        round_members = self._start(team)
        self.status.begin_round(team)
        began = self._best_step
        outcome, culprit, what = FAULT, None, ""
        try:
            outcome, culprit, what = self._watch(round_members, team)
        finally:
            self._end(round_members, outcome)
        if outcome == FAULT:
            assert culprit is not None
            self._note(culprit, what, round_members)
            self._without_progress = 0 if self._best_step > began else self._without_progress + 1
            if self._without_progress >= self._config.retries:
                raise UserError(
                    f"{culprit.host}: {what}, {self._without_progress} times without a new step: {culprit.last_words()}"
                )
        return outcome

    def _task(self, host: str, index: int, team: Sequence[str], address: str) -> Task:
        own = Assignment(
            round=self.status.rounds,
            process=index,
            processes=len(team),
            most_processes=self.status.most_processes,
            beats=str(self._folder / "beats" / f"{index}.json"),
            copies=self._copies(host),
            rescued=str(self._folder / "rescued"),
            copy_every=self._config.copy_every,
        )
        return Task(
            command=self._command,
            environment=members.environment(host, address, own),
            folder=str(Path.cwd()),
            log=str(self._folder / "logs" / f"{host}.log"),
            copies=own.copies,
            rescued=own.rescued,
        )

    def _copies(self, host: str) -> str:
        return str(Path(self._config.memory) / f"llm_jax-{self.status.run_id}" / host)

    def _start(self, team: Sequence[str]) -> list[Member]:
        self.status.most_processes = max(self.status.most_processes, self._hosts.most(), len(team))
        for folder in ("beats", "logs", "rescued"):
            (self._folder / folder).mkdir(exist_ok=True)
        address = self._hosts.address(team[0])
        return [Member(host, self._hosts, self._task(host, i, team, address), i) for i, host in enumerate(team)]

    def _bring_from_spares(self, team: Sequence[str]) -> None:
        """Hosts that the next round does not use may have copies that it needs, and keep none of them."""
        spares = [host for host in self._hosts.usable() if host not in team]
        (self._folder / "logs").mkdir(exist_ok=True)
        bringers = [
            Member(host, self._hosts, dataclasses.replace(self._task(host, 0, team, ""), command=()), 0)
            for host in spares
        ]
        deadline = time.monotonic() + self._config.bring_seconds
        for bringer in bringers:
            bringer.wait(deadline)

    def _watch(self, round_members: list[Member], team: list[str]) -> tuple[str, Member | None, str]:
        """Wait for the round's outcome: FINISHED, STOPPED, REQUEUE, CHANGED, or FAULT with whose and which it is."""
        asked, stop_by, hung_by = "", math.inf, time.monotonic() + self._config.hung_seconds
        while True:
            ended = all(one.has_ended_well() for one in round_members)  # what they said last is there to be read
            for one in round_members:
                one.look()
            if self._note_progress(round_members):
                hung_by = time.monotonic() + self._config.hung_seconds
            faults = {m: m.fault(self._config.start_seconds, self._config.frozen_seconds) for m in round_members}
            if any(faults.values()):
                culprit = min((m for m in round_members if faults[m]), key=lambda m: CAUSES.index(faults[m]))
                return FAULT, culprit, faults[culprit]
            if ended:
                return asked or FINISHED, None, ""
            if time.monotonic() > min(stop_by, hung_by):
                return FAULT, min(round_members, key=lambda m: m.beat.step), members.HUNG
            if not asked and (asked := self._wanted(team)):
                self.status.say(f"{asked}: asking the processes to save and stop")
                stop_by = time.monotonic() + self._config.stop_seconds
                for one in round_members:
                    one.stop()
            time.sleep(POLL_SECONDS)

    def _wanted(self, team: list[str]) -> str:
        """What asks the round to end: a signal, or other hosts than it has."""
        self._hosts.refresh()
        wanted = self._hosts.team()
        return self._asked or (CHANGED if wanted and set(wanted) != set(team) else "")

    def _note_progress(self, round_members: list[Member]) -> bool:
        """Whether any process has taken a step since the last look."""
        step = max(one.beat.step for one in round_members)
        if step <= self.status.step and self.status.restored:
            return False
        restored = round_members[0].beat
        if restored.restored_step < 0:
            return False
        if not self.status.restored:
            self.status.restored_at(restored.restored_step, restored.restored_from)
        if step > restored.restored_step:
            self.status.progress(step)
            if step >= restored.restored_step + 3 * max(1, self._config.copy_every):
                shutil.rmtree(self._folder / "rescued", ignore_errors=True)
        self._best_step = max(self._best_step, step)
        return True

    def _note(self, culprit: Member, what: str, round_members: list[Member]) -> None:
        for one in round_members:
            one.look()
        step = max(self.status.step, *(one.beat.step for one in round_members))
        if what in (members.LOST, members.FROZEN, members.LATE):
            self._hosts.lose(culprit.host)
        self.status.fault(Fault(what, culprit.host, culprit.index, step, len(round_members), culprit.last_words()))

    def _end(self, round_members: list[Member], outcome: str) -> None:
        """Kill what still runs; copies are taken away where a checkpoint has what they have."""
        for one in round_members:
            if outcome in (FINISHED, STOPPED, REQUEUE):
                one.tell("finish")
            one.let_go()
        deadline = time.monotonic() + FAREWELL_SECONDS
        for one in round_members:
            one.wait(deadline)
