"""The real train step, compiled for devices that need not be here, and what its compiler says of it.

    python -m llm_jax.training.ahead_of_time FOLDER

`compile_for` writes a request to the folder and starts this in a process of its own, because compilers read their
settings when they start; the answer is there afterwards: `step.hlo.txt` and `compiled.json`.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import config as config_lib
from llm_jax.config import TrainConfig
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.files import write_json
from llm_jax.optim import schedules
from llm_jax.parallel import absent, hardware, rules
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel.hardware import Target
from llm_jax.training import language_model, state

LONGEST_SECONDS = 3600
LOWERING = {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}
BATCH_DTYPES = Batch("int32", "int32", "float32", "int32", "int32")  # type: ignore[arg-type]  # dtypes in its place
CONFIG, REQUEST, TEXT, ANSWER = "config.json", "request.json", "step.hlo.txt", "compiled.json"


class TooLargeError(UserError):
    """A compiler that has refused a step for the memory that it needs."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made of a step, for one device."""

    text: str
    arguments: int  # bytes that are there when the step begins: the state and the batch
    temporaries: int  # bytes that it needs beside them, with what lies unused between them
    results: int  # bytes of results that take no argument's place
    peak: int  # bytes in the fullest moment, as the compiler counts
    lower_seconds: float
    compile_seconds: float
    sizes: Mapping[str, int]  # of the mesh's axes
    hosts: Sequence[int]  # of each device, in the mesh's order

    @property
    def bytes(self) -> int:
        """What the device must have free for it."""
        return self.arguments + self.temporaries + self.results


def lower(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The update of pre-training, with the shapes and shardings that a run of `config` on this mesh has."""
    optimizer = state.optimizer(config.model, config.optimizer)
    abstract = state.abstract_state(config.model, optimizer, mesh)
    rows = NamedSharding(mesh, rules.partition_spec(("batch", None)))
    shape = config.data.batch_size, config.data.sequence_length
    batch = jax.tree.map(lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows), BATCH_DTYPES)
    whole = NamedSharding(mesh, PartitionSpec())
    schedule = schedules.learning_rate(config.optimizer, config.steps)
    numbers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((), np.asarray(x).dtype, sharding=whole), (jnp.uint32(0), schedule)
    )
    update: Any = language_model.compiled_update(config.model, config.loss, optimizer, config.microbatches, mesh)
    platform = mesh.devices.flat[0].platform
    with jax.set_mesh(mesh):
        lowered: jax.stages.Lowered = update.trace(abstract, batch, *numbers).lower(
            lowering_platforms=(LOWERING[platform],)
        )
    return lowered


def compile_on(config: TrainConfig, mesh: Mesh, options: Mapping[str, Any] | None = None) -> Compiled:
    """Compile the step for the devices of a mesh, with options of their compiler."""
    start = time.monotonic()
    lowered = lower(config, mesh)
    between = time.monotonic()
    compiled = lowered.compile(compiler_options=dict(options) if options else None)
    memory: Any = compiled.memory_analysis()
    return Compiled(
        text=compiled.as_text() or "",
        arguments=memory.argument_size_in_bytes,
        temporaries=temporaries(memory, mesh.devices.flat[0].platform),
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        peak=getattr(memory, "peak_memory_in_bytes", 0),
        lower_seconds=between - start,
        compile_seconds=time.monotonic() - between,
        sizes=dict(mesh.shape),
        hosts=[device.process_index for device in mesh.devices.flat],
    )


def temporaries(memory: Any, platform: str) -> int:
    """Bytes that a program allocates for its temporaries.

    Of a TPU's, `temp_size_in_bytes` counts what lies unused between the buffers twice: once within what is allocated,
    and once beside it. Of jax 0.10.2 and libtpu 0.0.42 so says the report on memory that `xla_dump_to` writes.
    """
    allocated: int = memory.temp_size_in_bytes
    if platform == "tpu":
        used = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
        allocated = (allocated + used) // 2
    return allocated


def compile_for(config: TrainConfig, target: Target, folder: Path) -> Compiled:
    """Compile the step for a target in a process of its own; what it reads and writes stays in `folder`.

    Raises `UserError` where a compiler's package is not installed, and with the compiler's own words where it fails:
    `TooLargeError` if it is for memory.
    """
    environment = absent.environment(absent.TARGETS[target.hardware.chip])
    folder.mkdir(parents=True, exist_ok=True)
    config_lib.save(config, folder / CONFIG)
    write_json(folder / REQUEST, {"target": target.name})
    command = [sys.executable, "-m", "llm_jax.training.ahead_of_time", str(folder)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"compiling for {target.name} took longer than {LONGEST_SECONDS} s") from None
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    memory = next((line for line in lines if "RESOURCE_EXHAUSTED" in line or "out of memory" in line.lower()), "")
    if done.returncode:
        reason = (memory or lines[-1])[:500]
        message = f"the compiler for {target.name} ended with status {done.returncode}: {reason}"
        raise (TooLargeError if memory else UserError)(message)
    return read(folder)


def read(folder: Path) -> Compiled:
    """What `compile_for` wrote."""
    values = json.loads((folder / ANSWER).read_text())
    return Compiled(text=(folder / TEXT).read_text(), **values)


def main(folder: Path) -> None:
    """Answer the request in a folder."""
    config = config_lib.load(TrainConfig, folder / CONFIG)
    target = hardware.target(json.loads((folder / REQUEST).read_text())["target"])
    chip = absent.TARGETS[target.hardware.chip]
    mesh = mesh_lib.build(config.mesh, absent.devices(chip, target.topology))
    compiled = compile_on(config, mesh)
    (folder / TEXT).write_text(compiled.text)
    write_json(folder / ANSWER, {key: value for key, value in vars(compiled).items() if key != "text"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
