"""Where fixed phrases occur in texts: all of them in one pass over the bytes (Aho and Corasick, 1975)."""

import functools
from typing import NamedTuple

import ahocorasick_rs
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm_jax.data import ngrams

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


def counts(phrases: tuple[str, ...], texts: pa.Array, within: int | None = None) -> Integers:
    """How many of the phrases' occurrences each text has, the first to end first, without those that overlap it.

    The phrases are in lower case, the texts may have capitals of ASCII. They are looked for in all of a text, or in
    the first `within` bytes.
    """
    data, edges = ngrams.utf8_buffer(texts)
    limits = edges[1:] if within is None else np.minimum(edges[1:], edges[:-1] + within)
    found = find(phrases, ngrams.ascii_lower(data))
    text = np.searchsorted(edges, found.starts, side="right") - 1
    counted, done = np.zeros(len(texts), np.int64), np.int64(0)
    for place, start, stop in zip(text, found.starts, found.stops, strict=True):
        if start >= done and stop <= limits[place]:  # not from one text into the next
            counted[place] += 1
            done = stop
    return counted


@functools.lru_cache(maxsize=8)
def _automaton(phrases: tuple[str, ...]) -> ahocorasick_rs.BytesAhoCorasick:
    encoded = [phrase.encode() for phrase in phrases]
    return ahocorasick_rs.BytesAhoCorasick(encoded, implementation=ahocorasick_rs.Implementation.DFA)
