"""Which source gives the next sequence: a deterministic interleaving in proportion to the sources' weights.

Grain's mixing is used: after k sequences every source has been drawn within a few of its share of k, and the k-th
draw is computed from k alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import grain

from llm_jax.config import unknown_key
from llm_jax.data.records import Summary
from llm_jax.errors import UserError, require

T = TypeVar("T")
ENDLESS = 1 << 48  # sequences: more than any run reads, and within what Grain's index arithmetic holds


class Windows(Protocol):
    """The endless sequence of a source's windows."""

    @property
    def windows(self) -> int:
        """How many an epoch has."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Window `index`, counted through all epochs: a `Batch`, or another batch, without its first axis."""
        ...


class Endless:
    """A source as Grain sees it: random access without an end."""

    def __init__(self, source: Windows):
        self._source = source

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Any:
        return self._source[index]


def fractions(summary: Summary, weights: Mapping[str, float]) -> dict[str, float]:
    """Each source's share of the sequences, without those whose share is 0; {} takes the dataset's weights, if it has
    any, and else weighs by training tokens.

    Raises `UserError` for a weight of a source that the dataset does not have, or that has nothing to train on.
    """
    _check_known(weights, summary.sources, "DataConfig")
    for name, weight in weights.items():
        trainable = summary.sources[name].train.tokens > 1
        require(trainable or weight == 0, f"DataConfig.weights: source {name!r} has no training documents")
    by_tokens = {
        name: float(source.train.tokens) for name, source in summary.sources.items() if source.train.tokens > 1
    }
    chosen = {name: weight for name, weight in (weights or summary.weights or by_tokens).items() if weight > 0}
    total = sum(chosen.values())
    return {name: chosen[name] / total for name in sorted(chosen)}


def pools(items: Mapping[str, Sequence[T]], weights: Mapping[str, float], config: str) -> dict[str, Sequence[T]]:
    """Which items are packed together: without weights those of all sources, else each weighted source's on their own.

    Raises `UserError`, naming the `config` that has the weights, for a weight of an unknown source.
    """
    _check_known(weights, items, config)
    if weights:
        return {name: items[name] for name in sorted(weights) if weights[name] > 0}
    return {"": [item for name in sorted(items) for item in items[name]]}


def _check_known(weights: Mapping[str, float], sources: Mapping[str, Any], config: str) -> None:
    for name in weights:
        if name not in sources:
            message = unknown_key(name, list(sources)).removeprefix("unknown config key ")
            raise UserError(f"{config}.weights: no source {message}; there are {', '.join(sources)}")


def mix(sources: Mapping[str, Windows], shares: Mapping[str, float]) -> grain.MapDataset[Any]:
    """The endless, random-access sequence of single windows drawn from `sources` in proportion to `shares`."""
    datasets = [grain.MapDataset.source(Endless(sources[name])) for name in shares]
    return grain.MapDataset.mix(datasets, list(shares.values()))
