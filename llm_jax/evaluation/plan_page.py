"""A plan for a cluster as one page: tables for a terminal and for HTML, figures, and the same as plain data."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.evaluation import report, tables
from llm_jax.evaluation.figures import SERIES, figure
from llm_jax.evaluation.tables import Table, quantity
from llm_jax.parallel import plan as planning
from llm_jax.parallel.links import Bounds
from llm_jax.parallel.plan import GB, Plan
from llm_jax.scaling import flops

SHOWN_BYTES = 5e6  # less traffic has no line
DEFINITIONS = (
    "Bounds of the model FLOPs utilisation: the model's own FLOPs (causal attention, nothing twice) at the peak, over "
    "the seconds of a step. Without overlap these are all FLOPs at the peak plus every collective at the pace of the "
    "link that limits it; with all of it, the longest of compute, links inside hosts and network. Latency, memory "
    "bandwidth and how well products run are left out: no step is faster, and real ones are slower.",
    "Bytes are what a device takes in. A gather or reduce-scatter over several hosts brings each byte into a host "
    "once, by the network cards of all its devices that take part, and spreads it by the links inside.",
)


def facts(plan: Plan) -> Table:
    """What is planned."""
    config, target = plan.config, plan.target
    parameters = flops.count(config.model).total
    groups = planning.describe(config.model.layer_groups())
    hardware = target.hardware
    links = f"{hardware.link / GB:.0f} GB/s a device inside hosts"
    if hardware.network:
        links += f", {hardware.network_share / GB:.3g} GB/s between them ({hardware.cards} network cards a host)"
    rows = (
        ("model", f"{quantity(parameters)} parameters, {config.model.num_layers} layers, {config.model.position}"),
        ("target", f"{target.name}: {target.devices:,} devices, {hardware.peak_flops / 1e12:.0f} TFLOP/s each"),
        ("links", links if hardware.network else f"{hardware.link / GB:.0f} GB/s a device over its torus"),
        ("mesh", " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items())),
        ("batch", f"{planning.workload(config).tokens:,} tokens, microbatches: {config.microbatches}"),
        ("execution", f"{groups}; embedding and head gathered by {config.model.gather_tables}"),
    )
    return Table("What is planned", ("", " "), rows)


def memory(plan: Plan) -> Table:
    """Bytes of a device by what they are for."""
    rows = [(name, f"{size / GB:.2f}") for name, size in plan.estimate.memory.items()]
    rows.append(("estimated together", f"{plan.estimate.bytes / GB:.2f}"))
    if plan.compiled:
        error = plan.estimate.bytes / plan.compiled.bytes - 1
        rows.append(("compiled: state and batch", f"{plan.compiled.arguments / GB:.2f}"))
        rows.append(("compiled: all", f"{plan.compiled.bytes / GB:.2f}"))
        rows.append(("estimate over compiled", f"{error:+.1%}"))
    rows.append(("may be filled", f"{plan.estimate.budget / GB:.2f}"))
    return Table("Memory of a device, GB", ("part", "GB"), tuple(rows), frozenset({"GB"}))


def traffic(plan: Plan) -> Table:
    """Bytes and seconds of each kind of collective on each mesh axis."""
    sources = [("estimated", plan.estimate.collectives)]
    if plan.compiled:
        sources.append(("compiled", plan.compiled.step.collectives))
    rows = [
        (source, kind, axes, f"{fast / GB:.2f}", f"{slow / GB:.2f}", f"{1e3 * seconds:.1f}")
        for source, collectives in sources
        for (kind, axes), (fast, slow, seconds) in planning.traffic(collectives, plan.target).items()
        if fast + slow > SHOWN_BYTES
    ]
    inside, between, alone = "GB inside hosts", "GB between hosts", "ms alone"
    notes = []
    if plan.compiled:
        for kind in ("all-gather", "reduce-scatter"):
            share = plan.compiled.step.hidden_share(kind)
            notes.append(f"Of the compiled {kind}s {share:.0%} have compute between their start and their end.")
    headings = ("", "collective", "mesh axes", inside, between, alone)
    return Table(
        "Traffic of a device in a step", headings, tuple(rows), frozenset({inside, between, alone}), tuple(notes)
    )


def times(plan: Plan) -> Table:
    """The seconds that the bounds are made of."""
    found = {"estimated": plan.estimate.bounds} | ({"compiled": plan.compiled.bounds} if plan.compiled else {})
    lines = {
        "the model's own FLOPs": lambda bounds: f"{bounds.useful:.3f} s",
        "all FLOPs": lambda bounds: f"{bounds.compute:.3f} s",
        "links inside hosts": lambda bounds: f"{bounds.fast:.3f} s",
        "network between hosts": lambda bounds: f"{bounds.slow:.3f} s",
        "step without overlap": lambda bounds: f"{bounds.serial:.3f} s",
        "step with all overlap": lambda bounds: f"{bounds.overlapped:.3f} s",
        "utilisation without overlap": lambda bounds: f"{bounds.utilisation[0]:.1%}",
        "utilisation with all overlap": lambda bounds: f"{bounds.utilisation[1]:.1%}",
    }
    rows = tuple((name, *(show(bounds) for bounds in found.values())) for name, show in lines.items())
    return Table("Bounds of a step", ("", *found), rows, frozenset(found), DEFINITIONS)


def alternatives(plan: Plan) -> Table:
    """Other ways to run the step, by their estimates."""
    rows = []
    for choice in plan.alternatives:
        serial, overlapped = choice.estimate.bounds.utilisation
        gigabytes = f"{choice.estimate.bytes / GB:.1f}"
        rows.append((choice.summary, gigabytes, f"{serial:.1%}", f"{overlapped:.1%}"))
    headings = ("way", "GB", "without overlap", "with all overlap")
    return Table("The best that fit (estimated)", headings, tuple(rows), frozenset(headings[1:]))


def all_tables(plan: Plan) -> list[Table]:
    """Of the page, in their order."""
    return [facts(plan), memory(plan), times(plan), traffic(plan), alternatives(plan)]


def draw_memory(plan: Plan, path: Path) -> None:
    """Bars of a device's memory by part, with what it holds."""
    bars: dict[str, Mapping[str, float]] = {"estimated": plan.estimate.memory}
    if plan.compiled:
        arguments = plan.compiled.arguments
        bars["compiled"] = {"compiled: state, batch": arguments, "compiled: the step": plan.compiled.bytes - arguments}
    with figure(path, 9.0, 1.4 + 0.6 * len(bars), "Memory of a device") as axes:
        colours = iter([*SERIES, "#56B4E9", "#F0E442", "#000000"])
        for name, parts in bars.items():
            left = 0.0
            for part, size in parts.items():
                if size > 0.005 * plan.estimate.budget:
                    axes.barh(name, size / GB, left=left, color=next(colours), label=f"{part} {size / GB:.1f}")
                left += size / GB
        axes.axvline(plan.estimate.budget / GB, color="#333333", linestyle=":", linewidth=1)
        axes.axvline(plan.target.hardware.memory / GB, color="#333333", linewidth=1)
        axes.set_xlabel("GB; the lines are what may be filled (dotted) and what there is")
        axes.invert_yaxis()
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_times(plan: Plan, path: Path) -> None:
    """Bars of the seconds of a step: one after the other, and side by side."""
    bounds: Bounds = plan.bounds
    whose = "compiled" if plan.compiled else "estimated"
    rows = {
        "without overlap": (bounds.useful, bounds.compute - bounds.useful, bounds.collectives),
        "compute": (bounds.useful, bounds.compute - bounds.useful, 0.0),
        "links inside hosts": (0.0, 0.0, bounds.fast),
        "network": (0.0, 0.0, bounds.slow),
    }
    with figure(path, 9.0, 2.6, f"Seconds of a step at least ({whose})") as axes:
        names = ("the model's own FLOPs", "FLOPs beside them", "communication")
        for i, (name, colour) in enumerate(zip(names, ("#0072B2", "#56B4E9", "#D55E00"))):
            left = [sum(parts[:i]) for parts in rows.values()]
            axes.barh(list(rows), [parts[i] for parts in rows.values()], left=left, color=colour, label=name)
        axes.invert_yaxis()
        axes.set_xlabel("seconds; with all overlap a step takes as long as the longest of the three lower bars")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def render(plan: Plan, title: str, command: str, figures: Mapping[str, Path]) -> str:
    """The page."""
    sections = [
        f"<h1>{report.escape(title)}</h1>",
        *(f"<p>{report.escape(sentence)}</p>" for sentence in planning.verdict(plan)),
        f'<p class="note">{report.escape(plan.not_compiled)}</p>' if plan.not_compiled else "",
        *(report.image(caption, path) for caption, path in figures.items()),
        *map(tables.as_html, all_tables(plan)),
        f"<h2>Command</h2><pre>{report.escape(command)}</pre>",
    ]
    return report.page(title, sections)


def as_json(plan: Plan) -> dict[str, Any]:
    """The page as plain data."""
    found: dict[str, Any] = {
        "target": plan.target.name,
        "devices": plan.target.devices,
        "mesh": dict(plan.sizes),
        "fits": plan.fits,
        "verdict": planning.verdict(plan),
        "budget_bytes": plan.estimate.budget,
        "groups": [dataclasses.asdict(group) for group in plan.config.model.layer_groups()],
        "estimated": {
            "memory": dict(plan.estimate.memory),
            "bytes": plan.estimate.bytes,
            "flops": plan.estimate.flops,
            **_shared(plan, plan.estimate.bounds, plan.estimate.collectives),
        },
        "alternatives": [
            {"way": choice.summary, "bytes": choice.estimate.bytes, "utilisation": choice.estimate.bounds.utilisation}
            for choice in plan.alternatives
        ],
    }
    if plan.compiled:
        step = plan.compiled.step
        found["compiled"] = {
            "bytes": plan.compiled.bytes,
            "argument_bytes": plan.compiled.arguments,
            "flops": step.flops,
            "lower_seconds": plan.compiled.lower_seconds,
            "compile_seconds": plan.compiled.compile_seconds,
            "hidden": {kind: step.hidden_share(kind) for kind in ("all-gather", "reduce-scatter", "all-reduce")},
            **_shared(plan, plan.compiled.bounds, step.collectives),
        }
    else:
        found["not_compiled"] = plan.not_compiled
    return found


def _shared(plan: Plan, bounds: Bounds, collectives: Sequence[Any]) -> dict[str, Any]:
    serial, overlapped = bounds.utilisation
    seconds = dataclasses.asdict(bounds) | {"serial": bounds.serial, "overlapped": bounds.overlapped}
    moved = [
        {"kind": kind, "axes": axes, "bytes_inside_hosts": fast, "bytes_between_hosts": slow, "seconds": taken}
        for (kind, axes), (fast, slow, taken) in planning.traffic(collectives, plan.target).items()
    ]
    return {"seconds": seconds, "utilisation": {"serial": serial, "overlapped": overlapped}, "traffic": moved}
