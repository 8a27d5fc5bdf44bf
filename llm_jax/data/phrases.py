"""Where fixed phrases occur in texts: all of them in one pass over the bytes (Aho and Corasick, 1975)."""

import functools
from typing import NamedTuple

import ahocorasick_rs
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


class Occurrences(NamedTuple):
    """Where phrases occur, in the order of their ends; several may overlap."""

    phrase: Integers  # its place among the phrases
    starts: Integers  # its first byte
    stops: Integers


def find(phrases: tuple[str, ...], data: Bytes) -> Occurrences:
    """All occurrences of the phrases in a buffer of UTF-8, upper and lower case being different."""
    found = _automaton(phrases).find_matches_as_indexes(data.data, overlapping=True) if phrases else []
    return Occurrences(*np.array(found, np.int64).reshape(-1, 3).T)


@functools.lru_cache(maxsize=8)
def _automaton(phrases: tuple[str, ...]) -> ahocorasick_rs.BytesAhoCorasick:
    encoded = [phrase.encode() for phrase in phrases]
    return ahocorasick_rs.BytesAhoCorasick(encoded, implementation=ahocorasick_rs.Implementation.DFA)
