"""An iteration of PPO beside TRL's PPOTrainer and Tunix's PPOLearner, in float32 on CPU.

    python -m benchmarks.ppo [--rounds=8] [--steps=2] [--trl_python=PATH] [--tunix_python=PATH]

All begin with the same random weights (1.9 million parameters) and prompts: 32 of 8 tokens, to which the policy draws
24 more each at temperature 1; no token ends a response, so that all are of full length. All score them with the same
function of their tokens, which takes next to no time, and update policy and critic on 2 minibatches of 16 responses in
each of 4 epochs, with the same losses. What each has of its own: TRL takes the policy's old log-probabilities from its
draws, and we compute them anew (with entropies, by which the draws are checked); Tunix draws the second minibatch from
the policy that has learned from the first one, and cuts scores down to integers; we clip no gradients, as the others do
not, but leave out updates that are not finite.

The implementations take turns, each in the loop of its own trainer; prints one JSON line for each. `share_...` is the
share of an iteration's time in rolling out, scoring (with what reference and critic say) and updating.
`speed_over_trl` is the ratio of seconds of an iteration, `processor_speed_over_trl` that of processor seconds, as the
median, least and greatest over rounds; `..._over_tunix` likewise. The benchmark stops where one side learned from other
numbers of tokens than another, or where the entropies of their first draws are not alike. `gemm` and `busy_elsewhere`
are as in benchmarks.fine_tuning, and so is --busy=0.06, which leaves out rounds in which other programs were busy.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks.fine_tuning import check_trl, keep_quiet
from benchmarks.peers import gemm, ours_ppo, ppo_setting
from benchmarks.peers.turns import Peer, summary, take_turns
from llm_jax import models
from llm_jax.interop import huggingface

IMPLEMENTATIONS = {"gemm": "gemm", "ours": "ours_ppo", "trl": "trl_ppo", "tunix": "tunix_ppo"}
TOLERANCE = 0.01  # relative, between the entropies of draws with other random numbers


def prepare(workdir: Path) -> Path:
    """Write the policy that all begin with as a Hugging Face folder, and return it."""
    folder, config = workdir / "model", ours_ppo.architecture()
    if not folder.is_dir():
        workdir.mkdir(parents=True, exist_ok=True)
        huggingface.save(folder, config, models.init(config, jax.random.key(0)), family="llama")
    return folder


def check_same(peers: Mapping[str, Peer]) -> None:
    """End the program where an implementation's first iteration is not the one that is meant, or unlike another's."""
    found = [peer for name, peer in peers.items() if name != "gemm" and not peer.problem]
    for peer in found:
        if peer.about["first_done"] != ppo_setting.LEARNED:
            sys.exit(f"{peer.name} learned from {peer.about['first_done']:g} tokens, not {ppo_setting.LEARNED}")
        entropies = [each.about["first_loss"] for each in (found[0], peer)]
        if not math.isclose(*entropies, rel_tol=TOLERANCE):
            sys.exit(f"{found[0].name} and {peer.name} do not draw alike: entropies of {entropies}")


def times_faster(peer: Peer, other: Peer | None, key: str) -> dict[str, float] | None:
    """By how much the other's `key` is above the peer's: over the rounds."""
    if other is None or other.problem:
        return None
    values = [theirs[key] / mine[key] for mine, theirs in zip(peer.rounds, other.rounds, strict=True)]
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, 2) for name, value in found.items()}


def shares(peer: Peer) -> dict[str, float]:
    """Of an iteration's time in each of its parts."""
    parts = [name for name in peer.rounds[0] if name.startswith("seconds_")]
    whole = {part: sum(turn[part] for turn in peer.rounds) for part in parts}
    return {part.replace("seconds", "share"): round(whole[part] / sum(whole.values()), 3) for part in parts}


def report(peer: Peer, peers: Mapping[str, Peer]) -> dict[str, Any]:
    """The JSON line of one implementation."""
    line: dict[str, Any] = {"benchmark": "ppo", "implementation": peer.name, **peer.about}
    if peer.problem:
        return line | {"skipped": peer.problem}
    line |= summary(peer)
    if peer.name == "gemm":
        return line | {"gflops": round(gemm.FLOPS / peer.median("seconds") / 1e9, 1)}
    line |= {"entropy": line.pop("first_loss"), "learned_tokens": line.pop("first_done"), **shares(peer)}
    if peer.name == "ours":
        for other in ("trl", "tunix"):
            line[f"speed_over_{other}"] = times_faster(peer, peers.get(other), "seconds")
            line[f"processor_speed_over_{other}"] = times_faster(peer, peers.get(other), "processor_seconds")
    return line


def main(arguments: list[str]) -> None:
    """Measure all implementations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="of them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="iterations in a turn")
    parser.add_argument("--busy", type=float, default=1.0, help="leave out rounds with more of busy_elsewhere")
    parser.add_argument("--trl_python", default=sys.executable, help="an interpreter that has trl")
    parser.add_argument("--tunix_python", default=sys.executable, help="an interpreter that has google-tunix")
    parser.add_argument("--workdir", default="runs/benchmark_ppo", help="for the model")
    options = parser.parse_args(arguments)
    wanted = options.implementations.split(",")
    if "trl" in wanted:
        check_trl(options.trl_python)
    folder = prepare(Path(options.workdir).absolute())
    pythons = {"trl": options.trl_python, "tunix": options.tunix_python}
    peers = {}
    for name in (name for name in IMPLEMENTATIONS if name in wanted):
        own = ([str(folder)], pythons[name]) if name in pythons else ([],)
        peers[name] = Peer(name, IMPLEMENTATIONS[name], *own)
    check_same(peers)
    take_turns(peers.values(), options.rounds, options.steps)
    keep_quiet(peers.values(), options.busy)
    for peer in peers.values():
        print(json.dumps(report(peer, peers)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
