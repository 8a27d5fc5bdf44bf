"""How long the train step takes to compile as layers are added, and how much a second start saves.

    python -m benchmarks.compile_time [--rounds=3]

Every start is a process of its own, with an empty compilation cache or with the one that the cold start before it
filled; depths take turns within a round. `compile_seconds` is the step's own; `first_step_seconds` runs from the
process's start to the end of its first step, imports and initialisation included. Prints one JSON line per depth and
one with the ratios; medians over rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

LAYERS = (4, 16, 64)
HIDDEN, VOCAB_SIZE, BATCH, LENGTH = 128, 4096, 4, 128
Times = dict[str, float]


def first_step(layers: int, started: float) -> Times:
    """Compile and run one train step of a scanned model in this process."""
    import jax

    from llm_jax.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig, from_config_dict
    from llm_jax.optim import adamw, schedules
    from llm_jax.parallel import mesh as mesh_lib
    from llm_jax.training import language_model, state, step
    from llm_jax.training.loop import place

    sizes = {"hidden_size": HIDDEN, "ffn_size": 3 * HIDDEN, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64}
    model = from_config_dict(
        ModelConfig, {"vocab_size": VOCAB_SIZE, "num_layers": layers, "max_length": LENGTH, **sizes}
    )
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:1])
    optimizer = adamw.build(OptimizerConfig(), adamw.decay_mask)
    current = state.init_state(model, optimizer, mesh, jax.random.key(0))
    schedule = schedules.learning_rate(OptimizerConfig(), 10_000)
    update = step.update_function(language_model.loss_function(model, LossConfig()), optimizer)
    with jax.set_mesh(mesh):
        batch = place(_batch(), mesh)
        compile_started = time.time()
        arguments = current, batch, step.seed_number(0), schedule
        compiled = jax.jit(update, donate_argnums=0).lower(*arguments).compile()
        compile_seconds = time.time() - compile_started
        jax.block_until_ready(compiled(*arguments))
    return {"compile_seconds": compile_seconds, "first_step_seconds": time.time() - started}


def _batch():  # type: ignore[no-untyped-def]
    import numpy as np

    from llm_jax.data.batch import Batch

    zeros = np.zeros((BATCH, LENGTH), np.int32)
    return Batch(zeros, zeros, np.ones((BATCH, LENGTH), np.float32), zeros + 1, zeros)


def start(layers: int, cache: str) -> Times:
    """`first_step` in a new process that uses the compilation cache in the folder `cache`."""
    command = [sys.executable, "-m", "benchmarks.compile_time", f"--child={layers}", f"--started={time.time()}"]
    settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    output = subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(rounds: int) -> None:
    """Print the medians per depth, then the ratios."""
    cold: dict[int, list[Times]] = {layers: [] for layers in LAYERS}
    warm: dict[int, list[Times]] = {layers: [] for layers in LAYERS}
    for _ in range(rounds):
        for layers in LAYERS:
            with tempfile.TemporaryDirectory() as cache:
                cold[layers].append(start(layers, cache))
                warm[layers].append(start(layers, cache))
    for layers in LAYERS:
        line = {f"cold_{name}": _median(cold[layers], name) for name in cold[layers][0]}
        line |= {f"warm_{name}": _median(warm[layers], name) for name in warm[layers][0]}
        print(json.dumps({"benchmark": "compile_time", "layers": layers, **line}))
    compiles = [_median(cold[layers], "compile_seconds") for layers in LAYERS]
    ratios = [
        statistics.median(w["first_step_seconds"] / c["first_step_seconds"] for c, w in zip(cold[n], warm[n]))
        for n in LAYERS
    ]
    print(
        json.dumps(
            {
                "benchmark": "compile_time",
                "slowest_over_fastest_compile": round(max(compiles) / min(compiles), 2),
                "warm_over_cold_first_step": [round(ratio, 2) for ratio in ratios],
            }
        )
    )


def _median(times: list[Times], name: str) -> float:
    return round(statistics.median(entry[name] for entry in times), 2)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(first_step(arguments.child, arguments.started)))
    else:
        measure(arguments.rounds)


if __name__ == "__main__":
    main()
