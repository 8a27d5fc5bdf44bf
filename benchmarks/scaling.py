"""How well the small models of a sweep use a CPU.

    python -m benchmarks.scaling [--shapes=d16,d32,d64,d96,d128,d192]

For every size, the float32 train step of 4 x 128 tokens beside the products that it consists of: each of its matrix
products, forward and both backward ones, as often as the step has it and nothing else. The ratio of the two times,
`share_of_products`, is the step's rate over the rate that its own matrix shapes allow on this machine (the harmonic
mean of the products' rates, weighted by their operations, each computed in the way that is fastest here);
`processor_share` is that ratio of processor times, which other programs disturb less. The two take turns; prints one
JSON line per size and implementation. `busy_elsewhere` is the share of the machine that other programs took meanwhile.
"""

import json
import statistics
import sys
from typing import Any

from benchmarks.peers.shapes import ALL, SMALL
from benchmarks.peers.turns import Peer, options_parser, summary, take_turns

IMPLEMENTATIONS = ("products", "ours")


def per_step(peer: Peer, key: str) -> list[float]:
    """Seconds of one step, in each round: "seconds" on the clock or "processor_seconds"."""
    return [round_[key] / peer.about.get("repeats", 1) for round_ in peer.rounds]


def share(peer: Peer, products: Peer, key: str) -> float:
    """The time of the products alone over the step's: the median over rounds."""
    pairs = zip(per_step(peer, key), per_step(products, key), strict=True)
    return round(statistics.median(bound / own for own, bound in pairs), 3)


def report(name: str, peer: Peer, products: Peer) -> dict[str, Any]:
    """The JSON line of one implementation."""
    line: dict[str, Any] = {"benchmark": "scaling", "shape": name, "implementation": peer.name, **peer.about}
    line.pop("first_loss", None)
    if peer.problem:
        return line | {"skipped": peer.problem}
    median = statistics.median(per_step(peer, "seconds"))
    return line | {
        **summary(peer),
        "median_ms": round(1e3 * median, 2),
        "processor_ms": round(1e3 * statistics.median(per_step(peer, "processor_seconds")), 2),
        "gflops": round(ALL[name].flops / median / 1e9, 1),
        "share_of_products": share(peer, products, "seconds"),
        "processor_share": share(peer, products, "processor_seconds"),
    }


def measure(name: str, rounds: int, steps: int) -> None:
    """Measure one shape and print its lines."""
    peers = [Peer(implementation, implementation, [name]) for implementation in IMPLEMENTATIONS]
    take_turns(peers, rounds, steps)
    for peer in peers:
        print(json.dumps(report(name, peer, peers[0])), flush=True)


def main(arguments: list[str]) -> None:
    """Measure every shape asked for."""
    parser = options_parser(str(__doc__), SMALL, IMPLEMENTATIONS)
    parser.add_argument("--steps", type=int, default=10, help="steps in a turn; its time is their median")
    options = parser.parse_args(arguments)
    for name in options.shapes.split(","):
        measure(name, options.rounds, options.steps)


if __name__ == "__main__":
    main(sys.argv[1:])
