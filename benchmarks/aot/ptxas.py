"""Reading NVIDIA's compiler: registers, spills, shared memory, the occupancy they allow, tensor-core instructions."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from llm_jax.parallel.absent import Target

# Blocks get their registers by the warp, in portions, and 1 KiB of shared memory goes to the system.
REGISTER_PORTION = 256
SHARED_RESERVED = 1024
SHARED_PORTION = 128

TENSOR_INSTRUCTION = re.compile(r"\b(wgmma\.mma_async|mma\.sync)\.")
COMPILED = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
THREADS = re.compile(r"\.(?:reqntid|maxntid) (\d+)(?:, (\d+))?(?:, (\d+))?")
THUNK = re.compile(
    r"kCustomKernel.*?\] (?P<name>\S+) grid: \[(?P<grid>[^\]]*)\].*?shared_memory: (?P<shared>\d+) bytes"
)
PALLAS = re.compile(r'"__gpu\$xla\.gpu\.triton".*? name = "([^"]+)"')
MOSAIC_LAUNCH = re.compile(r"gpu\.launch .*?in \(([^)]*)\) threads.*?dynamic_shared_memory_size %c(\d+)")


class Compiled(NamedTuple):
    """What ptxas says of one kernel."""

    name: str
    registers: int
    spill_stores: int  # bytes
    spill_loads: int
    static_shared: int  # bytes


class Launch(NamedTuple):
    """How a kernel is started."""

    grid: tuple[int, ...]
    shared: int  # bytes of dynamic shared memory per block


def parse_ptxas(text: str) -> list[Compiled]:
    """The kernels in the output of `ptxas -v`."""
    found = []
    for match in COMPILED.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        registers, stores, loads = (int(match[field]) for field in ("registers", "stores", "loads"))
        found.append(Compiled(match["name"], registers, stores, loads, int(shared[1]) if shared else 0))
    return found


def parse_thunks(text: str) -> dict[str, Launch]:
    """The launches in XLA's dump of a program's sequence of kernels, by the kernels' names."""
    return {
        match["name"]: Launch(tuple(int(n) for n in match["grid"].split(",")), int(match["shared"]))
        for match in THUNK.finditer(text)
    }


def parse_mosaic_launch(text: str) -> Launch | None:
    """The launch in the passes' log of Pallas' Mosaic back end for GPUs; None where there is none."""
    match = MOSAIC_LAUNCH.search(text)
    if match is None:
        return None
    return Launch(tuple(int(n) for n in re.findall(r"%c(\d+)", match[1])), int(match[2]))


def tensor_instructions(ptx: str) -> dict[str, int]:
    """How many tensor-core instructions of each kind the text holds (a loop's body counts once)."""
    counts: dict[str, int] = {}
    for kind in TENSOR_INSTRUCTION.findall(ptx):
        name = kind.split(".")[0]
        counts[name] = counts.get(name, 0) + 1
    return counts


def threads(ptx: str) -> int:
    """Threads per block, as the kernel requires or bounds them."""
    match = THREADS.search(ptx)
    if match is None:
        return 0
    x, y, z = (int(size or 1) for size in match.groups())
    return x * y * z


class Occupancy(NamedTuple):
    """How many blocks can live on a multiprocessor at once."""

    blocks: int
    share: float  # of the warps that could live there
    limit: str  # what allows no more: "registers", "shared memory", "threads"


def occupancy(target: Target, registers: int, shared: int, num_threads: int) -> Occupancy:
    """The bound that a kernel's use of registers and shared memory puts on its occupancy."""
    warps = -(-num_threads // 32)
    portion = -(-registers * 32 // REGISTER_PORTION) * REGISTER_PORTION
    used = -(-(shared + SHARED_RESERVED) // SHARED_PORTION) * SHARED_PORTION
    allowed = {
        "registers": target.device["registers_per_core_limit"] // portion // warps,
        "shared memory": target.device["shared_memory_per_core"] // used,
        "threads": min(target.warp_slots // warps, target.block_slots),
    }
    limit = min(allowed, key=lambda name: allowed[name])
    return Occupancy(allowed[limit], allowed[limit] * warps / target.warp_slots, limit)


def kernels(target: Target, files: list[Path], hlo: str) -> list[dict[str, object]]:
    """One entry per kernel that Pallas made, from the files that one compilation wrote and its optimised HLO."""
    launches: dict[str, Launch] = {}
    for file in files:
        if file.name.endswith("thunk_sequence.txt"):
            launches |= parse_thunks(file.read_text())
    names = set(PALLAS.findall(hlo))  # not XLA's own fusions
    launches = {name: launch for name, launch in launches.items() if name in names}
    found = []
    for file in sorted(files):
        if file.suffix == ".ptx" and file.stat().st_size:
            found += _of_ptx(target, file, launches)
    return found


def _of_ptx(target: Target, file: Path, launches: dict[str, Launch]) -> list[dict[str, object]]:
    ptx = file.read_text()
    entries = []
    for compiled in parse_ptxas(_run_ptxas(target, file)):
        passes = file.with_name(f"{file.stem}.mlir-passes.log")  # of the Mosaic back end
        launch = parse_mosaic_launch(passes.read_text()) if passes.exists() else launches.get(compiled.name)
        if launch is None:
            continue
        num_threads = threads(ptx)
        shared = launch.shared + compiled.static_shared
        bound = occupancy(target, compiled.registers, shared, num_threads)
        entries.append(
            {
                "kernel": compiled.name,
                "registers": compiled.registers,
                "spilled_bytes": [compiled.spill_stores, compiled.spill_loads],
                "shared_bytes": shared,
                "threads": num_threads,
                "grid": launch.grid,
                "blocks_per_core": bound.blocks,
                "occupancy": bound.share,
                "occupancy_limit": bound.limit,
                "tensor_instructions": tensor_instructions(ptx),
            }
        )
    return entries


def _run_ptxas(target: Target, file: Path) -> str:
    command = ["ptxas", "-v", f"-arch={target.architecture}", str(file), "-o", "/dev/null"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr
