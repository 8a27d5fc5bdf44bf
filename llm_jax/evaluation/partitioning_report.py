"""The comparison of ways to divide a training over a cluster: tables and a figure."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from llm_jax.evaluation.figures import DOTS_PER_INCH, SERIES
from llm_jax.evaluation.tables import Table
from llm_jax.parallel.partitioning import KINDS, Cell, PartitioningConfig
from llm_jax.parallel.plan import GB

BEST = " ✓"


def tables(cells: Sequence[Cell], config: PartitioningConfig) -> Iterator[Table]:
    """For every model and network: memory and bounds by way and number of devices."""
    for model, cards in itertools.product(config.models, config.cards):
        here = [cell for cell in cells if (cell.model, cell.cards) == (model, cards)]
        winners = [_best(here, devices) for devices in config.devices]
        rows = []
        for kind, tensor in itertools.product(KINDS, config.tensor):
            row = [cell for cell in here if (cell.kind, cell.tensor) == (kind, tensor)]
            shown = [_shown(cell) + (BEST if cell in winners else "") for cell in row]
            rows.append((kind, str(tensor), *shown))
        headings = ("", "tensor", *(f"{devices:,} devices" for devices in config.devices))
        yield Table(f"{model}, {config.kind}, {_network(cards)}", headings, tuple(rows), frozenset(headings[1:]))


def traffic(cells: Sequence[Cell], config: PartitioningConfig, devices: int) -> Table:
    """What a device takes in, at one number of devices and the first of the networks."""
    rows = []
    for cell in cells:
        if cell.choice is not None and (cell.cards, cell.devices) == (config.cards[0], devices):
            values = cell.as_json()
            slow, fast = values["slow_bytes"], values["fast_bytes"]
            way = values["way"]
            rows.append((cell.model, cell.kind, str(cell.tensor), f"{slow / GB:.1f}", f"{fast / GB:.0f}", way))
    headings = ("model", "", "tensor", "GB between hosts", "GB inside hosts", "way")
    return Table(f"Traffic of a device in a step, {devices:,} devices", headings, tuple(rows), frozenset(headings[2:5]))


def _network(cards: int) -> str:
    return f"{cards} network card{'s' * (cards > 1)} a host"


def _best(cells: Sequence[Cell], devices: int) -> Cell | None:
    found = [(cell.choice.estimate.bounds.halfway, cell) for cell in cells if cell.choice and cell.devices == devices]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _shown(cell: Cell) -> str:
    if cell.choice is None:
        return cell.reason
    serial, overlapped = cell.choice.estimate.bounds.utilisation
    return f"{cell.choice.estimate.bytes / GB:.0f} GB, {100 * serial:.0f} to {100 * overlapped:.0f} %"


def draw(cells: Sequence[Cell], config: PartitioningConfig, path: Path) -> None:
    """The bound without overlap over the number of devices: a panel for each model and network."""
    canvas = Figure(figsize=(3.4 * len(config.models), 2.8 * len(config.cards)), layout="constrained")
    panels = canvas.subplots(len(config.cards), len(config.models), squeeze=False, sharex=True, sharey=True)
    for (row, cards), (column, model) in itertools.product(enumerate(config.cards), enumerate(config.models)):
        axes = panels[row][column]
        axes.set_title(f"{model}, {_network(cards)}", loc="left", fontsize=9)
        for (kind, colour), (tensor, line) in itertools.product(
            zip(KINDS, SERIES[1:]), zip(config.tensor, ("-", "--"))
        ):
            place = model, cards, kind, tensor
            found = [
                cell for cell in cells if (cell.model, cell.cards, cell.kind, cell.tensor) == place and cell.choice
            ]
            serial = [cell.choice.estimate.bounds.utilisation[0] for cell in found if cell.choice]
            label = f"{kind}, tensor {tensor}"
            devices = [cell.devices for cell in found]
            axes.plot(devices, serial, line, marker="o", markersize=3, color=colour, label=label, alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(config.devices, [f"{devices:,}" for devices in config.devices])
        axes.set_ylim(0, 1)
        axes.grid(color="#e5e5e5", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("devices")
    for row in panels:
        row[0].set_ylabel("utilisation without overlap")
    canvas.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=DOTS_PER_INCH)
