"""Processes that are measured in turns: each runs alone for a moment, round after round.

Ratios are medians of the ratios within a round, so that a slow moment of the machine hurts all of them alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Peer:
    """A running implementation that takes its turns on request."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], python: str = sys.executable) -> None:
        """Start `benchmarks.peers.MODULE` with its arguments under an interpreter that has what it needs."""
        self.name = name
        self.rounds: list[dict[str, float]] = []
        self.problem = ""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.about = self._read() or {}

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.problem = f"exit status {self.process.wait()}; see its messages above"
        return None

    def turn(self, steps: int) -> None:
        """Run `steps` steps and keep what the process reports."""
        assert self.process.stdin is not None
        start, busy = time.perf_counter(), machine_busy_seconds()
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        values = self._read()
        capacity = (time.perf_counter() - start) * (os.cpu_count() or 1)
        elsewhere = machine_busy_seconds() - busy - steps * values["processor_seconds"]
        self.rounds.append(values | {"busy_elsewhere": max(0.0, elsewhere / capacity)})

    def stop(self) -> None:
        """End the process by closing its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def median(self, key: str) -> float:
        """Over the rounds."""
        return statistics.median(round_[key] for round_ in self.rounds)


def machine_busy_seconds() -> float:
    """Processor seconds that all programs together have used since boot; 0 where the system does not say."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft_interrupts, *_ = map(int, path.read_text().split()[1:9])
    return (user + nice + system + interrupts + soft_interrupts) / os.sysconf("SC_CLK_TCK")


def speedup(peer: Peer, other: Peer | None) -> float | None:
    """How many times faster `peer` is than `other`: the median over rounds."""
    if other is None or other.problem:
        return None
    pairs = zip(peer.rounds, other.rounds, strict=True)
    return round(statistics.median(theirs["seconds"] / ours["seconds"] for ours, theirs in pairs), 3)


def take_turns(peers: Iterable[Peer], rounds: int, steps: int) -> None:
    """Let those that could start run `steps` steps each, in every round, and stop all."""
    peers = list(peers)
    for _ in range(rounds):
        for peer in peers:
            if not peer.problem:
                peer.turn(steps)
    for peer in peers:
        peer.stop()


def options_parser(about: str, shapes: Iterable[str], implementations: Sequence[str]) -> argparse.ArgumentParser:
    """The flags of a benchmark that lets `implementations` take turns; the first of them is the machine's own rate."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(shapes)
    parser.add_argument("--shapes", default=",".join(names), help="of " + ", ".join(names))
    needed = f"{implementations[0]} is needed"
    parser.add_argument("--implementations", default=",".join(implementations), help=needed)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter that has torch, transformers")
    parser.add_argument("--tunix_python", default=sys.executable, help="an interpreter that has google-tunix")
    return parser


def summary(peer: Peer) -> dict[str, Any]:
    """What every benchmark's JSON line says of a peer that ran."""
    return {
        "rounds": len(peer.rounds),
        "median_ms": round(1e3 * peer.median("seconds"), 1),
        "processor_ms": round(1e3 * peer.median("processor_seconds"), 1),
        "busy_elsewhere": round(peer.median("busy_elsewhere"), 3),
    }
