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
import sys
from typing import Any

from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.turns import Peer, options_parser, speedup, summary, take_turns

IMPLEMENTATIONS = ("gemm", "ours", "plain_jax", "torch_llama", "tunix_llama")
GEMM_FLOPS = 2 * 2048**3


def report(name: str, peer: Peer, peers: dict[str, Peer]) -> dict[str, Any]:
    """The JSON line of one implementation."""
    line: dict[str, Any] = {"benchmark": "train_step", "shape": name, "implementation": peer.name, **peer.about}
    if peer.problem:
        return line | {"skipped": peer.problem}
    shape, seconds = SHAPES[name], peer.median("seconds")
    line |= summary(peer)
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
        python = pythons.get(implementation, sys.executable)
        peers[implementation] = Peer(implementation, implementation, [name], python)
    take_turns(peers.values(), options.rounds, options.steps)
    for peer in peers.values():
        print(json.dumps(report(name, peer, peers)), flush=True)


def main(arguments: list[str]) -> None:
    """Measure every shape asked for."""
    parser = options_parser(str(__doc__), SHAPES, IMPLEMENTATIONS)
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn; its time is their median")
    options = parser.parse_args(arguments)
    for name in options.shapes.split(","):
        measure(name, options)


if __name__ == "__main__":
    main(sys.argv[1:])
