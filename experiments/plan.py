"""Plans a pre-training on a cluster that need not be here: memory, traffic and bounds of its speed, before it runs.

First from formulas, at once. Then, where the compilers for the target are installed (`make aot`), of the real train
step, compiled for the target's devices and read back. The page goes to the terminal and to the workdir: `plan.html`
with figures, and `plan.json`. It says whether the step fits the devices' memory, and what to change.

A target is a kind of device and a number, such as a800x1024, h100x512 or v5px1024, or a TPU slice by its own name, such
as v5p-2048 with its 1,024 chips. The mesh, the microbatches and `config.model.groups` are the config's, unless --choose
is given: then, among the ways that fit, the one that is fastest with half of the overlap that there may be.
"""

import dataclasses
import shlex
import sys
import time
from pathlib import Path

from absl import flags
from jax.sharding import AbstractMesh
from rich.console import Console

from experiments import runner
from llm_jax import models
from llm_jax.config import TrainConfig
from llm_jax.errors import UserError, require
from llm_jax.evaluation import plan_page, tables
from llm_jax.files import replacing, write_json
from llm_jax.parallel import choose, compiled, costs, hardware, links, plan, rules
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel.hardware import Target
from llm_jax.parallel.plan import Choice, Plan, Reading
from llm_jax.scaling.flops import mean_visible_keys
from llm_jax.training import ahead_of_time, step

TARGET = flags.DEFINE_string("target", "a800x1024", "devices to plan for: a kind and a number")
CARDS = flags.DEFINE_integer("cards", 0, "network cards of a host; 0 = one for each device")
COMPILE = flags.DEFINE_boolean("compile", True, "also compile the step, where the target's compiler is installed")
CHOOSE = flags.DEFINE_boolean("choose", False, "plan the best way to run the step instead of the config's own")
SHOWN = 8  # alternatives on the page


def run(config: TrainConfig, workdir: Path) -> None:
    """Write and print the plan."""
    start = time.monotonic()
    target = hardware.target(TARGET.value, CARDS.value)
    work = plan.workload(config)
    found = choose.with_mixtures(list(plan.choices(config.model, target, work)), config.model, target, work)
    plan.check_fits(found, target)
    best = plan.best(found, SHOWN)
    config = best[0].apply(config) if CHOOSE.value else config
    made = analyse(config, target, best)
    print(f"estimated in {time.monotonic() - start:.1f} s", file=sys.stderr)
    if COMPILE.value:
        made = with_compiled(made, workdir)
    write(made, workdir)


def analyse(config: TrainConfig, target: Target, best: tuple[Choice, ...]) -> Plan:
    """The plan without a compiler. Raises `UserError` where the mesh does not fit the devices, model or batch."""
    shape = mesh_lib.shape(config.mesh, target.devices)
    host = min(target.hardware.host_devices, target.devices)
    require(host % shape[2] == 0, f"mesh tensor={shape[2]} does not divide the {host} devices of a host")
    mesh = AbstractMesh(shape, mesh_lib.AXES)
    step.check_batch(config.data.batch_size, config.microbatches, mesh)
    rules.shardings(models.logical_axes(config.model), models.abstract(config.model), mesh)  # refuses misfits
    sizes = dict(zip(mesh_lib.AXES, shape))
    return Plan(config, target, sizes, costs.estimate(config.model, sizes, target, plan.workload(config)), best)


def with_compiled(made: Plan, workdir: Path) -> Plan:
    """The plan with what the target's compiler says, or with the reason why it says nothing."""
    config, target = made.config, made.target
    print(f"compiling the step for {target.devices:,} devices: half a minute to some minutes", file=sys.stderr)
    try:
        answer = ahead_of_time.compile_for(config, target, workdir / "compiled")
    except UserError as error:
        print(f"not compiled: {error}", file=sys.stderr)
        too_large = isinstance(error, ahead_of_time.TooLargeError)
        return dataclasses.replace(made, not_compiled=f"Not compiled: {error}.", too_large=too_large)
    length = config.data.sequence_length
    windows = config.model.window_sizes or (0,)
    keys = sum(mean_visible_keys(length, window) for window in windows) / len(windows)
    read = compiled.read(answer.text, answer.sizes, answer.hosts, keys)
    useful = made.estimate.bounds.useful * target.hardware.peak_flops
    bounds = links.bounds(read.collectives, read.flops, useful, target)
    reading = Reading(read, bounds, answer.bytes, answer.arguments, answer.lower_seconds, answer.compile_seconds)
    return dataclasses.replace(made, compiled=reading)


def write(made: Plan, workdir: Path) -> None:
    """Print the page, and write it and its data to the workdir."""
    title = f"{workdir.name} on {made.target.name}"
    console = Console()
    for table in plan_page.all_tables(made):
        console.print(tables.as_rich(table))
    for sentence in plan.verdict(made):
        console.print(sentence, highlight=False)
    workdir.mkdir(parents=True, exist_ok=True)
    drawn = {"Memory of a device": workdir / "memory.png", "Seconds of a step": workdir / "times.png"}
    plan_page.draw_memory(made, drawn["Memory of a device"])
    plan_page.draw_times(made, drawn["Seconds of a step"])
    command = shlex.join(["python", "-m", "experiments.plan", *sys.argv[1:]])
    with replacing(workdir / "plan.html") as partial:
        partial.write_text(plan_page.render(made, title, command, drawn), encoding="utf-8")
    write_json(workdir / "plan.json", plan_page.as_json(made))
    console.print(f"{workdir / 'plan.html'} and {workdir / 'plan.json'}", highlight=False)


if __name__ == "__main__":
    runner.main(run, TrainConfig, "configs/pretrain/papers.py")
