"""The train step of two LLaMA-style models in float32 beside torch, Tunix and a plain JAX step.

    python -m benchmarks.train_step [--shapes=S,M] [--torch_python=PATH] [--tunix_python=PATH]

Every implementation runs in a process of its own, and they take turns: the medians are over rounds, and ratios are
medians of the ratios within a round, so that a slow moment of the machine hurts all of them alike. Prints one JSON
line per shape and implementation; one that cannot be imported is reported as skipped. Rates count the matmuls of a
step, with attention counted in full. `share_of_gemm` relates them to a 2048 x 2048 product measured in the same
rounds; `processor_ms` is processor time, which other programs on the machine disturb less. `busy_elsewhere` is the
share of the machine that other programs took during an implementation's turns (Linux): above a few percent, times and
ratios say little, those of torch least of all, whose threads wait for each other by spinning.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.shapes import SHAPES

ROOT = Path(__file__).parents[1]
IMPLEMENTATIONS = ("gemm", "ours", "plain_jax", "torch_llama", "tunix_llama")
GEMM_FLOPS = 2 * 2048**3


class Peer:
    """A running implementation that takes its turns on request."""

    def __init__(self, name: str, shape: str, python: str) -> None:
        self.name = name
        self.rounds: list[dict[str, float]] = []
        self.problem = ""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.{name}", shape],
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


def report(name: str, peer: Peer, peers: dict[str, Peer]) -> dict[str, Any]:
    """The JSON line of one implementation."""
    line: dict[str, Any] = {"benchmark": "train_step", "shape": name, "implementation": peer.name, **peer.about}
    if peer.problem:
        return line | {"skipped": peer.problem}
    shape, seconds = SHAPES[name], peer.median("seconds")
    line |= {"rounds": len(peer.rounds), "median_ms": round(1e3 * seconds, 1)}
    line["processor_ms"] = round(1e3 * peer.median("processor_seconds"), 1)
    line["busy_elsewhere"] = round(peer.median("busy_elsewhere"), 3)
    if peer.name == "gemm":
        return line | {"gflops": round(GEMM_FLOPS / seconds / 1e9, 1)}
    gemm_rate = GEMM_FLOPS / peers["gemm"].median("seconds")
    return line | {
        "tokens_per_second": round(shape.tokens / seconds),
        "gflops": round(shape.flops / seconds / 1e9, 1),
        "share_of_gemm": round(shape.flops / seconds / gemm_rate, 3),
        "speed_over_torch": speedup(peer, peers.get("torch_llama")),
        "speed_over_plain_jax": speedup(peer, peers.get("plain_jax")),
        "loss": round(peer.rounds[-1]["loss"], 4),
    }


def measure(name: str, options: argparse.Namespace) -> None:
    """Measure one shape and print its lines."""
    pythons = {"torch_llama": options.torch_python, "tunix_llama": options.tunix_python}
    peers = {}
    for implementation in options.implementations.split(","):
        peers[implementation] = Peer(implementation, name, pythons.get(implementation, sys.executable))
    alive = [peer for peer in peers.values() if not peer.problem]
    for _ in range(options.rounds):
        for peer in alive:
            peer.turn(options.steps)
    for peer in peers.values():
        peer.stop()
        print(json.dumps(report(name, peer, peers)), flush=True)


def main(arguments: list[str]) -> None:
    """Measure every shape asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="the GEMM rate is needed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn; its time is their median")
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter that has torch, transformers")
    parser.add_argument("--tunix_python", default=sys.executable, help="an interpreter that has google-tunix")
    options = parser.parse_args(arguments)
    for name in options.shapes.split(","):
        measure(name, options)


if __name__ == "__main__":
    main(sys.argv[1:])
