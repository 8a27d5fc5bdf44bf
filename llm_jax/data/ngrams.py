"""Words and n-grams of many texts at once, as 64-bit hashes, straight from the UTF-8 bytes of an Arrow array.

A *unit* is a word (letters, digits, marks and underscores) or, in scripts that put no spaces between words (Han and
kana), a single character: an n-gram is n units in a row, in any language. Case is ignored, and what stands between
units (spaces, punctuation, symbols, emoji) belongs to none.

The hash of a part is that of a polynomial modulo 2^64 whose coefficients are random numbers of its bytes; that of an
n-gram follows from that of the n-gram before it (Karp and Rabin, 1987).
"""

import functools
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm_jax.data.loops import compiled
from llm_jax.errors import require

BLOCK_BYTES = 1 << 19  # of text worked on at once: the temporaries stay near the processor
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
INVERSE = pow(BASE, -1, 1 << 64)
GAP, WORD, ALONE = range(3)  # a character is between units, in a word, or a unit
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
    return Units(*_units(*utf8_buffer(texts), _kinds(), *_small_letters()))


def ngrams(found: Units, width: int | Integers) -> Ngrams:
    """The n-grams of every text, n being `width` for all texts or one number a text; a shorter text has none."""
    widths = np.full(len(found.offsets) - 1, width, np.int64)
    require(bool(np.all(widths > 0)), f"the width of an n-gram must be positive, got {widths.min(initial=1)}")
    offsets = np.append(0, np.cumsum(np.maximum(np.diff(found.offsets) - widths + 1, 0)))
    hashes, first = _ngrams(found.hashes, found.offsets, widths, offsets)
    return Ngrams(hashes, first, offsets)


def whole(found: Units, offsets: Integers | None = None) -> Hashes:
    """A hash of all units of each text, or of those between these offsets; 0 where there are none."""
    offsets = found.offsets if offsets is None else offsets
    return hashes_of_parts(found.hashes, offsets[:-1], offsets[1:])


def utf8_buffer(texts: pa.Array) -> tuple[npt.NDArray[np.uint8], Integers]:
    """The bytes of all texts [total], without a copy, and where each begins and the last one ends [texts + 1]."""
    texts = texts.cast(pa.large_string()).fill_null("")
    edges = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    if not len(edges) or texts.buffers()[2] is None:
        return np.frombuffer(b"", np.uint8), np.zeros(len(texts) + 1, np.int64)
    data = np.frombuffer(texts.buffers()[2], np.uint8)[edges[0] : edges[-1]]
    return data, edges - edges[0]


def strings(data: npt.NDArray[np.uint8], edges: Integers) -> pa.Array:
    """The texts that `utf8_buffer` has the bytes of."""
    return pa.LargeStringArray.from_buffers(len(edges) - 1, pa.py_buffer(edges), pa.py_buffer(data))


@compiled
def ascii_lower(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """UTF-8 with small letters for capitals of ASCII.

    Arrow's own function takes the first offset of an array that is no slice for 0, which need not be so.
    """
    lower = data.copy()
    for place in range(len(lower)):
        lower[place] += np.uint8(32 if 65 <= lower[place] <= 90 else 0)
    return lower


def is_indented(data: npt.NDArray[np.uint8], starts: Integers) -> npt.NDArray[np.bool_]:
    """Whether what begins at each start, before the end of the data, does so with a tab or two spaces: as code may."""
    first, second = data[starts], data[np.minimum(starts + 1, len(data) - 1)]
    return (first == ord("\t")) | (first == ord(" ")) & (second == ord(" "))


@compiled
def code_point(data: npt.NDArray[np.uint8], place: int) -> tuple[np.int64, int]:
    """The code point of the character that begins at a place of valid UTF-8, and its bytes."""
    lead = np.int64(data[place])
    if lead < 0x80:
        return lead, 1
    second = np.int64(data[place + 1]) & 0x3F
    if lead < 0xE0:
        return (lead & 0x1F) << 6 | second, 2
    third = np.int64(data[place + 2]) & 0x3F
    if lead < 0xF0:
        return (lead & 0x0F) << 12 | second << 6 | third, 3
    return (lead & 0x07) << 18 | second << 12 | third << 6 | np.int64(data[place + 3]) & 0x3F, 4


@compiled
def mix(values: Hashes) -> Hashes:
    """Spread every bit of a 64-bit number over all bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@compiled
def hashes_of_parts(values: Hashes, starts: Integers, stops: Integers) -> Hashes:
    """A hash of each `values[start:stop]`, such as the units from one on, which depends on nothing outside of it."""
    hashes = np.zeros(len(starts), np.uint64)
    for part in range(len(starts)):
        power = np.uint64(1)
        for place in range(starts[part], stops[part]):
            hashes[part] += values[place] * power
            power *= np.uint64(BASE)
        hashes[part] = mix(hashes[part])
    return hashes


@compiled
def hash_of_bytes(data: npt.NDArray[np.uint8], start: int, stop: int, coefficients: Hashes) -> np.uint64:
    """A hash of `data[start:stop]`."""
    total, power = np.uint64(0), np.uint64(1)
    for place in range(start, stop):
        total += coefficients[data[place]] * power
        power *= np.uint64(BASE)
    return mix(total)


@compiled
def _units(
    data: npt.NDArray[np.uint8],
    edges: Integers,
    kinds: npt.NDArray[np.uint8],
    values: Hashes,
    powers: Hashes,
) -> tuple[Hashes, Integers, Integers, npt.NDArray[np.bool_], Integers]:
    """The fields of `Units`; a unit's hash is what `hash_of_bytes` would give for its small letters."""
    hashes, is_cjk = np.empty(len(data), np.uint64), np.empty(len(data), np.bool_)
    starts, stops, offsets = np.empty(len(data), np.int64), np.empty(len(data), np.int64), np.zeros_like(edges)
    count = 0
    for text in range(len(edges) - 1):
        place, end = edges[text], edges[text + 1]
        while place < end:
            point, width = code_point(data, place)
            start, kind = place, kinds[point]
            if kind == GAP:
                place += width
                continue
            total, power = np.uint64(0), np.uint64(1)
            while place == start or (kind == WORD and place < end and kinds[point] == WORD):
                total += values[point] * power
                power *= powers[point]
                place += width
                if place < end:
                    point, width = code_point(data, place)
            hashes[count], is_cjk[count] = mix(total), kind == ALONE
            starts[count], stops[count] = start - edges[text], place - edges[text]
            count += 1
        offsets[text + 1] = count
    return hashes[:count], starts[:count], stops[:count], is_cjk[:count], offsets


@compiled
def _ngrams(hashes: Hashes, of_units: Integers, widths: Integers, offsets: Integers) -> tuple[Hashes, Integers]:
    """Hashes and first units of n-grams [offsets[-1]], each from the one before it."""
    grams, firsts = np.empty(offsets[-1], np.uint64), np.empty(offsets[-1], np.int64)
    for text in range(len(widths)):
        first, total, power = of_units[text], np.uint64(0), np.uint64(1)
        if offsets[text] < offsets[text + 1]:
            for unit in range(first, first + widths[text]):
                total += hashes[unit] * power
                power *= np.uint64(BASE)
        for gram in range(offsets[text], offsets[text + 1]):
            grams[gram], firsts[gram] = mix(total), first
            if gram + 1 < offsets[text + 1]:
                change = hashes[first + widths[text]] * power - hashes[first]
                total = total * np.uint64(INVERSE) + change * np.uint64(INVERSE)  # the chain is of one product
            first += 1
    return grams, firsts


@functools.cache
def _kinds() -> npt.NDArray[np.uint8]:
    """GAP, WORD or ALONE of every code point below 0x40000, and of those above as one."""
    categories = (unicodedata.category(chr(point))[0] for point in range(0x20000))
    kinds = np.full(0x110000, WORD, np.uint8)
    kinds[:0x20000] = [WORD if category in "LNM" else GAP for category in categories]
    kinds[ord("_")] = WORD
    for start, stop in CJK:
        kinds[start:stop] = ALONE
    return kinds


@functools.cache
def _small_letters() -> tuple[Hashes, Hashes]:
    """Of every code point in lower case: its bytes' share in `hash_of_bytes`, and the power after as many bytes.

    The lower case of a character is one character here, whatever case rules of some languages add to it.
    """
    characters = [*(chr(point).lower()[0] for point in range(0x20000)), *map(chr, range(0x20000, 0x110000))]
    data = np.frombuffer("".join(characters).encode(errors="surrogatepass"), np.uint8)
    starts = np.flatnonzero(data & 0xC0 != 0x80)
    sizes = np.diff(starts, append=len(data))
    powers = np.array([pow(BASE, place, 1 << 64) for place in range(5)], np.uint64)
    shares = byte_coefficients()[data] * powers[np.arange(len(data)) - np.repeat(starts, sizes)]
    return np.add.reduceat(shares, starts), powers[sizes]


@functools.cache
def byte_coefficients() -> Hashes:
    """For `hash_of_bytes`: a random number for each byte."""
    return mix(np.arange(1, 257, dtype=np.uint64) * np.uint64(BASE))
