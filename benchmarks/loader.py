"""Tokens a second that the loader delivers on one core, mixture and packing included.

    python -m benchmarks.loader [--dataset=FOLDER]

Without --dataset, reads two synthetic sources of documents of about 100 to 2,000 tokens. Prints a JSON line for each
sequence length.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from llm_jax.config import DataConfig
from llm_jax.data import loader, records

VOCAB_SIZE = 32_000
DOCUMENTS = 10_000
MEDIAN, SPREAD = 450, 0.75  # of the log-normal lengths: 95 % lie between 100 and 2,000
SHAPES = ((8, 256), (4, 512), (16, 4096))  # sequences in a batch, tokens in a sequence
SECONDS = 5.0


def write_dataset(folder: Path) -> None:
    """Two sources of random documents."""
    generator = np.random.default_rng(0)
    sources = {}
    for name in ("first", "second"):
        writer = records.SplitWriter(folder, name, "train", VOCAB_SIZE)
        for length in generator.lognormal(np.log(MEDIAN), SPREAD, DOCUMENTS).astype(int) + 2:
            # Zipf's law makes the records about as compressible as text.
            writer.add((generator.zipf(1.3, length) % VOCAB_SIZE).tolist(), 4 * int(length), "0" * 16)
        heldout = records.SplitWriter(folder, name, "heldout", VOCAB_SIZE).finish()
        sources[name] = records.SourceSummary("und", 0, writer.finish(), heldout)
    records.write_metadata(folder, records.Summary(VOCAB_SIZE, "none", "none", "none", sources))


def measure(dataset: Path, batch_size: int, sequence_length: int) -> dict[str, object]:
    """Run the loader for some seconds, from a step in the middle of an epoch."""
    config = DataConfig(dataset=str(dataset), batch_size=batch_size, sequence_length=sequence_length)
    batches = loader.train_batches(config, start_step=100)
    started = time.perf_counter()
    next(batches)
    first = time.perf_counter() - started
    for _ in range(2 * config.prefetch):  # what was prepared in advance counts for nothing
        next(batches)
    count, started, cpu_started = 0, time.perf_counter(), time.process_time()
    while (seconds := time.perf_counter() - started) < SECONDS:
        next(batches)
        count += 1
    tokens = count * batch_size * sequence_length
    return {
        "benchmark": "loader",
        "batch": [batch_size, sequence_length],
        "tokens_per_second": round(tokens / seconds),
        # What the same core gives when nothing else runs on it.
        "tokens_per_cpu_second": round(tokens / (time.process_time() - cpu_started)),
        "first_batch_seconds": round(first, 3),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure every shape on one core."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="a folder that experiments.prepare_data wrote")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        if arguments.dataset is None:
            write_dataset(Path(folder))
        for batch_size, sequence_length in SHAPES:
            print(json.dumps(measure(arguments.dataset or Path(folder), batch_size, sequence_length)), flush=True)


if __name__ == "__main__":
    main()
