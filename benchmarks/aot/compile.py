"""Compiles one implementation of one case for one device that is not here: JSON lines of what became of it.

    python -m benchmarks.aot.compile --target=a100 --case=baichuan2_7b --kernel=pallas_gpu --dump=FOLDER

`benchmarks.attention_aot` starts it with the environment that the compilers need, one process for each.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.aot import cases, hlo, mosaic, ptxas, tiles, traffic
from benchmarks.aot import kernels as implementations
from benchmarks.aot.cases import Case
from benchmarks.aot.kernels import Kernel
from llm_jax.parallel.absent import TARGETS, Target, devices

LOWERING = {"gpu": "cuda", "tpu": "tpu"}


def program(kernel: Kernel, case: Case, which: str, blocks: Any = None) -> tuple[Any, tuple[Any, ...]]:
    """The function of a pass and the shapes of its arguments; a backward pass starts from what the forward saved."""
    run = kernel.build(case, blocks=blocks)
    if which in cases.DECODING:
        return run, cases.decode_inputs(case, which, kernel.dtype)
    arguments = cases.inputs(case, kernel.dtype)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.vjp(run, q, k, v)[0]

    if which == "forward":
        return forward, arguments
    pullback = jax.eval_shape(lambda *qkv: jax.vjp(run, *qkv)[1], *arguments)

    def backward(pullback: Any, dout: jax.Array) -> Any:
        return pullback(dout)

    return backward, (pullback, arguments[0])


def rows(
    target: Target, case: Case, kernel: Kernel, passes: tuple[str, ...], dump: Path, blocks: Any = None
) -> list[dict[str, Any]]:
    """All rows of this implementation: a pass has one for each kernel and one for the whole, or the reason why not."""
    found = []
    for which in passes:
        head = {"target": target.name, "case": case.name, "implementation": kernel.name, "pass": which}
        try:
            found += [head | row for row in _pass_rows(target, case, kernel, which, dump, blocks)]
        except Exception as error:  # whatever a compiler raises is this row's reason
            found.append(head | {"reason": one_line(error)})
    return found


def one_line(error: BaseException) -> str:
    """The first line of an error that says something, not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."


def _pass_rows(
    target: Target, case: Case, kernel: Kernel, which: str, dump: Path, blocks: Any = None
) -> list[dict[str, Any]]:
    function, arguments = program(kernel, case, which, blocks)
    shutil.rmtree(dump)  # of the pass before
    dump.mkdir()
    compiled = _compile(target, function, arguments, f"{kernel.name}_{which}")
    files = sorted(file for file in dump.iterdir() if file.is_file())
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    buffers = hlo.in_memory(text)
    shape, size = hlo.largest(buffers)
    whole: dict[str, Any] = {
        "largest_array": shape,
        "largest_bytes": size,
        "has_scores": which not in cases.DECODING and hlo.has_scores(buffers, case.length, case.length),
        "temporary_bytes": memory.temp_size_in_bytes,
        "least_bytes": cases.least_bytes(case, which),
        "least_flops": cases.least_flops(case, which),
        "outside_bytes": hlo.moved(text),
    }
    entries = ptxas.kernels(target, files, text) if target.platform == "gpu" else mosaic.kernels(target, files, text)
    if whole["outside_bytes"] is None:
        whole["not_counted"] = "operations outside of kernels run in a loop or a branch"
    try:
        counted = _counted(kernel, case, which, blocks)
    except Exception as reason:  # beside `NotCounted`, what a program with unknown operations may raise
        return [*entries, whole | {"not_counted": one_line(reason)}]
    return [*_with_counts(entries, counted), whole | _total(counted)]


def _compile(target: Target, function: Any, arguments: Any, name: str) -> Any:
    mesh = jax.sharding.Mesh(np.array(devices(target)[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)

    def named(*arguments: Any) -> Any:
        return function(*arguments)

    named.__name__ = name
    with jax.set_mesh(mesh):
        return jax.jit(named).trace(*placed).lower(lowering_platforms=(LOWERING[target.platform],)).compile()


def _counted(kernel: Kernel, case: Case, which: str, blocks: Any) -> dict[str, dict[str, int]]:
    """Bytes and products of the Pallas kernels by their construction, over all heads and rows, by kernel."""
    groups = case.batch * case.num_kv_heads
    if which in cases.DECODING:  # how a cache is split depends on all rows and heads
        part, groups = case, 1
    else:
        part = case.one_group()
    work = _work(kernel, part, which, blocks)
    dense = _work(kernel, part.everything_visible(), which, blocks)
    return {
        name: {
            "moved_bytes": groups * (entry.bytes_read + entry.bytes_written),
            "flops": groups * entry.flops,
            "dense_flops": groups * everything.flops,
        }
        for (name, entry), everything in zip(work.items(), dense.values(), strict=True)
    }


def _with_counts(entries: list[dict[str, Any]], counted: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """Compiled kernels with the counts of the one that each was made of, where its name tells which that is."""
    if len(entries) == len(counted) == 1:
        return [entries[0] | counts for counts in counted.values()]
    found = []
    for entry in entries:
        names = [name for name in counted if entry["kernel"].startswith(name)]
        alone = len(names) == 1 and sum(other["kernel"].startswith(names[0]) for other in entries) == 1
        found.append(entry | (counted[names[0]] if alone else {}))
    return found


def _total(counted: dict[str, dict[str, int]]) -> dict[str, int]:
    """Of all kernels of a pass; nothing where there is none."""
    fields = ("moved_bytes", "flops", "dense_flops")
    return {field: sum(counts[field] for counts in counted.values()) for field in fields} if counted else {}


def _work(kernel: Kernel, case: Case, which: str, blocks: Any) -> dict[str, traffic.Work]:
    """The work of a pass, by kernel."""
    run = kernel.build(case, blocks=blocks)
    if which in cases.DECODING:
        lengths = np.full((case.decode_batch,), case.length, np.int32)
        q, k, v, _, *scales = cases.decode_inputs(case, which, kernel.dtype)
        return traffic.count(lambda q, k, v, *scales: run(q, k, v, lengths, *scales), q, k, v, *scales)
    arguments = cases.inputs(case, kernel.dtype)
    forward = traffic.count(lambda *qkv: jax.vjp(run, *qkv)[0], *arguments)
    if which == "forward":
        return forward
    # Not from what the forward pass saved: what a kernel is told of the mask may be among it, and would be unknown.
    both = traffic.count(lambda dout, *qkv: jax.vjp(run, *qkv)[1](dout), arguments[0], *arguments)
    return {name: work for name, work in both.items() if name not in forward}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--case", choices=cases.CASES, required=True)
    parser.add_argument("--kernel", choices=[kernel.name for kernel in implementations.KERNELS], required=True)
    parser.add_argument("--dump", type=Path, required=True, help="where the compilers write, as the environment says")
    parser.add_argument("--blocks", type=json.loads, nargs="*", help="block sizes as lists in JSON, tried one by one")
    parser.add_argument("--pass", choices=cases.PASSES, dest="which", help="only this one")
    parser.add_argument("--head_dim", type=int, help="in place of the case's own")
    options = parser.parse_args()
    kernel, target, case = implementations.named(options.kernel), TARGETS[options.target], cases.CASES[options.case]
    case = case._replace(head_dim=options.head_dim or case.head_dim)
    passes = (options.which,) if options.which else kernel.passes
    for sizes in options.blocks or [None]:
        blocks = None if sizes is None else tiles.from_lists(kernel.module, sizes)
        for row in rows(target, case, kernel, passes, options.dump, blocks):
            print(json.dumps(row | ({} if sizes is None else {"blocks": sizes})), flush=True)


if __name__ == "__main__":
    main()
