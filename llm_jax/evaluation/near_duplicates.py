"""Which texts are near-duplicates, by comparing all of them: what MinHash should find, found without it.

N-grams are tuples of Python's strings, counted by a sparse product: nothing is hashed, and no code is shared with the
stage that this judges. D texts, G different n-grams, P pairs.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import csr_array, triu

from llm_jax.data.planted_texts import ALONE, units
from llm_jax.data.stages import minhash
from llm_jax.data.stages.fuzzy import FuzzyConfig

IDEOGRAPH = re.compile(f"[{ALONE}]")
COMPARED = 1 << 18  # pairs whose bands are compared at once
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Pairs(NamedTuple):
    """Pairs of texts that share an n-gram, by their places, and how similar they are."""

    left_P: Integers
    right_P: Integers
    similarity_P: Floats


class Bin(NamedTuple):
    """The pairs of about one similarity."""

    low: float
    high: float
    pairs: int
    expected: float  # share with a band in common, by the S-curve at each pair's similarity
    found: float  # share that has one
    deviation: float  # of `found`, by chance


def is_unspaced(found: Sequence[str]) -> bool:
    """Whether half of a text's units are characters of a script without spaces."""
    return 2 * sum(IDEOGRAPH.match(unit) is not None for unit in found) >= len(found)


def ngrams(text: str, words: int, characters: int) -> set[tuple[str, ...]]:
    """Of `words`, or of `characters` where half of the units are those of a script without spaces."""
    found = units(text)
    width = min(characters if is_unspaced(found) else words, len(found))
    return {tuple(found[i : i + width]) for i in range(len(found) - width + 1)} if found else set()


def similarity(left: str, right: str, words: int, characters: int) -> float:
    """The Jaccard similarity of two texts' n-grams; 0 where neither has any."""
    first, second = (ngrams(text, words, characters) for text in (left, right))
    return len(first & second) / max(len(first | second), 1)


def all_pairs(texts: Sequence[str], words: int, characters: int) -> Pairs:
    """Every pair of texts with an n-gram in common."""
    numbers: dict[tuple[str, ...], int] = {}
    columns, ends = list[int](), [0]
    for text in texts:
        columns += [numbers.setdefault(gram, len(numbers)) for gram in ngrams(text, words, characters)]
        ends.append(len(columns))
    has_DG = csr_array((np.ones(len(columns), np.int32), columns, ends), shape=(len(texts), len(numbers)))
    shared = triu(has_DG @ has_DG.T, k=1).tocoo()
    sizes = np.diff(ends)
    left_P, right_P = (place.astype(np.int64) for place in shared.coords)
    return Pairs(left_P, right_P, shared.data / (sizes[left_P] + sizes[right_P] - shared.data))


def banded(texts: Sequence[str], config: FuzzyConfig, bands: int, rows: int, pairs: Pairs) -> npt.NDArray[np.bool_]:
    """Which of the pairs the stage takes for candidates: those with a band in common."""
    used, places = np.unique(np.concatenate(pairs[:2]), return_inverse=True)
    chosen = pa.array([texts[place] for place in used], pa.large_string())
    signatures = minhash.signatures(minhash.shingles(chosen, config.words, config.characters), config.permutations)
    keys = minhash.band_keys(signatures, bands, rows)
    left_P, right_P = np.split(places, 2)
    return np.concatenate([np.any(keys[a] == keys[b], axis=1) for a, b in _chunks(left_P, right_P)])


def _chunks(left_P: Integers, right_P: Integers) -> Iterator[tuple[Integers, Integers]]:
    for start in range(0, max(len(left_P), 1), COMPARED):
        yield left_P[start : start + COMPARED], right_P[start : start + COMPARED]


def s_curve(pairs: Pairs, found_P: npt.NDArray[np.bool_], bands: int, rows: int, edges: Sequence[float]) -> list[Bin]:
    """Found and expected shares between the edges; empty bins are left out."""
    expected_P = minhash.found_share(pairs.similarity_P, bands, rows)  # type: ignore[arg-type]  # an array will do
    bins = []
    for low, high in itertools.pairwise(edges):
        inside = (pairs.similarity_P > low) & (pairs.similarity_P <= high)
        if count := int(inside.sum()):
            share = expected_P[inside]
            deviation = float(np.sqrt((share * (1 - share)).sum())) / count
            bins.append(Bin(low, high, count, float(share.mean()), float(found_P[inside].mean()), deviation))
    return bins
