"""What a language model is held against, on the same held-out bytes: a unigram model and general compressors.

All figures are bits per byte of UTF-8 text, so they do not depend on any tokenizer.
"""

import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from llm_jax.data import records
from llm_jax.data.records import Summary, TokenReader
from llm_jax.errors import UserError

READ_DOCUMENTS = 4096  # documents read in one call when counting tokens


def _zstandard_19(data: bytes) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise UserError("the comparison with zstd needs the package zstandard: pip install 'llm-jax[data]'") from None
    return zstandard.ZstdCompressor(level=19).compress(data)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda data: gzip.compress(data, compresslevel=9),
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "zstd -19": _zstandard_19,
}


def compressed_bytes(texts: Iterable[str]) -> dict[str, int]:
    """The size to which each of `COMPRESSORS` packs the texts, joined without separators, file header included."""
    data = "".join(texts).encode()
    return {name: len(compress(data)) for name, compress in COMPRESSORS.items()}


def predicted_tokens(folder: Path, summary: Summary, source: str, split: str) -> Iterator[np.ndarray]:
    """The tokens that a model trained on this dataset predicts, in pieces: all but the first of each document.

    With `[bos] + ids + [eos]` documents these are the text's ids and the end of each document.
    """
    if not summary.split(source, split).documents:
        return
    reader = TokenReader(folder, source, split, summary)
    for start in range(0, len(reader.lengths), READ_DOCUMENTS):
        documents = reader.read(range(start, min(start + READ_DOCUMENTS, len(reader.lengths))))
        yield np.concatenate([tokens[1:] for tokens in documents])


def token_counts(folder: Path, summary: Summary, split: str, sources: Iterable[str]) -> np.ndarray:
    """How often each token is predicted in one split of some sources: int64 [vocab_size]."""
    counts = np.zeros(summary.vocab_size, np.int64)
    for source in sources:
        for tokens in predicted_tokens(folder, summary, source, split):
            counts += np.bincount(tokens, minlength=summary.vocab_size)
    return counts


def unigram_nats(train_counts: np.ndarray, heldout_counts: np.ndarray) -> float:
    """Nats spent on `heldout_counts` [V] by a unigram model with add-one smoothing, fitted on `train_counts` [V]."""
    log_probabilities = np.log(train_counts + 1) - math.log(train_counts.sum() + len(train_counts))
    return float(-(heldout_counts * log_probabilities).sum())


def unigram_heldout(folder: Path) -> dict[str, float]:
    """Held-out nats of every source under one unigram model fitted on the training tokens of all sources."""
    summary = records.read_summary(folder)
    train = token_counts(folder, summary, "train", summary.sources)
    return {name: unigram_nats(train, token_counts(folder, summary, "heldout", [name])) for name in summary.sources}
