"""MinHash signatures of many texts at once, their bands, and the Jaccard similarity of pairs.

D: documents, G: n-grams of all of them, K: permutations, P: pairs. Broder (1997) for signatures; Leskovec, Rajaraman
and Ullman, Mining of Massive Datasets, section 3.4, for bands.
"""

from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm_jax.data import ngrams
from llm_jax.data.loops import compiled
from llm_jax.errors import UserError

SEED = 1  # of the permutations; signatures of different runs can be compared
COMPARED = 1 << 22  # n-grams of pairs compared at once
Share = TypeVar("Share", float, npt.NDArray[np.float64])


class Sets(NamedTuple):
    """The set of n-grams of each text, as 32-bit hashes; those of text i are `hashes_G[offsets_D[i]:offsets_D[i+1]]`.

    Within a pair of texts of 10,000 n-grams each, a chance of 0.02 that two of them have the same hash.
    """

    hashes_G: npt.NDArray[np.uint32]
    offsets_D: npt.NDArray[np.int64]  # [D + 1]


def shingles(texts: pa.Array, words: int, characters: int) -> Sets:
    """The n-grams of each text, repeated ones too: of `words`, or of `characters` where half its units are those of a
    script without spaces. All units of a shorter text are one; a text without units has none.
    """
    found = ngrams.units(pc.utf8_normalize(texts, "NFKC"))
    counts = np.diff(found.offsets)
    alone = np.diff(np.concatenate([[0], np.cumsum(found.is_cjk)])[found.offsets])
    widths = np.where(2 * alone >= counts, characters, words)
    grams = ngrams.ngrams(found, np.clip(counts, 1, widths))
    return Sets((grams.hashes >> np.uint64(32)).astype(np.uint32), grams.offsets)


def signatures(sets: Sets, permutations: int) -> npt.NDArray[np.uint32]:
    """The least of each text's n-grams under each permutation, [D, K]; every text must have n-grams.

    The hashes are random already, so a multiplication by an odd number permutes them well enough.
    """
    factors = np.random.default_rng(SEED).integers(0, 1 << 31, permutations, np.uint32) * np.uint32(2) + np.uint32(1)
    return _least(*sets, factors)


@compiled
def _least(
    hashes_G: npt.NDArray[np.uint32], offsets_D: npt.NDArray[np.int64], factors_K: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint32]:
    """The least product of each text's hashes with each factor [D, K]."""
    least = np.full((len(offsets_D) - 1, len(factors_K)), 0xFFFFFFFF, np.uint32)
    for text in range(len(least)):
        row = least[text]
        for value in hashes_G[offsets_D[text] : offsets_D[text + 1]]:
            for k in range(len(factors_K)):
                row[k] = min(row[k], np.uint32(value * factors_K[k]))
    return least


def band_keys(signatures_DK: npt.NDArray[np.uint32], bands: int, rows: int) -> npt.NDArray[np.uint64]:
    """A hash of every band of the signatures, [D, bands]: equal where all its rows are, and never in another band."""
    values = signatures_DK[:, : bands * rows].reshape(-1, bands, rows).astype(np.uint64)
    keys = np.broadcast_to(np.arange(bands, dtype=np.uint64), values.shape[:2])
    for row in range(rows):
        keys = ngrams.mix(keys + values[:, :, row] + np.uint64(ngrams.BASE))
    return keys


def found_share(similarity: Share, bands: int, rows: int) -> Share:
    """The share of pairs of a Jaccard similarity that have a band in common: the S-curve 1 - (1 - s^rows)^bands."""
    return 1 - (1 - similarity**rows) ** bands


def solve(threshold: float, permutations: int, recall: float) -> tuple[int, int]:
    """Bands and rows of most rows, so with fewest false candidates, that find `recall` of pairs at the threshold.

    Raises `UserError` if so many permutations are too few even with one row a band.
    """
    for rows in range(permutations, 0, -1):
        bands = permutations // rows
        if found_share(threshold, bands, rows) >= recall:
            return bands, rows
    least = f"{found_share(threshold, permutations, 1):.3f}"
    raise UserError(
        f"{permutations} permutations find {least} of pairs of similarity {threshold}, not {recall}: use more"
    )


def unique(sets: Sets) -> Sets:
    """Without repetitions, each text's hashes in rising order."""
    documents = np.repeat(np.arange(len(sets.offsets_D) - 1, dtype=np.uint64), np.diff(sets.offsets_D))
    values = np.unique(documents << np.uint64(32) | sets.hashes_G)
    bounds = np.arange(len(sets.offsets_D), dtype=np.uint64) << np.uint64(32)
    return Sets(values.astype(np.uint32), np.searchsorted(values, bounds))


def sets_of(texts: pa.Array, words: int, characters: int) -> Sets:
    """The n-grams of each text without repetitions, of many texts."""
    parts = [unique(shingles(block, words, characters)) for block in ngrams.blocks(texts)]
    sizes = np.concatenate([np.diff(part.offsets_D) for part in parts])
    return Sets(np.concatenate([part.hashes_G for part in parts]), np.append(0, np.cumsum(sizes)))


def jaccard(sets: Sets, left_P: np.ndarray, right_P: np.ndarray) -> npt.NDArray[np.float64]:
    """Of pairs of texts, given as positions in `sets`, which must be `unique`."""
    sizes = np.diff(sets.offsets_D)
    total_P = sizes[left_P] + sizes[right_P]
    runs = ngrams.runs(np.append(0, np.cumsum(total_P)), COMPARED)
    common = [_common(sets, left_P[a:b], right_P[a:b]) for a, b in runs]
    shared_P = np.concatenate([np.zeros(0, np.int64), *common])
    return shared_P / np.maximum(total_P - shared_P, 1)


def _common(sets: Sets, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
    """How many hashes both texts of a pair have: those seen twice once both are sorted together."""
    both = np.concatenate([left_P, right_P])
    sizes = np.diff(sets.offsets_D)[both]
    ends = np.cumsum(sizes)
    where = np.arange(ends[-1]) + np.repeat(sets.offsets_D[both] - (ends - sizes), sizes)
    pairs = np.repeat(np.tile(np.arange(len(left_P), dtype=np.uint64), 2), sizes)
    values = np.sort(pairs << np.uint64(32) | sets.hashes_G[where])
    twice = values[1:][values[1:] == values[:-1]]
    return np.bincount((twice >> np.uint64(32)).astype(np.int64), minlength=len(left_P))
