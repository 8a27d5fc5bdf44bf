"""Turn a corpus into the tokenised dataset that training reads.

Writes to --workdir: dataset/ (or --config.output) and config.json. The dataset is a TFDS dataset in ArrayRecord files
with two splits for each source, train_SOURCE and heldout_SOURCE, the tokenizer's model file and summary.json.

The corpus is a profile of texts from package registries (--config.profile: tiny, clean or default) or your own .txt,
.jsonl, .jsonl.gz or .parquet files (--config.path). An interrupted run continues where it was when started again.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments import runner
from llm_jax.config import CorpusConfig
from llm_jax.data import pipeline
from llm_jax.data.records import SourceSummary, Summary
from llm_jax.errors import require
from llm_jax.tokenization import tokenizer as tokenizers

TABLE_WIDTH = 110
HEADINGS = ("source", "language", "documents", "MB", "tokens", "bytes/token", "held out", "duplicates")


def main(config: CorpusConfig, workdir: Path) -> Summary:
    """Prepare the dataset and print its sizes."""
    require(
        bool(config.tokenizer),
        "set --config.tokenizer to a tokenizer, such as experiments.train_tokenizer writes",
    )
    started = time.monotonic()
    config = dataclasses.replace(config, output=config.output or str(workdir / "dataset"))
    summary = pipeline.prepare(config, tokenizers.load(config.tokenizer))
    console = Console(width=max(Console().width, TABLE_WIDTH))  # a table piped to a file is not squeezed
    console.print(table(summary))
    console.print(f"{config.output}: prepared in {time.monotonic() - started:.1f} s")
    return summary


def table(summary: Summary) -> Table:
    """One row for each source, one for each language with several sources, and a total."""
    result = Table(title="Dataset")
    for heading in HEADINGS:
        result.add_column(heading, justify="left" if heading in ("source", "language") else "right")
    for name, source in summary.sources.items():
        result.add_row(name, source.language, *_cells([source]))
    result.add_section()
    by_language = sorted(summary.sources.values(), key=lambda source: source.language)
    for language, sources in itertools.groupby(by_language, key=lambda source: source.language):
        result.add_row("all", language, *_cells(list(sources)))
    result.add_row("all", "all", *_cells(by_language))
    return result


def _cells(sources: Iterable[SourceSummary]) -> list[str]:
    """Sizes of both splits together, and what part of them is held out."""
    sources = list(sources)
    sides = [side for source in sources for side in (source.train, source.heldout)]
    documents, text_bytes, tokens = (
        sum(getattr(side, field) for side in sides) for field in ("documents", "text_bytes", "tokens")
    )
    held_out = sum(source.heldout.documents for source in sources)
    duplicates = sum(source.duplicates for source in sources)
    size = f"{text_bytes / 1e6:.2f}"
    return [f"{documents:,}", size, f"{tokens:,}", f"{text_bytes / tokens:.2f}", f"{held_out:,}", f"{duplicates:,}"]


if __name__ == "__main__":
    runner.main(main, CorpusConfig, "configs/data/default.py")
