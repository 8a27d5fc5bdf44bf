"""Pre-training that also notes which rows of data each process takes, for tests of supervised runs.

    python -m tests.parallel.elastic_worker --config=... --workdir=FOLDER

writes, beside what pre-training does, a line for every batch that a process draws to FOLDER/rows/ROUND.PROCESS.jsonl:
the step that takes it, and a checksum of each of its rows.
"""

import functools
import json
import zlib
from pathlib import Path

import numpy as np

from experiments import pretrain, runner
from llm_jax.config import TrainConfig
from llm_jax.data import loader
from llm_jax.parallel.supervision import assignment


def checksums(batch) -> list[int]:
    """A number for each row of a batch."""
    return [zlib.crc32(np.ascontiguousarray(row).tobytes()) for row in batch.tokens]


def noted(train_batches, folder: Path, config, *, start_step, **share):
    own = assignment()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{own.round if own else 0}.{share['process_index']}.jsonl"
    with (folder / name).open("a") as file:
        for i, batch in enumerate(train_batches(config, start_step=start_step, **share)):
            file.write(json.dumps({"step": start_step + i + 1, "rows": checksums(batch)}) + "\n")
            file.flush()
            yield batch


def run(config: TrainConfig, workdir: Path) -> None:
    loader.train_batches = functools.partial(noted, loader.train_batches, workdir / "rows")
    pretrain.run(config, workdir)


if __name__ == "__main__":
    runner.TOGETHER += ("elastic_worker",)
    runner.main(run, TrainConfig, "configs/pretrain/small.py", save_config=False)
