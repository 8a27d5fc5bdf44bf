"""Sums over a text's byte n-grams, many texts at once: a language model's bits and two linear models' weights.

All texts of a batch lie in one buffer, `PAD` bytes before each, so that no n-gram reaches into another text. One XLA
program, always on a CPU, hashes the n-grams that end at every byte and looks them up in tables; the sums of parts of
texts are NumPy's. Case is ignored for ASCII letters.

The language model is an interpolated one (Witten and Bell, 1991): p_n(byte | context) = share_n + back_off_n *
p_{n-1}(byte | shorter context). An entry of its table has 32 bits: 12 of the n-gram's hash, to know it from another,
10 for the n-gram's share, and 10 for its back-off as the context of the next byte.

Legend: B bytes of a block, R rows of a table, O orders of the language model.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm_jax.data import ngrams

WIDTH = 6  # bytes of the longest n-gram
ORDER = 5  # of the language model
LINEAR_ORDERS = (4, 6)  # of the n-grams of the linear models: two Chinese characters are 6 bytes
PAD = b"\n" * (WIDTH - 1)
ROW_BITS = 20
ROWS = 1 << ROW_BITS
BLOCK, LEAST_BLOCK = 1 << 18, 1 << 14  # bytes that one call of a program works on: of long buffers, and of short ones
CODE_BITS = 10  # of a share or back-off: 5 of a float's exponent and 5 of its mantissa
LEAST = float(2.0 ** -(2 ** (CODE_BITS - 5) - 1))
# Random odd numbers, one a byte of an n-gram.
FACTORS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)
LINE_END, MARK, WIDE = 1, 2, 3  # WIDE: perhaps the first byte of a Chinese mark
ENDS = np.zeros(256, np.uint8)
ENDS[ord("\n")] = LINE_END
ENDS[[ord("."), ord("!"), ord("?")]] = MARK
ENDS[[0xE3, 0xEF]] = WIDE
FOLD = np.frombuffer(bytes(range(256)).lower(), np.uint8)

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint32]


class Tables(NamedTuple):
    """What n-grams are worth."""

    language_OR: Any  # uint32 entries of the language model
    empty: Any  # the back-off of the empty context, to which all bytes are alike
    linear_R: Any  # uint32, the weights of two linear models as bfloat16 numbers


class Buffer(NamedTuple):
    """N texts, with their pads and one pad after the last."""

    data: Bytes
    starts: Integers  # [N] of each text in `data`
    stops: Integers  # [N]


class Sentences(NamedTuple):
    """Parts of the texts of a buffer, in order."""

    starts: Integers  # [sentences] in the buffer
    stops: Integers
    texts: Integers  # the text of each


def buffer(texts: pa.Array) -> Buffer:
    """Put texts (nulls are empty) into one padded buffer."""
    pad, nothing = pa.scalar(PAD.decode(), pa.large_string()), pa.scalar("", pa.large_string())
    padded = pc.binary_join_element_wise(pad, texts.cast(pa.large_string()).fill_null(""), nothing)
    data, edges = ngrams.utf8_buffer(padded)
    return Buffer(np.concatenate([data, np.frombuffer(PAD, np.uint8)]), edges[:-1] + len(PAD), edges[1:])


def mixed(hashes: Any) -> Any:
    """Spread the bits of 32-bit hashes: the upper `ROW_BITS` are a row, the rest tells n-grams of one row apart."""
    hashes = (hashes ^ (hashes >> 15)) * np.uint32(0x2C1B3C6D)
    hashes = (hashes ^ (hashes >> 12)) * np.uint32(0x297A2D39)
    return hashes ^ (hashes >> 15)


def rows(hashes: Any) -> Any:
    """The table's row of mixed hashes, int32."""
    return (hashes >> (32 - ROW_BITS)).astype(np.int32)


def sums(data_B: jax.Array) -> list[jax.Array]:
    """Unmixed hashes uint32 [B - WIDTH + 1] of the n-grams of 1 to `WIDTH` bytes that end at each byte."""
    data_B = data_B.astype(jnp.uint32) + 1
    count = len(data_B) - WIDTH + 1
    found = []
    total = jnp.zeros(count, jnp.uint32)
    for back, factor in enumerate(FACTORS):
        start = WIDTH - 1 - back
        total = total + data_B[start : start + count] * jnp.uint32(factor)
        found.append(total)
    return found


# Programs of their own: looked up in the one that makes the hashes or in the one that uses what is found, an n-gram
# takes XLA's CPU compiler three times as long.
@jax.jit
def language_hashes(data_B: jax.Array) -> list[jax.Array]:
    """Mixed hashes of the language model's n-grams, of 1 to `ORDER` bytes, that end at each byte."""
    return [mixed(total) for total in sums(data_B)[:ORDER]]


@jax.jit
def linear_hashes(data_B: jax.Array, groups_B: jax.Array) -> list[jax.Array]:
    """Mixed hashes of the linear models' n-grams, which are others in each group of languages (uint32)."""
    found = sums(data_B)
    return [mixed(found[order - 1] ^ groups_B[WIDTH - 1 :]) for order in LINEAR_ORDERS]


@jax.jit
def look_up(hashes: list[jax.Array], tables_R: list[jax.Array]) -> list[jax.Array]:
    """The rows of each table that mixed hashes name."""
    return [table_R.at[rows(mix)].get(mode="promise_in_bounds") for mix, table_R in zip(hashes, tables_R, strict=True)]


def _decode(codes: jax.Array) -> jax.Array:
    exponent = np.float32(LEAST).view(np.uint32)
    return jax.lax.bitcast_convert_type((codes << 18) + exponent, jnp.float32)


def encode(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint32]:
    """Numbers in [0, 1] in `CODE_BITS` bits, to 1 in 64; what is below `LEAST` becomes that."""
    bits = np.maximum(values, LEAST).astype(np.float32).view(np.uint32) - np.float32(LEAST).view(np.uint32)
    return (bits + np.uint32(1 << 17)) >> np.uint32(18)


@jax.jit
def _bits(hashes: list[jax.Array], entries: list[jax.Array], empty: jax.Array) -> jax.Array:
    """-log2 of the probability of each byte but the first."""
    probability: jax.Array = jnp.float32(1 / 256)
    back_off: jax.Array = empty
    for mix, entry in zip(hashes, entries, strict=True):
        known = (entry ^ mix) & ((1 << (32 - ROW_BITS)) - 1) == 0
        share = jnp.where(known, _decode(entry >> 22), 0.0)
        probability = share[1:] + back_off * probability
        back_off = jnp.where(known, _decode((entry >> 12) & ((1 << CODE_BITS) - 1)), 1.0)[:-1]
    return -jnp.log2(jnp.minimum(probability, 1.0))  # rounded shares may have a sum above 1


@jax.jit
def _add(pairs: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Both linear models' weights of each byte but the first."""
    upper = [jax.lax.bitcast_convert_type(pair[1:] & np.uint32(0xFFFF0000), jnp.float32) for pair in pairs]
    lower = [jax.lax.bitcast_convert_type(pair[1:] << 16, jnp.float32) for pair in pairs]
    return jnp.asarray(sum(upper)), jnp.asarray(sum(lower))


def pack(upper_R: Floats, lower_R: Floats) -> npt.NDArray[np.uint32]:
    """Two tables of weights as the halves of one, rounded to bfloat16."""
    upper, lower = ((weights + np.float32(0)).view(np.uint32) + np.uint32(0x8000) for weights in (upper_R, lower_R))
    return (upper & np.uint32(0xFFFF0000)) | (lower >> np.uint32(16))


def on_cpu() -> jax.Device:
    """Where the program runs whatever accelerators there are: its tables stay in the caches of a processor."""
    return jax.local_devices(backend="cpu")[0]


def place(tables: Tables) -> Tables:
    """The tables on the CPU device; the language model's as one array an order."""
    return jax.device_put(tables._replace(language_OR=list(tables.language_OR)), on_cpu())


def bits(found: Buffer, tables: Tables) -> Floats:
    """The bits that the language model of placed tables needs for each byte of a buffer; those of pads mean nothing."""
    values = np.empty(len(found.data), np.float32)
    for start, stop, data_B in blocks(FOLD[found.data]):
        hashes = language_hashes(data_B)
        entries = look_up(hashes, tables.language_OR)
        values[start:stop] = np.asarray(_bits(hashes, entries, tables.empty))[: stop - start]
    return values


def weights(found: Buffer, groups_N: npt.NDArray[np.uint32], tables: Tables) -> tuple[Floats, Floats]:
    """Both linear models' weights of the n-grams that end at each byte of a buffer.

    `groups_N` are those of the texts' languages.
    """
    values = np.empty((2, len(found.data)), np.float32)
    sizes = np.diff(found.starts - len(PAD), append=len(found.data))
    groups = np.repeat(groups_N, sizes)
    for (start, stop, data_B), (_, _, groups_B) in zip(blocks(FOLD[found.data]), blocks(groups), strict=True):
        pairs = look_up(linear_hashes(data_B, groups_B), [tables.linear_R] * len(LINEAR_ORDERS))
        for row, part in zip(values, _add(pairs), strict=True):
            row[start:stop] = np.asarray(part)[: stop - start]
    return values[0], values[1]


def blocks(array: npt.NDArray) -> Iterator[tuple[int, int, jax.Array]]:
    """(start, stop, `array[start:stop]` after the `WIDTH` values before it, filled up to the programs' size).

    Pads make a buffer a little longer than whole blocks: what is left over is a small block.
    """
    stop = 0
    while stop < len(array):
        start = stop
        size = BLOCK if len(array) - start > LEAST_BLOCK else LEAST_BLOCK
        stop = min(start + size, len(array))
        before = min(start, WIDTH)
        block = np.full(size + WIDTH, 10, array.dtype)
        block[WIDTH - before : WIDTH + stop - start] = array[start - before : stop]
        yield start, stop, jax.device_put(block, on_cpu())


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


def lower(found: Buffer, parts: Sentences) -> pa.Array:
    """The parts as strings in lower case (ASCII), each with what follows it up to the next one; no copy of the text."""
    offsets = np.append(parts.starts, len(found.data))
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(FOLD[found.data])]
    return pa.Array.from_buffers(pa.large_string(), len(parts.starts), buffers)


def part_sums(values: Floats, parts: Sentences) -> Floats:
    """The sum of the values of the bytes of each part of a buffer, float32 [sentences]."""
    if not len(parts.starts):
        return np.zeros(0, np.float32)
    # A part's last byte is never the buffer's, which ends with a pad.
    edges = np.stack([parts.starts, parts.stops], axis=1).ravel()
    return np.add.reduceat(values, edges)[::2]


def without(found: Buffer, parts: Sentences, cut_S: npt.NDArray[np.bool_]) -> pa.Array:
    """The texts without the parts that are to be cut."""
    sizes = np.bincount(parts.texts, (parts.stops - parts.starts) * ~cut_S, len(found.starts))
    inside = np.zeros(len(found.data) + 1, np.int8)
    np.add.at(inside, parts.starts[~cut_S], 1)
    np.subtract.at(inside, parts.stops[~cut_S], 1)
    data = found.data[np.cumsum(inside[:-1], dtype=np.int8) > 0]
    offsets = np.concatenate([[0], np.cumsum(sizes.astype(np.int64))])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_string(), len(sizes), buffers)


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
