"""Sums over a text's byte n-grams, many texts at once: a language model's bits and two linear models' weights.

All texts of a batch lie in one buffer, `PAD` bytes before each, so that no n-gram reaches into another text. Compiled
loops hash the n-grams that end at each byte, look them up in tables, and add up what is found over parts of texts. Case
is ignored for ASCII letters.

The language model is an interpolated one (Witten and Bell, 1991): p_n(byte | context) = share_n + back_off_n *
p_{n-1}(byte | shorter context). An entry of its table has 32 bits: 12 of the n-gram's hash, to know it from another,
10 for the n-gram's share, and 10 for its back-off as the context of the next byte.

Legend: R rows of a table, O orders of the language model, S sentences or other parts of texts.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm_jax.data import ngrams
from llm_jax.data.loops import compiled

WIDTH = 6  # bytes of the longest n-gram
ORDER = 5  # of the language model
LINEAR_ORDERS = (4, 6)  # of the n-grams of the linear models: two Chinese characters are 6 bytes
PAD = b"\n" * (WIDTH - 1)
ROW_BITS = 20
ROWS = 1 << ROW_BITS
TAG_BITS = 32 - ROW_BITS  # of a hash, which tell n-grams of one row apart
TAG = np.uint32((1 << TAG_BITS) - 1)
CHUNK = 4096  # bytes worked on at once
CODE_BITS = 10  # of a share or back-off: 5 of a float's exponent and 5 of its mantissa
LEAST = float(2.0 ** -(2 ** (CODE_BITS - 5) - 1))
TINY = 2.0**-800  # a product of probabilities has its logarithm taken before it leaves what a float64 can hold
# Random odd numbers, one a byte of an n-gram.
FACTORS = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D], np.uint32)
LINE_END, MARK, WIDE = 1, 2, 3  # WIDE: perhaps the first byte of a Chinese mark
ENDS = np.zeros(256, np.uint8)
ENDS[ord("\n")] = LINE_END
ENDS[[ord("."), ord("!"), ord("?")]] = MARK
ENDS[[0xE3, 0xEF]] = WIDE
CODE = np.uint32((1 << CODE_BITS) - 1)
CODE_PLACE = np.uint32(18)  # of a code's lowest bit in the float32 that it stands for, which has LEAST added to it
LEAST_BITS, ONE_BITS = np.array([LEAST, 1], np.float32).view(np.uint32)

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint32]


class Tables(NamedTuple):
    """What n-grams are worth."""

    language_OR: npt.NDArray[np.uint32]  # entries of the language model
    empty: float  # the back-off of the empty context, to which all bytes are alike
    linear_R2: Floats  # the weights of two linear models


class Buffer(NamedTuple):
    """N texts, with their pads and one pad after the last."""

    data: Bytes
    folded: Bytes  # the same with small letters for capitals (ASCII)
    starts: Integers  # [N] of each text in `data`
    stops: Integers  # [N]


class Sentences(NamedTuple):
    """Parts of the texts of a buffer, in order."""

    starts: Integers  # [sentences] in the buffer
    stops: Integers
    texts: Integers  # the text of each


def buffer(texts: pa.Array) -> Buffer:
    """Put texts (nulls are empty) into one padded buffer."""
    data, edges = ngrams.utf8_buffer(texts)
    pads = len(PAD) * np.arange(1, len(edges))
    padded, folded = _padded(data, edges)
    return Buffer(padded, folded, edges[:-1] + pads, edges[1:] + pads)


@compiled
def _padded(data: Bytes, edges: Integers) -> tuple[Bytes, Bytes]:
    """Texts with their pads, and the same with small letters."""
    padded = np.full(len(data) + len(PAD) * len(edges), PAD[0], np.uint8)
    for text in range(len(edges) - 1):
        start = edges[text] + len(PAD) * (text + 1)
        padded[start : start + edges[text + 1] - edges[text]] = data[edges[text] : edges[text + 1]]
    return padded, ngrams.ascii_lower(padded)


def whole(found: Buffer) -> Sentences:
    """Each text as one part."""
    return Sentences(found.starts, found.stops, np.arange(len(found.starts)))


@compiled
def mixed(total: np.uint32) -> np.uint32:
    """Spread the bits of a 32-bit hash: the upper `ROW_BITS` are a row, the rest tells n-grams of one row apart."""
    total = np.uint32((total ^ (total >> 15)) * 0x2C1B3C6D)
    total = np.uint32((total ^ (total >> 12)) * 0x297A2D39)
    return np.uint32(total ^ (total >> 15))


@compiled
def lengthen(folded: Bytes, start: int, first: int, last: int, group: int, totals_C: Hashes, mixes_C: Hashes) -> None:
    """Make n-grams that end at C bytes from `start` on longer by the bytes `first` to `last - 1` before those.

    `totals_C` are their sums so far, uint32, and `mixes_C` become their mixed hashes, others in each `group`.
    """
    for back in range(first, last):
        bytes_C = folded[start - back : start - back + len(totals_C)]
        for i in range(len(totals_C)):
            totals_C[i] = np.uint32(totals_C[i] + (np.uint32(bytes_C[i]) + np.uint32(1)) * FACTORS[back])
    for i in range(len(totals_C)):
        mixes_C[i] = mixed(totals_C[i] ^ group)


@compiled
def longest(folded: Bytes, start: int, stop: int) -> Hashes:
    """The mixed hashes of the longest n-grams that end at the bytes from `start` to `stop`."""
    totals_C, mixes_C = np.zeros(stop - start, np.uint32), np.empty(stop - start, np.uint32)
    lengthen(folded, start, 0, WIDTH, 0, totals_C, mixes_C)
    return mixes_C


@compiled
def hashes_of_keys(keys: npt.NDArray[np.uint64], order: int) -> Hashes:
    """The mixed hash, uint32, of each n-gram of `order` bytes given as a uint64 number, the last byte lowest."""
    found = np.empty(len(keys), np.uint32)
    for i in range(len(keys)):
        total = np.uint32(0)
        for back in range(order):
            byte = np.uint32(keys[i] >> np.uint64(8 * back)) & np.uint32(255)
            total = np.uint32(total + (byte + np.uint32(1)) * FACTORS[back])
        found[i] = mixed(total)
    return found


def encode(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint32]:
    """Numbers in [0, 1] in `CODE_BITS` bits, to 1 in 64; what is below `LEAST` becomes that."""
    bits = np.maximum(values, LEAST).astype(np.float32).view(np.uint32) - LEAST_BITS
    return (bits + np.uint32(1 << 17)) >> CODE_PLACE


def bits(found: Buffer, parts: Sentences, tables: Tables) -> Floats:
    """The bits that the language model needs for each part of a buffer, float32 [S]."""
    probabilities = _probabilities(found.folded, tables.language_OR, np.float32(tables.empty))
    return _bits_of_parts(probabilities, parts.starts, parts.stops)


@compiled
def _probabilities(folded: Bytes, language_OR: Hashes, empty: float) -> Floats:
    """Of each byte of a buffer after those before it, float32; those of pads mean nothing.

    It goes by chunks and, in them, by orders and steps, so that the processor hashes many n-grams at once, waits for
    many rows of a table together, and makes floats of many codes at once.
    """
    probabilities = np.ones(len(folded), np.float32)
    mixes_C, entries_C = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32)
    share_bits_C, longer_bits_C = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32)
    shares_C, longer_C = share_bits_C.view(np.float32), longer_bits_C.view(np.float32)
    # Of the n-grams one byte shorter that end before each byte; the last is the next chunk's first.
    back_offs_OC = np.ones((ORDER + 1, CHUNK + 1), np.float32)
    back_offs_OC[0] = empty
    for start in range(ORDER - 1, len(folded), CHUNK):
        count = min(CHUNK, len(folded) - start)
        totals_C = np.zeros(count, np.uint32)
        of_chunk_C = probabilities[start : start + count]
        of_chunk_C[:] = 1 / 256
        for i in range(ORDER):
            lengthen(folded, start, i, i + 1, 0, totals_C, mixes_C)
            for at in range(count):
                entries_C[at] = language_OR[i, mixes_C[at] >> np.uint32(TAG_BITS)]
            before_C, after_C = back_offs_OC[i], back_offs_OC[i + 1]
            after_C[0] = after_C[CHUNK]
            for at in range(count):
                entry = entries_C[at]
                known = ((entry ^ mixes_C[at]) & TAG) == 0
                share, longer = entry >> np.uint32(32 - CODE_BITS), (entry >> np.uint32(TAG_BITS)) & CODE
                share_bits_C[at] = (share << CODE_PLACE) + LEAST_BITS if known else np.uint32(0)
                longer_bits_C[at] = (longer << CODE_PLACE) + LEAST_BITS if known else ONE_BITS
            for at in range(count):
                of_chunk_C[at] = of_chunk_C[at] * before_C[at] + shares_C[at]
                after_C[at + 1] = longer_C[at]
    return probabilities


@compiled
def _bits_of_parts(probabilities: Floats, starts: Integers, stops: Integers) -> Floats:
    found_S = np.zeros(len(starts), np.float32)
    for part in range(len(starts)):
        total, product = 0.0, 1.0
        for at in range(starts[part], stops[part]):
            product *= min(probabilities[at], np.float32(1))  # rounded shares may have a sum above 1
            if product < TINY:
                total -= np.log2(product)
                product = 1.0
        found_S[part] = total - np.log2(product)
    return found_S


@compiled
def linear_rows(folded: Bytes, starts: Integers, stops: Integers, groups_N: Hashes) -> Hashes:
    """The rows of the linear models' n-grams that end in each text, uint32: all of one length, then of the next."""
    rows_M = np.empty(len(LINEAR_ORDERS) * np.sum(stops - starts), np.uint32)
    done = 0
    for text in range(len(starts)):
        totals_C = np.zeros(stops[text] - starts[text], np.uint32)
        for first, last in ((0, LINEAR_ORDERS[0]), LINEAR_ORDERS):
            lengthen(folded, starts[text], first, last, groups_N[text], totals_C, rows_M[done : done + len(totals_C)])
            done += len(totals_C)
    return rows_M >> np.uint32(TAG_BITS)


def weights(found: Buffer, parts: Sentences, groups_N: Hashes, linear_R2: Floats) -> Floats:
    """The sums of both linear models' weights of the n-grams that end in each part of a buffer, float32 [2, S].

    `groups_N` are those of the texts' languages.
    """
    return _weights(found.folded, parts.starts, parts.stops, groups_N[parts.texts], linear_R2)


@compiled
def _weights(folded: Bytes, starts: Integers, stops: Integers, groups_S: Hashes, linear_R2: Floats) -> Floats:
    sums_2S = np.zeros((2, len(starts)), np.float32)
    mixes_C, all_totals_C = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32)
    for part in range(len(starts)):
        upper, lower = 0.0, 0.0
        for start in range(starts[part], stops[part], CHUNK):
            totals_C = all_totals_C[: stops[part] - start]
            totals_C[:] = 0
            for first, last in ((0, LINEAR_ORDERS[0]), LINEAR_ORDERS):
                lengthen(folded, start, first, last, groups_S[part], totals_C, mixes_C)
                for at in range(len(totals_C)):
                    row = mixes_C[at] >> np.uint32(TAG_BITS)
                    upper += linear_R2[row, 0]
                    lower += linear_R2[row, 1]
        sums_2S[0, part], sums_2S[1, part] = upper, lower
    return sums_2S


def sentences(found: Buffer) -> Sentences:
    """The sentences and lines of the texts of a buffer.

    A sentence ends with a full stop, question or exclamation mark of Chinese, or of others before a space, or with a
    line; line ends and one space after it are its own, so that a text's sentences joined are the text.
    """
    data = found.data
    is_start = np.zeros(len(data) + 1, np.bool_)
    is_start[1:] = _ends(data)
    is_start[:-1] &= data != ord("\n")
    is_start[found.starts] = True
    is_start[found.stops] = True  # of what follows a text, which is no sentence
    edges = np.flatnonzero(is_start)
    first = np.searchsorted(edges, found.starts)
    counts = np.searchsorted(edges, found.stops) - first
    inside = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
    return Sentences(edges[inside], edges[inside + 1], np.repeat(np.arange(len(counts)), counts))


def without(found: Buffer, parts: Sentences, cut_S: npt.NDArray[np.bool_]) -> pa.Array:
    """The texts without the parts that are to be cut."""
    sizes = np.bincount(parts.texts, (parts.stops - parts.starts) * ~cut_S, len(found.starts))
    inside = np.zeros(len(found.data) + 1, np.int8)
    np.add.at(inside, parts.starts[~cut_S], 1)
    np.subtract.at(inside, parts.stops[~cut_S], 1)
    data = found.data[np.cumsum(inside[:-1], dtype=np.int8) > 0]
    offsets = np.concatenate([[0], np.cumsum(sizes.astype(np.int64))])
    return ngrams.strings(data, offsets)


def _ends(data: Bytes) -> npt.NDArray[np.bool_]:
    """Whether a sentence may begin after each byte."""
    kinds = ENDS[data]
    ends = kinds == LINE_END
    ends[1:] |= (kinds[:-1] == MARK) & (data[1:] == ord(" "))
    heads = np.flatnonzero(kinds[:-2] == WIDE)
    following = data[heads + 1].astype(np.uint16) << 8 | data[heads + 2]
    full_stop = (data[heads] == 0xE3) & (following == 0x8082)  # 。
    wide_mark = (data[heads] == 0xEF) & ((following == 0xBC81) | (following == 0xBC9F))  # ！ ？
    ends[heads[full_stop | wide_mark] + 2] = True
    return ends
