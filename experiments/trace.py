"""Say which document a training token is from: where it was read, and what the stages found of it.

    python -m experiments.trace --config.run=runs/demo/model --config.step=100 --config.row=3 --config.position=17
    python -m experiments.trace --config.dataset=runs/data/dataset --config.record=train/statutes/12
    python -m experiments.trace --config.dataset=runs/data/dataset --config.document=statutes/00000012

The first asks for a token of a run's batch, the second for a record of a dataset, the third for a document, by its id
or by the hash that its record has.
"""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import runner
from llm_jax import config as config_lib
from llm_jax.config import TrainConfig
from llm_jax.data import trace
from llm_jax.data.records import TokenReader, read_summary
from llm_jax.data.trace import Place
from llm_jax.errors import require
from llm_jax.tokenization import tokenizer as tokenizers

AROUND = 20  # tokens shown on each side of the one asked for


@dataclasses.dataclass(frozen=True)
class TraceConfig:
    """What is asked for: a document, a record, or else a token of a run's batch."""

    run: str = ""  # a pre-training's folder
    step: int = 0
    row: int = 0  # of the global batch
    position: int = 0
    dataset: str = ""  # for the two below; "" = the run's
    record: str = ""  # SPLIT/SOURCE/NUMBER
    document: str = ""  # an id or a hash

    def __post_init__(self) -> None:
        require(bool(self.run or self.dataset), "TraceConfig: set run or dataset to a folder")
        require(
            bool(self.run or self.record or self.document), "TraceConfig: set run, record or document, to look it up"
        )


def run(config: TraceConfig, workdir: Path) -> list[dict[str, Any]]:
    """Print the documents asked for, and return what is known of them."""
    console = Console()
    of_batch = not (config.document or config.record)
    needed = of_batch or not config.dataset
    training = config_lib.load(TrainConfig, Path(config.run) / "config.json") if needed else TrainConfig()
    dataset = Path(config.dataset or training.data.dataset)
    if config.document:
        found = trace.find(dataset, config.document)
        require(bool(found), f"{dataset} has no document {config.document}")
    else:
        if config.record:
            place = _place(config.record)
        else:
            place = trace.place_in_batch(training.data, config.step, config.row, config.position)
        found = [trace.document_of(dataset, place)]
        console.print(f"{place.split}/{place.source}/{place.record}, token {place.token}", highlight=False)
        console.print(_text(dataset, place), soft_wrap=True, markup=False, highlight=False)
    for row in found:
        table = Table(show_header=False)
        for name, value in row.items():
            table.add_row(name, str(value))
        console.print(table)
    return found


def _place(record: str) -> Place:
    parts = record.split("/")
    require(
        len(parts) == 3 and parts[2].isdecimal(),
        f"TraceConfig.record={record!r} is not of the form train/SOURCE/NUMBER",
    )
    return Place(parts[1], parts[0], int(parts[2]), 0)


def _text(dataset: Path, place: Place) -> str:
    """The tokens around the one asked for, which stands between » and «."""
    summary = read_summary(dataset)
    (ids,) = TokenReader(dataset, place.source, place.split, summary).read([place.record])
    tokenizer = tokenizers.load(dataset / summary.tokenizer)
    start = max(0, place.token - AROUND)
    before, token, after = ids[start : place.token], ids[place.token : place.token + 1], ids[place.token + 1 :]
    parts = (tokenizer.decode(part.tolist()) for part in (before, token, after[:AROUND]))
    return "{}»{}«{}".format(*parts)


if __name__ == "__main__":
    runner.main(run, TraceConfig, "configs/trace/default.py", save_config=False)
