"""Compares ways to divide a training over a cluster (ZeRO-1, ZeRO-3, hybrid, hierarchical), by formula alone.

For every model, number of devices, network and size of the tensor axis: the memory of a device, what it takes in over
the links inside its host and over the network, and the bounds of its utilisation, of the best recomputation and number
of microbatches that fit. Writes `partitioning.md`, `partitioning.json` and `partitioning.png` to the workdir.
"""

from pathlib import Path

from rich.console import Console

from experiments import runner
from llm_jax.evaluation import partitioning_report, tables
from llm_jax.files import replacing, write_json
from llm_jax.parallel import partitioning
from llm_jax.parallel.partitioning import PartitioningConfig


def run(config: PartitioningConfig, workdir: Path) -> None:
    """Write and print the comparison."""
    cells = list(partitioning.compare(config))
    made = [*partitioning_report.tables(cells, config)]
    made += [partitioning_report.traffic(cells, config, devices) for devices in config.devices]
    console = Console()
    for table in made:
        console.print(tables.as_rich(table))
    with replacing(workdir / "partitioning.md") as partial:
        partial.write_text("\n".join(map(tables.as_markdown, made)), encoding="utf-8")
    write_json(workdir / "partitioning.json", [cell.as_json() for cell in cells])
    partitioning_report.draw(cells, config, workdir / "partitioning.png")
    console.print(f"{workdir / 'partitioning.md'}, .json and .png", highlight=False)


if __name__ == "__main__":
    runner.main(run, PartitioningConfig, "configs/partitioning/papers.py")
