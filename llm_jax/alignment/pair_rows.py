"""Pairs as tokens in rows that cut none, and the batches of a run: a pure function of the pairs, config and step.

What a row holds of its pairs is up to who trains on them: see `Row`.

Legend: B rows, P pairs of a row.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import jax
import numpy as np

from llm_jax.alignment.config import PairDataConfig
from llm_jax.alignment.conversations import BadRecordError, Tally
from llm_jax.alignment.preferences import Pair
from llm_jax.data import loader, mixture
from llm_jax.data.packing import SharedRows
from llm_jax.errors import UserError, require


class EncodedPair(Protocol):
    """A pair as tokens."""

    @property
    def length(self) -> int:
        """Tokens of both responses, each with its prompt."""
        ...


Item = TypeVar("Item", bound=EncodedPair)
Contra = TypeVar("Contra", bound=EncodedPair, contravariant=True)
Made = TypeVar("Made")
Out = TypeVar("Out", covariant=True)


class Row(Protocol[Contra, Out]):
    """Makes a row of pairs: a batch without its first axis."""

    def __call__(self, pairs: Sequence[Contra], length: int, places: int) -> Out:
        """`length` tokens, and places for so many pairs, of which those after the last have weight 0."""
        ...


def encode_all(pairs: Iterable[Pair], encode: Callable[[Pair], Item]) -> tuple[dict[str, list[Item]], Tally]:
    """The pairs of each source as tokens, and a count of those for which `encode` raises an error.

    Raises `UserError` where no pair is left.
    """
    found: dict[str, list[Item]] = {}
    tally = Tally()
    for pair in pairs:
        try:
            found.setdefault(pair.source, []).append(encode(pair))
        except BadRecordError as error:
            tally.add(error.reason, pair.record, error.detail)
        except UserError as error:
            tally.add("not encodable", pair.record, str(error))
    found = {source: kept for source, kept in found.items() if kept}
    require(bool(found), f"no pair of responses is left to learn from: {str(tally) or 'there were none'}")
    return found, tally


class _Rows(Generic[Item, Made]):
    """The endless sequence of rows of some pairs; `self[i]` is a pure function of i and the arguments."""

    def __init__(self, pairs: Sequence[Item], name: str, config: PairDataConfig, row: Row[Item, Made]):
        self._pairs = pairs
        self._row = row
        self._length = config.sequence_length
        lengths = [pair.length for pair in pairs]
        self._shared = SharedRows(lengths, name, config.sequence_length, config.seed, padded=not config.packed)
        self.places = self._shared.most

    @property
    def windows(self) -> int:
        """Rows of an epoch."""
        return self._shared.windows

    def __getitem__(self, index: int) -> Made:
        """Row `index`, counted through all epochs: a batch without its first axis."""
        return self._row([self._pairs[i] for i in self._shared[index]], self._length, self.places)


class PackedPairs(Generic[Item, Made]):
    """Batches for a run: row g of the run is the g-th of an endless sequence, and step s takes rows [s*B, (s+1)*B).

    Without `config.weights` all sources are one, and each pair is drawn once in `rows_per_epoch` consecutive rows. With
    them, each source is packed on its own, rows come from the sources so that a source has its share of the *pairs*,
    and an epoch is as long as it can be without drawing a pair twice: with equal weights for LLaMA-2's own helpfulness
    data and the rest, it is all of the former and as many of the latter (section 3.2.2).
    """

    def __init__(self, pairs: Mapping[str, Sequence[Item]], config: PairDataConfig, row: Row[Item, Made]):
        """Pairs of each source, encoded for the config's sequence length, and what makes a row of some.

        Raises `UserError` for a weight of an unknown source, a pair longer than a row, or fewer rows than a batch has.
        """
        self._config = config
        name_of_config = type(config).__name__
        pools = mixture.pools(pairs, config.weights, name_of_config)
        sources = {name: _Rows(pool, name, config, row) for name, pool in pools.items()}
        # Of a power of two, so that similar pairs are trained on by one compiled program.
        self._places = power_of_two(max(rows.places for rows in sources.values()))
        for rows in sources.values():
            rows.places = self._places
        shares = _row_shares({name: (len(pools[name]), rows.windows) for name, rows in sources.items()}, config.weights)
        self.rows_per_epoch = int(min(sources[name].windows / share for name, share in shares.items()))
        self.pairs_per_row = sum(share * len(pools[name]) / sources[name].windows for name, share in shares.items())
        require(
            self.rows_per_epoch >= config.batch_size,
            f"the pairs fill {self.rows_per_epoch:,} rows of {config.sequence_length:,} tokens, fewer than a batch of "
            f"{config.batch_size:,}: lower {name_of_config}.batch_size or sequence_length, or add pairs",
        )
        self._rows = mixture.mix(sources, shares)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row of an epoch has been drawn."""
        return -(-self.rows_per_epoch // self._config.batch_size)

    def batch(self, step: int) -> Made:
        """The global batch of a step."""
        found: Made = self._rows.batch(self._config.batch_size)[step]
        return found

    def train_batches(
        self, *, start_step: int = 0, process_index: int = 0, process_count: int = 1, prefetch: int = 8
    ) -> Iterator[Made]:
        """This process's rows, [B/process_count,...], of the global batches from `start_step` on, without end.

        `prefetch` batches are prepared ahead in background threads. Raises `UserError` for a batch size that the
        processes do not divide.
        """
        return loader.batches_of_process(
            self._rows,
            self._config.batch_size,
            start_step=start_step,
            process_index=process_index,
            process_count=process_count,
            prefetch=prefetch,
        )


def power_of_two(count: int) -> int:
    """The next one from `count` on."""
    return 1 << max(count - 1, 0).bit_length()


def _row_shares(sizes: Mapping[str, tuple[int, int]], weights: Mapping[str, float]) -> dict[str, float]:
    """Each source's share of the rows, from its share of the pairs and its (pairs, rows)."""
    if not weights:
        return dict.fromkeys(sizes, 1.0)
    rows = {name: weights[name] * count / pairs for name, (pairs, count) in sizes.items()}
    return {name: part / sum(rows.values()) for name, part in rows.items()}


def heldout_batches(
    pairs: Sequence[Item],
    config: PairDataConfig,
    row: Row[Item, Made],
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Made]:
    """This process's rows of batches with every pair once, always in the same order; rows after the last are empty.

    Raises `UserError` for a batch size that the processes do not divide, or a pair longer than a row.
    """
    count = loader.rows_of_process(config.batch_size, process_index, process_count)
    rows = _Rows(pairs, "heldout", dataclasses.replace(config, seed=0), row)
    empty = row([], config.sequence_length, rows.places)
    for start in range(process_index * count, rows.windows + process_index * count, config.batch_size):
        chosen = [rows[i] if i < rows.windows else empty for i in range(start, start + count)]
        yield stack(chosen)


def stack(rows: Sequence[Made]) -> Made:
    """Rows as a batch."""
    batch: Made = jax.tree.map(lambda *fields: np.stack(fields), *rows)
    return batch
