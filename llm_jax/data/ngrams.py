"""Words and n-grams of many texts at once, as 64-bit hashes, straight from the UTF-8 bytes of an Arrow array.

A *unit* is a word (letters, digits, marks and underscores) or, in scripts that put no spaces between words (Han and
kana), a single character: an n-gram is n units in a row, in any language. Case is ignored, and what stands between
units (spaces, punctuation, symbols, emoji) belongs to none. All is NumPy passes over whole buffers, which take some 60
bytes of memory a byte of text: `blocks` cuts an array into slices small enough.

The hash of a part is that of a polynomial modulo 2^64 whose coefficients are random numbers of its bytes; prefix sums
over the buffer give it for any part in two look-ups (Karp and Rabin, 1987).
"""

import functools
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm_jax.errors import require

BLOCK_BYTES = 1 << 19  # of text worked on at once: the temporaries stay near the processor
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
GAP, WORD, HEAD, TAIL = range(4)  # a byte is between units, in a word, or first or later in a character alone
CJK = ((0x3005, 0x3008), (0x3021, 0x302A), (0x3040, 0x3100), (0x31F0, 0x3200), (0x3400, 0x4DC0), (0x4E00, 0xA000),
       (0xF900, 0xFB00), (0x20000, 0x40000))  # fmt: skip

Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]


class Units(NamedTuple):
    """The units of N texts, in order; those of text i are `offsets[i]:offsets[i + 1]`."""

    hashes: Hashes  # [units]
    starts: Integers  # [units] the first byte, counted within the text
    stops: Integers  # [units] one after the last byte
    is_cjk: npt.NDArray[np.bool_]  # [units] a character of a script without spaces
    offsets: Integers  # [N + 1]


class Ngrams(NamedTuple):
    """The n-grams of N texts, in order, repeated ones too; those of text i are `offsets[i]:offsets[i + 1]`."""

    hashes: Hashes  # [n-grams]
    first: Integers  # [n-grams] the unit that each begins with
    offsets: Integers  # [N + 1]


def blocks(texts: pa.Array, limit: int = BLOCK_BYTES) -> Iterator[pa.Array]:
    """Cut an array of strings into slices of at most `limit` bytes of text, or of one text."""
    sizes = np.asarray(pc.fill_null(pc.binary_length(texts), 0))
    for start, stop in runs(np.append(0, np.cumsum(sizes, dtype=np.int64)), limit):
        yield texts.slice(start, stop - start)


def runs(ends: Integers, limit: int) -> Iterator[tuple[int, int]]:
    """Cut what ends at `ends[1:]` into runs, from first to last, of `limit` at most or of one."""
    first = 0
    while first < len(ends) - 1:
        last = max(int(np.searchsorted(ends, ends[first] + limit, side="right")) - 1, first + 1)
        yield first, last
        first = last


def units(texts: pa.Array) -> Units:
    """The units of every text of an array of strings; a null has none."""
    data, edges = utf8_buffer(_lower(texts))
    kinds = np.full(len(data) + 2, GAP, np.uint8)
    kinds[1:-1] = _kinds(data)
    here = kinds[1:-1]
    first = np.zeros(len(data) + 1, np.bool_)
    first[edges] = True  # a word does not go on from one text into the next
    starts = np.flatnonzero((here == HEAD) | ((here == WORD) & ((kinds[:-2] != WORD) | first[:-1])))
    last = ((here == WORD) | (here == TAIL)) & ((kinds[2:] != here) | first[1:])
    stops = np.flatnonzero(last) + 1
    offsets = np.searchsorted(starts, edges)
    shift = np.repeat(edges[:-1], np.diff(offsets))
    return Units(hashes_of_bytes(data, starts, stops), starts - shift, stops - shift, here[starts] == HEAD, offsets)


def ngrams(found: Units, width: int | Integers) -> Ngrams:
    """The n-grams of every text, n being `width` for all texts or one number a text; a shorter text has none."""
    counts = np.diff(found.offsets)
    widths = np.broadcast_to(np.asarray(width, np.int64), counts.shape)
    require(bool(np.all(widths > 0)), f"the width of an n-gram must be positive, got {widths.min(initial=1)}")
    of_text = np.maximum(counts - widths + 1, 0)
    offsets = np.concatenate([[0], np.cumsum(of_text)])
    first = np.arange(offsets[-1]) + np.repeat(found.offsets[:-1] - offsets[:-1], of_text)
    stops = first + np.repeat(widths, of_text)
    return Ngrams(hashes_of_parts(found.hashes, first, stops), first, offsets)


def whole(found: Units, offsets: Integers | None = None) -> Hashes:
    """A hash of all units of each text, or of those between these offsets; 0 where there are none."""
    offsets = found.offsets if offsets is None else offsets
    counts = np.diff(offsets)
    hashes = np.zeros(len(counts), np.uint64)
    hashes[counts > 0] = ngrams(found._replace(offsets=offsets), np.maximum(counts, 1)).hashes
    return hashes


def utf8_buffer(texts: pa.Array) -> tuple[npt.NDArray[np.uint8], Integers]:
    """The bytes of all texts [total], without a copy, and where each begins and the last one ends [texts + 1]."""
    texts = texts.cast(pa.large_string()).fill_null("")
    edges = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    if not len(edges) or texts.buffers()[2] is None:
        return np.zeros(0, np.uint8), np.zeros(len(texts) + 1, np.int64)
    data = np.frombuffer(texts.buffers()[2], np.uint8)[edges[0] : edges[-1]]
    return data, edges - edges[0]


def hashes_of_bytes(data: npt.NDArray[np.uint8], starts: Integers, stops: Integers) -> Hashes:
    """A hash of each part `data[start:stop]`."""
    return hashes_of_parts(_byte_coefficients()[data], starts, stops)


def is_indented(data: npt.NDArray[np.uint8], starts: Integers) -> npt.NDArray[np.bool_]:
    """Whether what begins at each start, before the end of the data, does so with a tab or two spaces: as code may."""
    first, second = data[starts], data[np.minimum(starts + 1, len(data) - 1)]
    return (first == ord("\t")) | (first == ord(" ")) & (second == ord(" "))


def code_points(data: npt.NDArray[np.uint8]) -> tuple[Integers, npt.NDArray[np.int32]]:
    """Where the characters beyond ASCII begin in valid UTF-8, and their code points."""
    heads = np.flatnonzero(data >= 0xC0)
    lead = data[heads].astype(np.int32)
    second = (np.take(data, heads + 1, mode="clip") & 0x3F).astype(np.int32)
    third = (np.take(data, heads + 2, mode="clip") & 0x3F).astype(np.int32)
    points = np.where(lead < 0xE0, (lead & 0x1F) << 6 | second, (lead & 0x0F) << 12 | second << 6 | third)
    long = np.flatnonzero(lead >= 0xF0)
    fourth = (np.take(data, heads[long] + 3, mode="clip") & 0x3F).astype(np.int32)
    points[long] = (lead[long] & 0x07) << 18 | second[long] << 12 | third[long] << 6 | fourth
    return heads, points


def mix(values: Hashes) -> Hashes:
    """Spread every bit of a 64-bit number over all bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _lower(texts: pa.Array) -> pa.Array:
    """In lower case, but only ASCII letters of the rare texts whose length in bytes would change."""
    lower = pc.utf8_lower(texts)
    if pc.sum(pc.binary_length(lower)) == pc.sum(pc.binary_length(texts)):
        return lower
    same = pc.equal(pc.binary_length(lower), pc.binary_length(texts))
    return pc.if_else(same, lower, pc.ascii_lower(texts))


def _kinds(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """GAP, WORD, HEAD or TAIL of every byte of valid UTF-8."""
    kinds = _kinds_of_characters()[data]  # right for ASCII
    heads, points = code_points(data)
    kind = _kinds_of_characters()[points]
    kinds[heads] = kind
    kind = np.where(kind == HEAD, TAIL, kind).astype(np.uint8)
    for step, first in ((1, 0), (2, 0x800), (3, 0x10000)):  # code points from `first` on have more than `step` bytes
        longer = slice(None) if step == 1 else np.flatnonzero(points >= first)
        kinds[heads[longer] + step] = kind[longer]
    return kinds


@functools.cache
def _kinds_of_characters() -> npt.NDArray[np.uint8]:
    """GAP, WORD or HEAD of every code point below 0x40000, and of those above as one."""
    categories = (unicodedata.category(chr(point))[0] for point in range(0x20000))
    kinds = np.full(0x110000, WORD, np.uint8)
    kinds[:0x20000] = [WORD if category in "LNM" else GAP for category in categories]
    kinds[ord("_")] = WORD
    for start, stop in CJK:
        kinds[start:stop] = HEAD
    return kinds


@functools.cache
def _byte_coefficients() -> Hashes:
    return mix(np.arange(1, 257, dtype=np.uint64) * np.uint64(BASE))


def hashes_of_parts(values: Hashes, starts: Integers, stops: Integers) -> Hashes:
    """A hash of each `values[start:stop]`, such as the units from one on, which depends on nothing outside of it."""
    powers, inverses = _powers(1 << (max(len(values), BLOCK_BYTES) - 1).bit_length())
    prefix = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * powers[: len(values)], out=prefix[1:])
    return mix((prefix[stops] - prefix[starts]) * inverses[starts])


@functools.lru_cache(maxsize=1)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Of `BASE` and of its inverse modulo 2^64, from 0 on."""
    both = []
    for base in (BASE, pow(BASE, -1, 1 << 64)):
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors))
    return both[0], both[1]
