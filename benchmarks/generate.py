"""Greedy generation on CPU in float32, beside Hugging Face's `generate` and Tunix's sampler.

    python -m benchmarks.generate [--shapes=S,M,smollm2] [--torch_python=PATH] [--tunix_python=PATH]

Batch 8, prompts of 64 tokens, 128 new ones; the models have random weights. The implementations take turns. Prints one
JSON line per shape and implementation; one that cannot be imported is reported as skipped. `share_of_bandwidth` relates
the time to what copying memory allows: a decoding step has to read the weights once, and the copy's rate, measured in
the same rounds, counts the bytes read and those written. For rounded weights it still counts float32's bytes, so that
it can pass 1. `speed_over_best` is the speed over the fastest of the other libraries, in the median round.
`busy_elsewhere` is the share of the machine that other programs took meanwhile.
"""

import argparse
import json
import statistics
import sys
from typing import Any

from benchmarks.peers import copy
from benchmarks.peers.shapes import GENERATIONS
from benchmarks.peers.turns import Peer, options_parser, summary, take_turns

IMPLEMENTATIONS = {
    "copy": ("copy", ()),
    "ours": ("ours_generate", ("float32",)),
    "ours_int8_cache": ("ours_generate", ("int8_cache",)),
    "ours_int8": ("ours_generate", ("int8",)),
    "ours_int4": ("ours_generate", ("int4",)),
    "torch_dynamic": ("torch_generate", ("dynamic",)),
    "torch_static": ("torch_generate", ("static",)),
    "tunix": ("tunix_generate", ()),
}
OTHERS = ("torch_dynamic", "torch_static", "tunix")


def speed_over_best(peer: Peer, peers: dict[str, Peer]) -> float | None:
    """How many times faster `peer` is than the fastest of the other libraries: the median over rounds."""
    others = [peers[name] for name in OTHERS if name in peers and not peers[name].problem]
    if not others:
        return None
    rounds = zip(peer.rounds, *(other.rounds for other in others), strict=True)
    ratios = (min(other["seconds"] for other in theirs) / ours["seconds"] for ours, *theirs in rounds)
    return round(statistics.median(ratios), 3)


def share_of_bandwidth(name: str, peer: Peer, copies: Peer) -> float:
    """The least time that the weights' bytes need over the time taken: the median over rounds."""
    shape = GENERATIONS[name]
    read = shape.weight_bytes * shape.new_tokens
    rounds = zip(peer.rounds, copies.rounds, strict=True)
    return round(
        statistics.median(read / (2 * copy.BYTES / copied["seconds"]) / ours["seconds"] for ours, copied in rounds), 3
    )


def report(name: str, peer: Peer, peers: dict[str, Peer]) -> dict[str, Any]:
    """The JSON line of one implementation."""
    line: dict[str, Any] = {"benchmark": "generate", "shape": name, "implementation": peer.name, **peer.about}
    line.pop("first_loss", None)
    if peer.problem:
        return line | {"skipped": peer.problem}
    line |= summary(peer)
    if peer.name == "copy":
        return line | {"gigabytes_per_second": round(2 * copy.BYTES / peer.median("seconds") / 1e9, 1)}
    shape = GENERATIONS[name]
    return line | {
        "tokens_per_second": round(shape.batch * shape.new_tokens / peer.median("seconds")),
        "share_of_bandwidth": share_of_bandwidth(name, peer, peers["copy"]),
        "speed_over_best": speed_over_best(peer, peers),
    }


def measure(name: str, options: argparse.Namespace) -> None:
    """Measure one shape and print its lines."""
    pythons = {"torch_generate": options.torch_python, "tunix_generate": options.tunix_python}
    peers = {}
    for implementation in options.implementations.split(","):
        module, kinds = IMPLEMENTATIONS[implementation]
        arguments = () if implementation == "copy" else (name, *kinds)
        peers[implementation] = Peer(implementation, module, arguments, pythons.get(module, sys.executable))
    take_turns(peers.values(), options.rounds, options.steps)
    for peer in peers.values():
        print(json.dumps(report(name, peer, peers)), flush=True)


def main(arguments: list[str]) -> None:
    """Measure every shape asked for."""
    parser = options_parser(str(__doc__), GENERATIONS, list(IMPLEMENTATIONS))
    parser.add_argument("--steps", type=int, default=1, help="generations in a turn; its time is their median")
    options = parser.parse_args(arguments)
    for name in options.shapes.split(","):
        measure(name, options)


if __name__ == "__main__":
    main(sys.argv[1:])
