"""Evaluation items in the training text: found by their n-grams, and cut out or dropped with their documents.

An n-gram of 13 words that an evaluation item has is looked for in all documents (Brown et al., 2020, appendix C; Qwen,
section 2.1), or one of 26 characters in scripts without spaces: words of Chinese have two characters on average. Words
are compared without case and punctuation. An item shorter than an n-gram is found where all of it stands in a row, if
it has at least 8 words or 16 characters; a shorter one occurs by chance and is not looked for, but counted. N-grams
that many items share are instructions around them and count for none.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import daft
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataType, col

from llm_jax.config import CorpusConfig, one_of, positive
from llm_jax.data import evaluation_sets
from llm_jax.data.loops import compiled
from llm_jax.data.ngrams import Hashes, Integers, Units, blocks, hashes_of_parts, ngrams, units
from llm_jax.data.sources import cache_folder
from llm_jax.data.stages import BECAUSE, CODE, DROPPED, ID, Result, marks
from llm_jax.errors import require

REASON = "evaluation item"
MODES = ("span", "document")
ENDS = tuple(end.encode() for end in ("\n", ". ", "! ", "? ", "。", "！", "？"))  # of sentences
SHIFT = np.uint64(32)  # of hashes, to the second group of bits that is looked up before they are searched for
MOSTLY = 0.8  # of an item's n-grams found: it was seen as good as whole
EXAMPLES = 3  # of each set
EXCERPT = 80  # characters of what an example's document has there


@dataclasses.dataclass(frozen=True)
class ContaminationConfig:
    """Which evaluation sets are looked for, by what, and what happens where an item is found."""

    enabled: bool = True
    sets: tuple[str, ...] = evaluation_sets.NAMES
    paths: tuple[str, ...] = ()  # .jsonl files with an item in each line, all strings of which count
    cache: str = ""  # folder of the downloads of evaluation sets; "" = ~/.cache/llm_jax
    mode: str = "span"  # the sentences around the n-gram are cut out; document: all goes, as code always does
    words: int = 13  # of an n-gram
    characters: int = 26  # of one in scripts without spaces
    shortest: int = 8  # words of an item that is looked for; twice as many characters
    common: int = 10  # an n-gram of more items counts for none
    rest: float = 0.5  # a document that would keep less of its text is dropped

    def __post_init__(self) -> None:
        one_of("ContaminationConfig.mode", self.mode, MODES)
        for name in self.sets:
            one_of("ContaminationConfig.sets", name, evaluation_sets.NAMES)
        positive(self, "words", "characters", "shortest", "common")
        require(0 <= self.rest <= 1, f"ContaminationConfig.rest={self.rest} must be in [0, 1]")
        require(
            self.shortest <= self.words and 2 * self.shortest <= self.characters,
            f"ContaminationConfig.shortest={self.shortest} must not be above words={self.words}, nor above half of "
            f"characters={self.characters}",
        )


class Table(NamedTuple):
    """Rows of units that are looked for, in the order of `anchors`; several may begin with the same units."""

    width: int  # units of an anchor
    anchors: Hashes  # [rows + 1] of the first `width` units; 0 at the end
    lengths: Integers  # [rows] all units
    whole: Hashes  # [rows] their hash
    numbers: Integers  # [rows] what they are called in reports
    bits: npt.NDArray[np.uint8]  # [2, 2^k] 8 in each: whether an anchor is there (see `_set_bits`)


class Index(NamedTuple):
    """What is looked for, and whose it is."""

    tables: tuple[Table, ...]
    offsets: Integers  # [numbers + 1]; the items of number i are `items[offsets[i]:offsets[i + 1]]`
    items: Integers
    sets: dict[str, range]  # the items of each set


class Matches(NamedTuple):
    """Where something was found in some texts."""

    text: Integers
    start: Integers  # in bytes of the text
    stop: Integers
    number: Integers


@dataclasses.dataclass(frozen=True)
class Contamination:
    """Takes evaluation items out of `text`, or their documents out of the corpus."""

    config: ContaminationConfig = ContaminationConfig()
    name: str = "contamination"

    def files(self) -> list[Path]:
        """The evaluation sets of the user's own."""
        return evaluation_sets.own_files(self.config.paths)

    def prepare(self) -> "Search":
        """Read the evaluation sets."""
        cache = cache_folder(CorpusConfig(cache=self.config.cache))
        sets = evaluation_sets.read(self.config.sets, self.config.paths, cache)
        return Search(self.config, build(sets, self.config), self.name)

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """As `Search.apply`."""
        return self.prepare().apply(documents, scratch)


@dataclasses.dataclass(frozen=True)
class Search:
    """`Contamination` with the evaluation sets read."""

    config: ContaminationConfig
    index: Index
    name: str

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """The facts hold for each set how many items were looked for, touched and mostly there, with examples."""
        fields = {
            marks.REPLACED: DataType.string(), DROPPED: DataType.string(), BECAUSE: DataType.string(),
            "numbers": DataType.list(DataType.int64()), "cut": DataType.int64(),
        }  # fmt: skip
        found = marks.mark(documents, functools.partial(judge, self.index, self.config), fields, scratch, "source")
        touched = found.where(col("numbers").not_null()).sort(ID).to_arrow()
        return Result(marks.join(documents, found, marks.REPLACED, DROPPED, BECAUSE), _facts(self.index, touched))


class _Rows(NamedTuple):
    """Rows of units of some items; those of the items' n-grams are their own anchors, one array."""

    anchors: Hashes
    lengths: Integers
    whole: Hashes
    items: Integers


def build(sets: Mapping[str, Sequence[str]], config: ContaminationConfig) -> Index:
    """The index of the items of some sets."""
    texts = pa.array([text for items in sets.values() for text in items], pa.large_string())
    widths = (config.words, config.characters, config.shortest, 2 * config.shortest)
    hashes, numbers = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    rows = {width: [_Rows(hashes, numbers, hashes, numbers)] for width in widths}
    done = 0
    for block in blocks(texts):
        for width, part in _rows(units(block), config):
            rows[width].append(part._replace(items=part.items + done))
        done += len(block)
    bounds = np.cumsum([0, *(len(items) for items in sets.values())])
    ranges = {name: range(bounds[i], bounds[i + 1]) for i, name in enumerate(sets)}
    return _index({width: _joined(parts) for width, parts in rows.items()}, ranges, config.common)


def _rows(found: Units, config: ContaminationConfig) -> Iterator[tuple[int, _Rows]]:
    """For each width of anchors all that is looked for."""
    counts = np.diff(found.offsets)
    cjk = np.concatenate([[0], np.cumsum(found.is_cjk)])
    mostly_cjk = 2 * (cjk[found.offsets[1:]] - cjk[found.offsets[:-1]]) >= np.maximum(counts, 1)
    for is_cjk, width, shortest in (
        (False, config.words, config.shortest), (True, config.characters, 2 * config.shortest),
    ):  # fmt: skip
        grams = ngrams(found, width)
        fits = (2 * (cjk[grams.first + width] - cjk[grams.first]) >= width) == is_cjk
        item = np.repeat(np.arange(len(counts)), np.diff(grams.offsets))[fits]
        hashes = grams.hashes[fits]
        yield width, _Rows(hashes, np.full(len(item), width), hashes, item)
        short = np.flatnonzero((mostly_cjk == is_cjk) & (counts < width) & (counts >= shortest))
        first, last = found.offsets[:-1][short], found.offsets[1:][short]
        anchors, whole = (hashes_of_parts(found.hashes, first, stop) for stop in (first + shortest, last))
        yield shortest, _Rows(anchors, counts[short], whole, short)


def _joined(parts: Sequence[_Rows]) -> _Rows:
    anchors, lengths, wholes, items = zip(*parts)
    whole = np.concatenate(wholes)
    own = all(anchor is its for anchor, its in zip(anchors, wholes))
    return _Rows(whole if own else np.concatenate(anchors), np.concatenate(lengths), whole, np.concatenate(items))


def _index(rows: dict[int, _Rows], sets: dict[str, range], common: int) -> Index:
    """Rows of different widths are never the same: they have other lengths, or more or fewer ideographs."""
    tables, items, owners = [], [], []
    done = 0
    for width, these in rows.items():
        order = np.argsort(these.whole, kind="stable")  # equal ones stay in the order of their items
        firsts, counts, its_items = _owned(these.whole[order], these.items[order], common)
        chosen = order[firsts]
        numbers = np.arange(done, done + len(chosen))
        tables.append(_table(width, these.anchors[chosen], these.lengths[chosen], these.whole[chosen], numbers))
        owners.append(counts)
        items.append(its_items)
        done += len(chosen)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(owners))])
    return Index(tuple(tables), offsets, np.concatenate(items), sets)


@compiled
def _owned(whole: Hashes, items: Integers, common: int) -> tuple[Integers, Integers, Integers]:
    """Of sorted rows: the first of each that at most `common` items have, how many have it, and which."""
    firsts, owners, found = np.empty(len(whole), np.int64), np.empty(len(whole), np.int64), np.empty_like(items)
    count, size, row = 0, 0, 0
    while row < len(whole):
        first, start = row, size
        while row < len(whole) and whole[row] == whole[first]:
            if size == start or items[row] != found[size - 1]:
                found[size] = items[row]
                size += 1
            row += 1
        if size - start <= common:
            firsts[count], owners[count] = first, size - start
            count += 1
        else:
            size = start
    return firsts[:count], owners[:count], found[:size]


def _table(width: int, anchors: Hashes, lengths: Integers, whole: Hashes, numbers: Integers) -> Table:
    """From the rows of a table [rows]."""
    order = np.argsort(anchors, kind="stable")
    anchors = np.append(anchors[order], np.uint64(0))
    bits = np.zeros((2, 1 << max(len(numbers).bit_length(), 13)), np.uint8)
    _set_bits(bits, anchors[:-1])
    return Table(width, anchors, lengths[order], whole[order], numbers[order], bits)


@compiled
def _set_bits(bits: npt.NDArray[np.uint8], anchors: Hashes) -> None:
    """In both rows, each addressed by another half of an anchor."""
    last = np.uint64(8 * bits.shape[1] - 1)
    for anchor in anchors:
        for row, value in enumerate((anchor & last, anchor >> SHIFT & last)):
            bits[row, value >> np.uint64(3)] |= np.uint8(1) << np.uint8(value & np.uint64(7))


@compiled
def _with_bits(bits: npt.NDArray[np.uint8], hashes: Hashes) -> Integers:
    """Which hashes may be anchors: all that are, and few others."""
    last = np.uint64(8 * bits.shape[1] - 1)
    chosen, count = np.empty(len(hashes), np.int64), 0
    for place in range(len(hashes)):
        low, high = hashes[place] & last, hashes[place] >> SHIFT & last
        if bits[0, low >> np.uint64(3)] >> (low & np.uint64(7)) & 1:
            chosen[count] = place
            count += bits[1, high >> np.uint64(3)] >> (high & np.uint64(7)) & 1
    return chosen[:count]


def find(index: Index, found: Units) -> Matches:
    """All that is looked for in some texts, in the order of the texts."""
    parts = [_find(table, found) for table in index.tables]
    first, length, number = (np.concatenate(column) for column in zip(*parts))
    order = np.argsort(first, kind="stable")
    first, last, number = first[order], (first + length - 1)[order], number[order]
    text = np.searchsorted(found.offsets, first, side="right") - 1
    return Matches(text, found.starts[first], found.stops[last], number)


def _find(table: Table, found: Units) -> tuple[Integers, Integers, Integers]:
    """The first unit, the units and the number of what is found of a table."""
    nothing = (np.zeros(0, np.int64),) * 3
    if not len(table.numbers):
        return nothing
    grams = ngrams(found, table.width)
    near = _with_bits(table.bits, grams.hashes)
    anchors = table.anchors[:-1]
    low = np.searchsorted(anchors, grams.hashes[near])
    met = table.anchors[low] == grams.hashes[near]
    near, low = near[met], low[met]
    if not len(near):
        return nothing
    times = np.searchsorted(anchors, grams.hashes[near], side="right") - low
    row = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times - low, times)
    first = np.repeat(grams.first[near], times)
    ends = found.offsets[np.searchsorted(found.offsets, first, side="right")]
    inside = first + table.lengths[row] <= ends
    first, row = first[inside], row[inside]
    same = hashes_of_parts(found.hashes, first, first + table.lengths[row]) == table.whole[row]
    return first[same], table.lengths[row[same]], table.numbers[row[same]]


def judge(index: Index, config: ContaminationConfig, batch: pa.RecordBatch) -> dict[str, pa.Array]:
    """What becomes of a few documents."""
    texts = batch["text"]
    matches = find(index, units(texts))
    columns: dict[str, list[Any]] = {
        name: [None] * len(texts) for name in (marks.REPLACED, DROPPED, BECAUSE, "numbers", "cut")
    }
    for row in np.unique(matches.text).tolist():  # few documents have any
        here = matches.text == row
        content = texts[row].as_py().encode()
        spans = sorted(zip(matches.start[here].tolist(), matches.stop[here].tolist()))
        numbers = matches.number[here]
        columns["numbers"][row] = np.unique(numbers).tolist()
        columns[BECAUSE][row] = f"{_name(index, int(numbers[0]))}: {_excerpt(content, spans[0])}"
        rest = _without_sentences(content, spans)
        columns["cut"][row] = len(content) - len(rest)
        whole = config.mode == "document" or batch["format"][row].as_py() == CODE
        if whole or len(rest.strip()) < config.rest * len(content) or not rest.strip():
            columns[DROPPED][row] = REASON
        else:
            columns[marks.REPLACED][row] = rest.decode()
    kinds = {"numbers": pa.list_(pa.int64()), "cut": pa.int64()}
    return {name: pa.array(column, kinds.get(name, pa.string())) for name, column in columns.items()}


def _without_sentences(content: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    """A text without the sentences, or lines without any, that hold a part of the spans, which come in order."""
    parts, done = [], 0
    for start, stop in spans:
        before = [place + len(end) for end in ENDS if (place := content.rfind(end, 0, start)) >= 0]
        parts.append(content[done : max([*before, done])])
        after = [place + len(end) for end in ENDS if (place := content.find(end, stop)) >= 0]
        done = max(done, min(after, default=len(content)))
    return b"".join([*parts, content[done:]])


def _excerpt(content: bytes, span: tuple[int, int]) -> str:
    return content[span[0] : span[1]].decode()[:EXCERPT].replace("\n", " ")


def _name(index: Index, number: int) -> str:
    """The set and the place in it, from 0, of the first item that has something."""
    item = int(index.items[index.offsets[number]])
    name = next(name for name, items in index.sets.items() if item in items)
    return f"{name} {item - index.sets[name].start}"


def _facts(index: Index, touched: pa.Table) -> dict[str, Any]:
    """What was found of each set in the documents with matches: columns of `apply`, sorted by id."""
    lists = touched["numbers"].combine_chunks()
    numbers = np.unique(np.asarray(pc.list_flatten(lists)))
    wanted = np.bincount(index.items)
    seen = np.zeros(len(wanted), np.int64)
    for number in numbers:
        seen[index.items[index.offsets[number] : index.offsets[number + 1]]] += 1
    because, ids = touched[BECAUSE].to_pylist(), touched[ID].to_pylist()
    facts = {}
    for name, items in index.sets.items():
        part = slice(items.start, items.stop)
        had, has = wanted[part], seen[part]
        facts[name] = {
            "items": len(items),
            "looked_for": int((had > 0).sum()),
            "touched": int((has > 0).sum()),
            "mostly_found": int((has > MOSTLY * had).sum()),
            "examples": [f"{i}: {why}" for i, why in zip(ids, because) if why.startswith(name + " ")][:EXAMPLES],
        }
    sources = Counter(touched["source"].to_pylist())
    cut = pc.sum(touched["cut"]).as_py() or 0
    return {"sets": facts, "documents_by_source": dict(sorted(sources.items())), "bytes_in_sentences": cut}
