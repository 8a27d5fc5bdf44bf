"""Packing: windows of a fixed length cut from the concatenated documents of one source, as a pure function.

In epoch e the documents of a source stand in an order drawn from (seed, source, e) and form one stream of N tokens.
Window i covers the T tokens from i*T, and its targets the T tokens from i*T + 1, so that an epoch predicts every
token once, except the first of each document, which has no context. The last window is padded. Windows come in an
order drawn from (seed, source, e) too, because neighbours often share a long document.

Whole samples, which no window may cut, share rows instead: see `SharedRows`.

Memory: 16 bytes a document and 8 bytes a window for each of the last two epochs.

Shapes: T tokens of a window, D documents, N tokens of an epoch.
"""

import bisect
import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from llm_jax.data.batch import Batch
from llm_jax.errors import require


class Documents(Protocol):
    """Random access to tokenised documents."""

    lengths: np.ndarray  # [D] integers

    def read(self, documents: Sequence[int]) -> list[np.ndarray]:
        """The token ids of each document."""
        ...


class EpochOrder(NamedTuple):
    """One epoch's stream: the documents in order, where each starts, and the order of the windows."""

    documents_D: np.ndarray  # int64
    starts_D: np.ndarray  # int64, [D+1]: the last is N
    windows: np.ndarray  # int64


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) drawn from the integers of `key`.

    It sorts raw output of Philox, which NumPy keeps the same between versions, unlike `Generator.permutation`.
    """
    bits = np.random.Philox(np.random.SeedSequence(key))
    return np.argsort(bits.random_raw(size), kind="stable")


def window_count(tokens: int, length: int) -> int:
    """Windows that predict every token of a stream once: the stream's first token is no target."""
    return max(0, -(-(tokens - 1) // length))


class PackedSource:
    """The endless sequence of packed windows of one source; `self[i]` is a pure function of i and the arguments.

    `shuffle=False` keeps documents and windows in stored order.
    """

    def __init__(self, documents: Documents, name: str, length: int, seed: int, shuffle: bool = True):
        self._documents = documents
        self._length = length
        self._shuffle = shuffle
        self._key = (seed, zlib.crc32(name.encode()))
        self.windows = window_count(int(np.sum(documents.lengths, dtype=np.int64)), length)
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> EpochOrder:
        count = len(self._documents.lengths)
        if self._shuffle:
            documents_D = permutation(count, *self._key, epoch, 0)
            windows = permutation(self.windows, *self._key, epoch, 1)
        else:
            documents_D, windows = np.arange(count), np.arange(self.windows)
        lengths_D = np.asarray(self._documents.lengths, np.int64)[documents_D]
        return EpochOrder(documents_D, np.concatenate([[0], np.cumsum(lengths_D)]), windows)

    def __getitem__(self, index: int) -> Batch:
        """Window `index`, counted through all epochs: a `Batch` without its first axis."""
        epoch, within = divmod(int(index), self.windows)
        order = self._order(epoch)
        start = int(order.windows[within]) * self._length
        return self._pack(order, start, min(start + self._length + 1, int(order.starts_D[-1])))

    def locate(self, index: int, position: int) -> tuple[int, int]:
        """The document that token `position` of window `index` is from, and which of its tokens it is.

        Raises `UserError` for a position that is padding.
        """
        epoch, within = divmod(index, self.windows)
        order = self._order(epoch)
        token = int(order.windows[within]) * self._length + position
        require(0 <= position < self._length and token < order.starts_D[-1], f"position {position} holds no token")
        place = int(np.searchsorted(order.starts_D, token, side="right")) - 1
        return int(order.documents_D[place]), token - int(order.starts_D[place])

    def _pack(self, order: EpochOrder, start: int, stop: int) -> Batch:
        """The window of stream tokens [start, stop): the last is a target only."""
        first = int(np.searchsorted(order.starts_D, start, side="right")) - 1
        last = int(np.searchsorted(order.starts_D, stop, side="left"))  # one past the last document
        # Document borders inside the window; np.clip takes 10 times longer on arrays this short.
        edges = np.minimum(np.maximum(order.starts_D[first : last + 1], start), stop) - start
        stream = np.zeros(self._length + 1, np.int32)
        pieces = self._documents.read(order.documents_D[first:last].tolist())
        pieces[-1] = pieces[-1][: stop - int(order.starts_D[last - 1])]
        pieces[0] = pieces[0][start - int(order.starts_D[first]) :]
        stream[: stop - start] = np.concatenate(pieces)
        return _window(stream, edges, self._length)


def _window(stream: np.ndarray, edges: np.ndarray, length: int) -> Batch:
    """Fields of a window of T+1 `stream` tokens whose documents lie between consecutive `edges`."""
    segments = np.zeros(length + 1, np.int32)
    positions = np.zeros(length + 1, np.int32)
    counts = np.diff(edges)
    filled = int(edges[-1])
    segments[:filled] = np.repeat(np.arange(1, len(counts) + 1, dtype=np.int32), counts)
    positions[:filled] = np.arange(filled, dtype=np.int32) - np.repeat(edges[:-1].astype(np.int32), counts)
    # The target of a document's last token would be the next document's first, or padding.
    weights = (segments[:-1] == segments[1:]) & (segments[1:] > 0)
    return Batch(stream[:-1], stream[1:], weights.astype(np.float32), segments[:-1], positions[:-1])


def share_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which of these lengths share a row: every index in one list, no list's lengths above `capacity` in sum.

    Best fit: in the order given, each goes where it leaves the least room. From the longest to the shortest, that takes
    about 11/9 of the fewest possible rows at the very most (Johnson, 1974), and hardly any more in practice.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # the free places that some row has, ascending
    rows_by_space: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        at = bisect.bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del spaces[at]
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if not rows_by_space.setdefault(space - length, []):
            bisect.insort(spaces, space - length)
        rows_by_space[space - length].append(row)
    return rows


class SharedRows:
    """Which whole items share a row, in an endless sequence: `self[i]` is a pure function of i and the arguments.

    In every epoch each item is drawn once. Which lengths share a row follows from all lengths alone (best fit, the
    longest first), so every epoch has as many rows. Items of equal length swap places from epoch to epoch, and rows
    come in another order, both drawn from (seed, name, epoch). `padded` puts one item into a row.

    Raises `UserError` for an item that is longer than a row.
    """

    def __init__(self, lengths: Sequence[int], name: str, capacity: int, seed: int, padded: bool = False):
        self._capacity = capacity
        self._key = (seed, zlib.crc32(name.encode()))
        self._lengths = np.array(lengths, np.int64)
        longest = int(self._lengths.max(initial=0))
        require(longest <= capacity, f"a sample of {longest:,} tokens does not fit into a row of {capacity:,}")
        descending = sorted(self._lengths.tolist(), reverse=True)
        self._rows = [[i] for i in range(len(descending))] if padded else share_rows(descending, capacity)
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    @property
    def windows(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    @property
    def most(self) -> int:
        """Items of the fullest row; 0 without rows."""
        return max(map(len, self._rows), default=0)

    @property
    def fill(self) -> float:
        """The share of the rows' places that an item takes up."""
        return float(self._lengths.sum() / (self._capacity * max(1, self.windows)))

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The items from the longest to the shortest, equal ones shuffled; and the order of the rows."""
        items = permutation(len(self._lengths), *self._key, epoch, 0)
        items = items[np.argsort(-self._lengths[items], kind="stable")]
        return items, permutation(self.windows, *self._key, epoch, 1)

    def __getitem__(self, index: int) -> list[int]:
        """The items of row `index`, counted through all epochs, in the order in which they stand in it."""
        epoch, within = divmod(int(index), self.windows)
        items, rows = self._order(epoch)
        return [int(items[i]) for i in self._rows[rows[within]]]
