"""Memory and time of the chunked cross-entropy beside one that holds all logits, with Baichuan-2's vocabulary.

    python -m benchmarks.loss_memory

Prints one JSON line per variant and one that compares them. Memory is XLA's temporary memory of the compiled
gradient, and the peak resident memory above what the process holds for inputs and results (the gradients themselves
are 266 MB at the default size); each variant runs in a process of its own. Times are medians of rounds in which the
variants take turns, and the gradients are compared.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import LossConfig
from llm_jax.losses.cross_entropy import chunked_cross_entropy

VARIANTS = ("unchunked", "chunked")
# Largest difference of the two gradients over the largest gradient: both are float32.
TOLERANCE = 1e-4


def unchunked(hidden_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The sum of cross-entropies over materialised logits, as it is usually written."""
    logprobs_BTV = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden_BTD, unembedding_VD))
    return -jnp.sum(jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1))


def chunked(hidden_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array, *, chunk_size: int) -> jax.Array:
    """The same sum from the library."""
    weights_BT = jnp.ones(targets_BT.shape, jnp.float32)
    config = LossConfig(chunk_size=chunk_size)
    return chunked_cross_entropy(hidden_BTD, unembedding_VD, targets_BT, weights_BT, config).total


def compile_gradient(variant: str, options: argparse.Namespace, inputs: tuple[jax.Array, ...]) -> Callable:
    """The compiled value and gradient of a variant for hidden and unembedding."""
    loss = unchunked if variant == "unchunked" else functools.partial(chunked, chunk_size=options.chunk_size)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()


def make_inputs(options: argparse.Namespace) -> tuple[jax.Array, ...]:
    """Hidden states, unembedding and targets."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (options.batch, options.length)
    hidden_BTD = jax.random.normal(keys[0], (*shape, options.hidden))
    unembedding_VD = 0.02 * jax.random.normal(keys[1], (options.vocabulary, options.hidden))
    return jax.block_until_ready(
        (hidden_BTD, unembedding_VD, jax.random.randint(keys[2], shape, 0, options.vocabulary))
    )


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure_memory(variant: str, options: argparse.Namespace) -> None:
    """Print the JSON line of one variant; to be called in a fresh process."""
    inputs = make_inputs(options)
    gradient = compile_gradient(variant, options, inputs)
    before = resident_bytes()
    jax.block_until_ready(gradient(*inputs))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    analysis = gradient.memory_analysis()  # type: ignore[attr-defined]
    line = {
        "variant": variant,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "output_bytes": analysis.output_size_in_bytes,
        "resident_peak_bytes": peak - analysis.output_size_in_bytes,
    }
    print(json.dumps(line), flush=True)


def measure_time(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each variant, taking turns, after one round that only compares their results."""
    inputs = make_inputs(options)
    gradients = {variant: compile_gradient(variant, options, inputs) for variant in VARIANTS}
    check_agreement(*(gradient(*inputs) for gradient in gradients.values()))
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.rounds):
        for variant, gradient in gradients.items():
            start = time.perf_counter()
            jax.block_until_ready(gradient(*inputs))
            seconds[variant].append(time.perf_counter() - start)
    return {variant: float(np.median(times)) for variant, times in seconds.items()}


def check_agreement(expected: tuple, actual: tuple) -> None:
    """Exit unless loss and gradients agree."""
    for e, a in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        difference = float(jnp.max(jnp.abs(e - a)) / jnp.max(jnp.abs(e)))
        if difference > TOLERANCE:
            sys.exit(f"the variants disagree: relative difference {difference:.1e}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=125_696)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--chunk_size", type=int, default=LossConfig().chunk_size)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=VARIANTS, help="measure one variant's memory in this process")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure both variants' memory in processes of their own, then their time together."""
    options = parse(arguments)
    if options.only:
        measure_memory(options.only, options)
        return
    command = [sys.executable, "-m", "benchmarks.loss_memory", *arguments]
    lines = [subprocess.check_output([*command, "--only", variant], text=True) for variant in VARIANTS]
    print("".join(lines), end="", flush=True)
    unchunked_memory, chunked_memory = (json.loads(line) for line in lines)
    seconds = measure_time(options)
    ratios = {
        f"{key}_ratio": round(chunked_memory[key] / unchunked_memory[key], 4)
        for key in ("temporary_bytes", "resident_peak_bytes")
    }
    shape = {key: getattr(options, key) for key in ("vocabulary", "hidden", "batch", "length", "chunk_size", "rounds")}
    times = {f"{variant}_seconds": round(value, 3) for variant, value in seconds.items()}
    ratio = round(seconds["chunked"] / seconds["unchunked"], 3)
    print(json.dumps({"benchmark": "loss_memory", **shape, **ratios, **times, "time_ratio": ratio}))


if __name__ == "__main__":
    main(sys.argv[1:])
