"""Turn a corpus into the tokenised dataset that training reads: read, judged, cleaned, deduplicated, mixed, tokenised.

Writes to --workdir: dataset/ (or --config.output), report.html, report.json, config.json, and stages/ with what every
stage kept, dropped and found. The dataset is a TFDS dataset in ArrayRecord files with two splits for each source,
train_SOURCE and heldout_SOURCE, the tokenizer's model file, documents.parquet, which says where each document comes
from, and summary.json. docs/corpus.md explains the stages.

The corpus is a profile of texts from package registries (--config.profile: tiny, clean or default) or your own files
(--config.path). An interrupted run goes on with the stage or source in which it was when started again; with another
setting, only what follows from it is done again. --config.runner=ray computes on a Ray cluster.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import runner
from llm_jax.data.records import Summary
from llm_jax.errors import require
from llm_jax.evaluation import corpus_page, tables
from llm_jax.files import write_json
from llm_jax.tokenization import tokenizer as tokenizers

try:
    from llm_jax.data import factory, pipeline, prepare, reading
    from llm_jax.data.prepare import PrepareConfig
    from llm_jax.data.stages.mixture import Row
    from llm_jax.data.stored import StoredCorpus
    from llm_jax.evaluation.sentence_bits import TRANSFORMERS
except ModuleNotFoundError as missing:
    sys.exit(f"error: preparing data needs the package {missing.name}: pip install 'llm-jax[data]'")

TABLE_WIDTH = 110


def main(config: PrepareConfig, workdir: Path) -> Summary:
    """Prepare the dataset and print what became of the corpus."""
    require(
        bool(config.tokenizer),
        "set --config.tokenizer to a tokenizer, such as experiments.train_tokenizer writes",
    )
    started = time.monotonic()
    given, config = config, dataclasses.replace(config, output=config.output or str(workdir / "dataset"))
    tokenizer = tokenizers.load(config.tokenizer)
    stages = prepare.stages(config, TRANSFORMERS)
    # What would be refused in the end is refused before hours of work.
    pipeline.check_output(config, tokenizer, StoredCorpus(factory.expected(config, workdir, stages), config.mixture))
    runner.save_in(given, workdir / "config.json")
    corpus = factory.run(config, workdir, stages, reading.read)
    stored = StoredCorpus(corpus, config.mixture)
    tokenising = time.monotonic()
    summary = pipeline.prepare(config, tokenizer, stored)
    seconds = {"tokenise": time.monotonic() - tokenising, "run": time.monotonic() - started}
    mixture = stored.plan(summary.sources)
    write_json(workdir / corpus_page.REPORT, report(config, corpus, summary, mixture, seconds))
    made = corpus_page.read(workdir)
    page = corpus_page.write(made, workdir)
    console = Console(width=max(Console().width, TABLE_WIDTH))  # a table piped to a file is not squeezed
    for table in corpus_page.outcome(made):
        console.print(tables.as_rich(table))
    console.print(f"{config.output}: prepared in {seconds['run']:.1f} s; {page} says how", soft_wrap=True)
    return summary


def report(
    config: PrepareConfig, corpus: factory.Corpus, summary: Summary, mixture: list[Row], seconds: dict[str, float]
) -> dict[str, Any]:
    """All of a run as JSON: the settings, every stage's report in order, the dataset, and how often it is drawn.

    A stage's seconds are those of the run that did it; `seconds` are this run's.
    """
    return {
        "config": dataclasses.asdict(config),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "stages": corpus.reports,
        "dataset": dataclasses.asdict(summary),
        "mixture": [row._asdict() for row in mixture],
    }


if __name__ == "__main__":
    runner.main(main, PrepareConfig, "configs/data/default.py", save_config=False)
