"""Train a SentencePiece BPE tokenizer on a corpus, and measure it.

Writes to the workdir: tokenizer.model, tokenizer_report.json (bytes per token and exact round trips for each
language, on a sample of the corpus other than the training sample's draw) and config.json.

The corpus is a profile of texts from package registries (config.corpus.profile) or your own .txt, .jsonl, .jsonl.gz
or .parquet files (config.corpus.path). Held-out documents are left out.
"""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments import runner
from llm_jax.config import TokenizerConfig
from llm_jax.data import sources
from llm_jax.tokenization import report
from llm_jax.tokenization.tokenizer import Tokenizer
from llm_jax.tokenization.train import train

REPORT_BYTES = 2_000_000


def run(config: TokenizerConfig, workdir: Path) -> list[report.Compression]:
    """Train, save and measure a tokenizer; returns one row for each language."""
    started = time.monotonic()
    path = train(config, workdir / "tokenizer.model")
    seconds = time.monotonic() - started
    tokenizer = Tokenizer.load(path)
    rows = report.measure(tokenizer, sources.sample_documents(config.corpus, REPORT_BYTES, config.seed + 1))
    report.save(rows, workdir / "tokenizer_report.json")
    console = Console()
    console.print(_table(rows))
    console.print(f"{path}: {tokenizer.vocab_size:,} pieces ({config.style}), trained in {seconds:.1f} s")
    return rows


def _table(rows: list[report.Compression]) -> Table:
    table = Table(title="Compression and round trips")
    for heading in ("language", "documents", "MB", "bytes/token", "tokens/character", "exact"):
        table.add_column(heading, justify="left" if heading == "language" else "right")
    for row in rows:
        table.add_row(
            row.language,
            f"{row.documents:,}",
            f"{row.bytes / 1e6:.2f}",
            f"{row.bytes_per_token:.2f}",
            f"{row.tokens_per_character:.3f}",
            f"{row.exact:,} of {row.documents:,}",
        )
    return table


if __name__ == "__main__":
    runner.main(run, TokenizerConfig, "configs/tokenizer/demo.py")
