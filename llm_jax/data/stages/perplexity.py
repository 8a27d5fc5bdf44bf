"""How likely text is: bits per byte under a byte n-gram model of reference text, or under a model of another kind.

The n-gram model interpolates by Witten and Bell's rule (1991): a context seen c times, with t different bytes after
it, leaves t / (c + t) to the shorter context. Rare n-grams are left out and their share goes the same way.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm_jax.data.loops import compiled
from llm_jax.data.stages import byte_ngrams
from llm_jax.data.stages.byte_ngrams import ORDER, ROWS, TAG, TAG_BITS, Buffer, Sentences

SEEN_ONCE_ORDER = 3  # longer n-grams have to be seen twice
Keys = npt.NDArray[np.uint64]
# From the sentences of a buffer to the bits of each, float32 [sentences].
SentenceBits = Callable[[Buffer, Sentences], npt.NDArray[np.float32]]


class Scorer(NamedTuple):
    """Trained models that are somewhere else; what they are made of is known to the code above this one."""

    load: Callable[[str], SentenceBits]  # from a path
    files: Callable[[str], list[Path]]  # whose contents stand for the model at a path


class _Order(NamedTuple):
    """What is known of the n-grams of one length."""

    keys: Keys  # their bytes as a number, sorted
    counts: npt.NDArray[np.int64]
    shares: npt.NDArray[np.float64]
    contexts: Keys  # sorted
    back_offs: npt.NDArray[np.float64]  # of the contexts


def train(texts: pa.Array) -> tuple[npt.NDArray[np.uint32], float]:
    """The language model's table, uint32 [ORDER, ROWS], and the back-off of the empty context.

    Nothing depends on the order of the texts.
    """
    found = byte_ngrams.buffer(texts)
    keys = np.sort(_keys(found.folded, found.starts, found.stops))
    orders = [_count(keys, order) for order in range(1, ORDER + 1)]
    table = np.zeros((ORDER, ROWS), np.uint32)
    for order, this in enumerate(orders, start=1):
        longer = orders[order] if order < ORDER else None
        _fill(table[order - 1], this, order, longer)
    return table, float(orders[0].back_offs[0]) if len(keys) else 1.0


@compiled
def _keys(folded: byte_ngrams.Bytes, starts: byte_ngrams.Integers, stops: byte_ngrams.Integers) -> Keys:
    """The `ORDER` bytes from each byte of the texts on, the first highest, and below how many are the text's own."""
    keys = np.empty(np.sum(stops - starts), np.uint64)
    done = 0
    for text in range(len(starts)):
        for at in range(starts[text], stops[text]):
            key = np.uint64(0)
            for further in range(ORDER):
                key = key << np.uint64(8) | np.uint64(folded[at + further])
            keys[done] = key << np.uint64(8) | np.uint64(min(stops[text] - at, ORDER))
            done += 1
    return keys


def _count(keys: Keys, order: int) -> _Order:
    """Count the n-grams of a length, and share out each context's probability."""
    grams, counts = _grams(keys, order)
    first = np.flatnonzero(np.diff(grams >> np.uint64(8), prepend=~grams[:1]) != 0)
    contexts, different = grams[first] >> np.uint64(8), np.diff(np.append(first, len(grams)))
    total = np.add.reduceat(counts, first) + different
    shares = counts / np.repeat(total, different)
    kept = counts > (0 if order <= SEEN_ONCE_ORDER else 1)
    back_offs = 1 - np.add.reduceat(np.where(kept, shares, 0.0), first)
    return _Order(grams[kept], counts[kept], shares[kept], contexts, back_offs)


@compiled
def _grams(keys: Keys, order: int) -> tuple[Keys, npt.NDArray[np.int64]]:
    """The different n-grams of a length that sorted keys begin with, and how often each is there."""
    grams, counts, size = np.empty(len(keys), np.uint64), np.zeros(len(keys), np.int64), 0
    for key in keys:
        if key & np.uint64(255) >= np.uint64(order):
            gram = key >> np.uint64(8 * (ORDER + 1 - order))
            if size == 0 or grams[size - 1] != gram:
                grams[size] = gram
                size += 1
            counts[size - 1] += 1
    return grams[:size].copy(), counts[:size].copy()


def _fill(table: npt.NDArray[np.uint32], this: _Order, order: int, longer: _Order | None) -> None:
    """Write the n-grams of one length; of those with the same row the most frequent one stays."""
    back_offs = np.ones(len(this.keys))
    if longer is not None:
        # A rare context is no entry, so what follows it is left to the shorter ones.
        is_kept = np.isin(longer.contexts, this.keys)
        kept = longer.contexts[is_kept]
        back_offs[np.searchsorted(this.keys, kept)] = longer.back_offs[is_kept]
    mixed = byte_ngrams.hashes_of_keys(this.keys, order)
    tags = mixed & TAG
    entries = byte_ngrams.encode(this.shares) << np.uint32(22) | byte_ngrams.encode(back_offs) << np.uint32(12) | tags
    ascending = np.argsort(this.counts, kind="stable")
    table[mixed[ascending] >> np.uint32(TAG_BITS)] = entries[ascending]


def ngram_bits(tables: byte_ngrams.Tables) -> SentenceBits:
    """The bits of sentences under the n-gram model of tables."""
    return functools.partial(byte_ngrams.bits, tables=tables)
