"""Supervised fine-tuning and reward models beside TRL's SFTTrainer and RewardTrainer, in float32 on CPU.

    python -m benchmarks.fine_tuning [--shapes=S,smollm2] [--trl_python=PATH]

All begin with the same random weights and train on the same tokens: the conversations of
experiments.prepare_instructions, of which only the replies are learned, and pairs of English texts that people rated;
at most 256 tokens in a row. The rate is of learned tokens, or of pairs, in a second of whole steps, the reading of
batches included. The layouts of a batch:

- packed: 8 rows that each hold several conversations, or pairs. TRL puts its rows one after the other into a single
  one; `trl_packed_rows` lets it take them one by one and add up their gradients.
- padded: as many conversations, or pairs, as 8 packed rows hold on average. Ours are padded to 256 tokens, TRL's to the
  longest of the batch.
- grouped: the same, of similar length (TRL's `group_by_length`, its batches shuffled).

Where two layouts hold the same first batch, first losses must agree, or the benchmark stops. The implementations take
turns; prints one JSON line for each. `speed_over_trl` is the rate over that of TRL's fastest layout in the same round,
and `speed_over_padded` over our own padded batches, as the median, least and greatest ratio over rounds.
`gemm` is the machine's own rate, of 2048 x 2048 products. `busy_elsewhere` is the share of the machine that other
programs took meanwhile: above a few percent, times and ratios say little, those of TRL least of all, as torch's threads
wait for each other by spinning. --busy=0.06 leaves such rounds out.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers import fine_tuning_data, gemm
from benchmarks.peers.shapes import GENERATIONS
from benchmarks.peers.turns import Peer, options_parser, summary, take_turns

# By task: the module and the layout of each implementation.
IMPLEMENTATIONS = {
    "sft": {
        "gemm": ("gemm", ""),
        "ours": ("ours_fine_tuning", "packed"),
        "ours_padded": ("ours_fine_tuning", "padded"),
        "trl_packed": ("trl_sft", "packed"),
        "trl_packed_rows": ("trl_sft", "packed_rows"),
        "trl_padded": ("trl_sft", "padded"),
        "trl_grouped": ("trl_sft", "grouped"),
    },
    "reward": {
        "gemm": ("gemm", ""),
        "ours": ("ours_fine_tuning", "packed"),
        "trl_padded": ("trl_reward", "padded"),
        "trl_grouped": ("trl_reward", "grouped"),
    },
}
UNITS = {"sft": "learned_tokens_per_second", "reward": "pairs_per_second"}
# Those whose first batches hold the same samples.
SAME = {
    "sft": (("ours", "trl_packed", "trl_packed_rows"), ("ours_padded", "trl_padded")),
    "reward": (("ours", "trl_padded"),),
}
WARM_UP = 3  # steps before the first turn, and one more that a trainer may read ahead
TOLERANCE = 1e-4  # relative, between first losses in float32


def ratios(peer: Peer, others: list[Peer]) -> dict[str, float] | None:
    """The peer's rate over that of the fastest of others, over rounds."""
    found = [other for other in others if not other.problem]
    if not found:
        return None
    rounds = zip(peer.rounds, *(other.rounds for other in found), strict=True)
    values = [ours["rate"] / max(other["rate"] for other in theirs) for ours, *theirs in rounds]
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def check_same(task: str, peers: Mapping[str, Peer]) -> None:
    """End the program where implementations of the same first batch do not agree on its loss or its size."""
    for names in SAME[task]:
        found = [peers[name] for name in names if name in peers and not peers[name].problem]
        for peer in found[1:]:
            first, other = found[0].about, peer.about
            same = math.isclose(first["first_loss"], other["first_loss"], rel_tol=TOLERANCE)
            if not same or first["first_done"] != other["first_done"]:
                sys.exit(f"{found[0].name} and {peer.name} do not do the same work: {first} and {other}")


def keep_quiet(peers: Iterable[Peer], limit: float) -> None:
    """Forget the rounds in which other programs took more than a share of the machine during someone's turn."""
    running = [peer for peer in peers if not peer.problem]
    quiet = [max(turn["busy_elsewhere"] for turn in turns) <= limit for turns in zip(*(p.rounds for p in running))]
    if not any(quiet):
        sys.exit(f"other programs took more than {limit:.0%} of the machine in every round: try again, or raise --busy")
    for peer in running:
        peer.rounds = [turn for turn, kept in zip(peer.rounds, quiet, strict=True) if kept]


def report(task: str, name: str, peer: Peer, peers: Mapping[str, Peer]) -> dict[str, Any]:
    """The JSON line of one implementation."""
    line: dict[str, Any] = {"benchmark": "fine_tuning", "task": task, "shape": name, "implementation": peer.name}
    line |= peer.about
    if peer.problem:
        return line | {"skipped": peer.problem}
    line |= summary(peer)
    if peer.name == "gemm":
        return line | {"gflops": round(gemm.FLOPS / peer.median("seconds") / 1e9, 1)}
    line[UNITS[task]] = round(peer.median("rate"), 1)
    if peer.name == "ours":
        line["speed_over_trl"] = ratios(peer, [other for key, other in peers.items() if key.startswith("trl")])
    if peer.name == "ours" and "ours_padded" in peers:
        line["speed_over_padded"] = ratios(peer, [peers["ours_padded"]])
    return line


def measure(task: str, name: str, folder: Path, options: argparse.Namespace) -> None:
    """Measure one task on one shape, whose data are in a folder, and print its lines."""
    peers = {}
    for implementation, (module, layout) in IMPLEMENTATIONS[task].items():
        if implementation in options.implementations.split(","):
            arguments = {"gemm": [], "ours_fine_tuning": [task, str(folder), layout]}.get(module, [str(folder), layout])
            python = options.trl_python if module.startswith("trl") else sys.executable
            peers[implementation] = Peer(implementation, module, arguments, python)
    check_same(task, peers)
    take_turns(peers.values(), options.rounds, options.steps)
    keep_quiet(peers.values(), options.busy)
    for peer in peers.values():
        print(json.dumps(report(task, name, peer, peers)), flush=True)


def check_trl(python: str) -> None:
    """End the program with one line if the interpreter has no TRL."""
    found = subprocess.run([python, "-c", "import trl"], capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["it does not start"])[-1]
        sys.exit(f"{python} has no TRL ({reason}): pip install -e '.[bench]', or name another one with --trl_python")


def main(arguments: list[str]) -> None:
    """Measure every task and shape asked for."""
    every = list(dict.fromkeys(name for names in IMPLEMENTATIONS.values() for name in names))
    parser = options_parser(str(__doc__), GENERATIONS, every)
    parser.set_defaults(shapes="S")
    parser.add_argument("--tasks", default=",".join(IMPLEMENTATIONS), help="of " + ", ".join(IMPLEMENTATIONS))
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    parser.add_argument("--busy", type=float, default=1.0, help="leave out rounds with more of busy_elsewhere")
    parser.add_argument("--trl_python", default=sys.executable, help="an interpreter that has trl")
    parser.add_argument("--workdir", default="runs/benchmark_fine_tuning", help="for models and data")
    options = parser.parse_args(arguments)
    if "trl" in options.implementations:
        check_trl(options.trl_python)
    for name in options.shapes.split(","):
        steps = WARM_UP + options.rounds * options.steps
        folder = fine_tuning_data.prepare(Path(options.workdir).absolute(), name, steps)
        for task in options.tasks.split(","):
            measure(task, name, folder, options)


if __name__ == "__main__":
    main(sys.argv[1:])
