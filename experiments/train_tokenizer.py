"""Train a SentencePiece BPE tokenizer on a corpus, and measure it.

Writes to the workdir: tokenizer.model, tokenizer_report.json (bytes per token and exact round trips for each
language, on documents spread over the training sample) and config.json.

The corpus is a profile of texts from package registries (config.corpus.profile) or your own .txt, .jsonl, .jsonl.gz
or .parquet files (config.corpus.path). Held-out documents are never read.
"""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments import runner
from llm_jax.config import TokenizerConfig
from llm_jax.data import sources
from llm_jax.data.documents import Document
from llm_jax.tokenization import report
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.tokenization.train import train

REPORT_BYTES = 2_000_000


def run(config: TokenizerConfig, workdir: Path) -> list[report.Compression]:
    """Train, save and measure a tokenizer; returns one row for each language."""
    documents = list(sources.sample_documents(config.corpus, config.sample_bytes, config.seed))
    started = time.monotonic()
    path = train(documents, config, workdir / "tokenizer.model")
    seconds = time.monotonic() - started
    tokenizer = tokenizers.load(path)
    rows = report.measure(tokenizer, _spread(documents, REPORT_BYTES))
    report.save(rows, workdir / "tokenizer_report.json")
    console = Console()
    console.print(_table(rows))
    console.print(
        f"{path}: {tokenizer.vocab_size:,} pieces ({config.style}), trained in {seconds:.1f} s", soft_wrap=True
    )
    return rows


def _spread(documents: list[Document], size: int) -> list[Document]:
    """Every n-th document, so that about `size` bytes remain."""
    total = sum(len(document.text.encode()) for document in documents)
    return documents[:: max(1, total // size)]


def _table(rows: list[report.Compression]) -> Table:
    table = Table(title="Compression and round trips")
    for heading in ("language", "documents", "MB", "bytes/token", "tokens/char", "exact"):
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
