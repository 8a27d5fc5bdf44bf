"""Sentences, lines and paragraphs that many documents have: boilerplate, which goes from all of them.

A text is cut where a sentence surely ends, between short lines, and at blank lines. The parts between two cuts are its
sentences, those between two line ends its lines, those between two blank lines its paragraphs; so a menu of short lines
is seen as a paragraph, and hard-wrapped prose is never cut inside a sentence. Parts are compared by their units (words,
and characters of scripts without spaces). A sentence beside others in its line may be a set phrase, such as laws have,
so more documents must have it than a line or paragraph of its own.

What stays whoever has it: a text's first line, its title; what is indented by a tab or two spaces, which may be code or
verse; and all code, which would not run without its repeated lines.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import daft
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataType, col, lit
from daft.functions import when

from llm_jax.config import positive
from llm_jax.data import ngrams
from llm_jax.data.loops import compiled
from llm_jax.data.stages import BECAUSE, DROPPED, HTML, ID, TEXT, Result, groups, marks
from llm_jax.errors import require

REASON = "boilerplate"
PART = "part"  # the hash of one; while parts are counted, its last bit says whether it is a line or paragraph here
ALONE = "alone"  # in how many documents a part is a line or paragraph
LAST_BIT = np.uint64(1)
# Kinds of characters, as bits: small letters; marks that end a sentence at a line's end, and those of them that end one
# before a space, or anywhere; what may stand between a mark and the end; all spaces, and those in and at ends of lines.
SMALL, MARK, BEFORE_SPACE, ANYWHERE, CLOSING, SPACE, INSIDE_LINE, LINE_END = (1 << bit for bit in range(8))
CHARACTERS = {
    MARK: "!?:;。！？：；…", BEFORE_SPACE: "!?", ANYWHERE: "。！？", CLOSING: "\"'”’」』）)]",
    SPACE: " \t\r\n\f\x1e", INSIDE_LINE: " \t\x1e", LINE_END: " \t\r\n\x1e",
}  # fmt: skip
NEWLINE, FULL_STOP = ord("\n"), ord(".")
SHORT_LINE = 60  # bytes: of two neighbours that are no longer, the first is taken for a whole one, as in a menu
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class LinesConfig:
    """Deduplication of parts of documents."""

    enabled: bool = True
    documents: int = 10  # a line or paragraph that more documents have goes
    sentences: int = 30  # a sentence that more documents have goes, even if it is never a line of its own
    words: int = 5  # a part of fewer stays
    characters: int = 10  # the same in scripts without spaces; a part of both needs as much of the two together
    least_left: float = 0.3  # share of its units that a document must keep; else it goes as a whole

    def __post_init__(self) -> None:
        positive(self, "documents", "sentences", "words", "characters")
        require(0 <= self.least_left <= 1, f"LinesConfig.least_left={self.least_left} must be in [0, 1]")


class Parts(NamedTuple):
    """The sentences, lines and paragraphs of some texts that are long enough, as spans of the joined UTF-8 bytes."""

    starts: Integers
    stops: Integers
    owners: Integers  # the text of each
    alone: npt.NDArray[np.bool_]  # whether it is a line or paragraph; a sentence that is one is listed as each
    hashes: npt.NDArray[np.uint64]  # the last bit is 0


@dataclasses.dataclass(frozen=True)
class Lines:
    """Takes parts that many documents have out of all, and drops documents of which little is left."""

    config: LinesConfig = LinesConfig()
    name: str = "lines"

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """Count the parts of all documents, then rewrite those that have one to go."""
        prose = documents.where(col("format").is_in([TEXT, HTML])).select(ID, "text")
        marked = marks.mark(prose, self.listed, {PART: DataType.list(DataType.uint64())}, scratch)
        bit = lit(int(LAST_BIT)).cast(DataType.uint64())
        rows = marked.explode(PART).where(col(PART).not_null()).with_column(ALONE, col(PART).bitwise_and(bit))
        rows = rows.with_column(PART, col(PART) - col(ALONE))
        counted = groups.group_by(rows.select(PART, ALONE), (PART,), col(ALONE).sum())
        often = col(groups.COUNT) > lit(self.config.sentences)
        common = counted.where(often | (col(ALONE) > lit(self.config.documents))).exclude(ALONE).collect()
        having = rows.exclude(ALONE).join(common, on=PART).collect()
        affected = prose.join(having.select(ID).distinct(), on=ID)
        gone = np.sort(common.to_arrow()[PART].to_numpy())
        fields = dict.fromkeys(("left", BECAUSE, DROPPED), DataType.string()) | {"removed": DataType.int64()}
        (scratch / "rewritten").mkdir()
        rewritten = marks.mark(affected, lambda batch: self.rewritten(batch, gone), fields, scratch / "rewritten")
        facts = {
            "different parts": len(counted),
            "parts of too many documents": len(common),
            "documents changed": rewritten.count_rows(),
            "bytes removed": rewritten.sum("removed").to_pydict()["removed"][0] or 0,
            "documents changed by source": groups.by_source(rewritten),
            "most common": self.most_common(prose, having),
        }
        return Result(_with(documents, rewritten), facts)

    def listed(self, batch: pa.RecordBatch) -> dict[str, pa.Array]:
        """The hashes of each text's parts, each once, the last bit set for what is a line or paragraph there."""
        texts = batch["text"]
        found = self.parts(texts, ngrams.units(texts))
        order = np.lexsort((~found.alone, found.hashes, found.owners))
        owners, hashes, alone = found.owners[order], found.hashes[order], found.alone[order]
        new = np.ones(len(order), np.bool_)
        new[1:] = (owners[1:] != owners[:-1]) | (hashes[1:] != hashes[:-1])
        offsets = np.searchsorted(owners[new], np.arange(len(texts) + 1))
        return {PART: pa.LargeListArray.from_arrays(offsets, pa.array((hashes | alone)[new]))}

    def rewritten(self, batch: pa.RecordBatch, gone: npt.NDArray[np.uint64]) -> dict[str, pa.Array]:
        """Each text without the parts that are `gone`, how many bytes those had, and whether too little is left."""
        texts = batch["text"]
        data, ends = ngrams.utf8_buffer(texts)
        found = ngrams.units(texts)
        parts = self.parts(texts, found)
        chosen = np.isin(parts.hashes, gone)
        kept = _outside(data, ends, parts.starts[chosen], parts.stops[chosen])
        left = _tidy(data[kept], np.concatenate([[0], np.cumsum(kept)])[ends])
        before = np.diff(found.offsets)
        after = np.diff(np.concatenate([[0], np.cumsum(kept[_first_bytes(found, ends)])])[found.offsets])
        shares = after / np.maximum(before, 1)
        dropped = (shares < self.config.least_left) | (after == 0)
        return {
            "left": left,
            BECAUSE: pa.array([f"{share:.0%} left" for share in shares]),
            DROPPED: pa.array(np.where(dropped, REASON, ""), mask=~dropped),
            "removed": pa.array(np.diff(ends) - pc.binary_length(left).to_numpy()),
        }

    def parts(self, texts: pa.Array, found: ngrams.Units) -> Parts:
        """The sentences, lines and paragraphs of texts with these units, without those that stay whoever has them."""
        data, ends = ngrams.utf8_buffer(texts)
        units = _first_bytes(found, ends)
        alone = np.concatenate([[0], np.cumsum(found.is_cjk)])
        newlines = np.append(np.flatnonzero(data == ord("\n")), len(data))
        titles = newlines[np.searchsorted(newlines, ends[:-1])]  # where the first line of each text ends
        levels = []
        for level, cuts in enumerate(_cuts(texts)):
            offsets = np.searchsorted(units, cuts)
            characters = np.diff(alone[offsets])
            words = np.diff(offsets) - characters
            place = np.flatnonzero(words / self.config.words + characters / self.config.characters >= 1)
            owners = np.searchsorted(ends, cuts[place], side="right") - 1
            title = units[offsets[place + 1] - 1] < titles[owners]
            shown = ~title & ~ngrams.is_indented(data, cuts[place])
            place, owners = place[shown], owners[shown]
            hashes = ngrams.whole(found, offsets)[place] & ~LAST_BIT
            levels.append(Parts(cuts[place], cuts[place + 1], owners, np.full(len(place), level > 0), hashes))
        return Parts(*(np.concatenate(column) for column in zip(*levels, strict=True)))

    def most_common(self, prose: daft.DataFrame, having: daft.DataFrame) -> list[dict[str, Any]]:
        """The parts that most documents have, from the first document with each."""
        each = having.groupby(PART).agg(col(groups.COUNT).min(), col(ID).min())
        shown = each.sort([groups.COUNT, PART], desc=[True, False]).limit(groups.EXAMPLES).to_pydict()
        texts = prose.where(col(ID).is_in(shown[ID])).to_arrow()
        by_id = dict(zip(texts[ID].to_pylist(), texts["text"]))
        return [
            {"documents": count, "text": self._text_of(by_id[name].as_py(), part)}
            for part, count, name in zip(shown[PART], shown[groups.COUNT], shown[ID], strict=True)
        ]

    def _text_of(self, text: str, part: int) -> str:
        array = pa.array([text])
        found = self.parts(array, ngrams.units(array))
        place = int(np.flatnonzero(found.hashes == part)[0])
        return text.encode()[found.starts[place] : found.stops[place]].decode().strip()[: groups.EXCERPT]


def _with(documents: daft.DataFrame, rewritten: daft.DataFrame) -> daft.DataFrame:
    """All documents, the rewritten ones with what is left of them."""
    # Collected they are of known size, so that the join holds these in memory and not all documents.
    few = rewritten.select(ID, "left", BECAUSE, DROPPED).collect()
    joined = documents.join(few, on=ID, how="left")
    text = when(col("left").not_null(), col("left")).otherwise(col("text"))
    return joined.with_column("text", text).exclude("left")


def _cuts(texts: pa.Array) -> tuple[Integers, Integers, Integers]:
    """The bytes where the joined texts are cut into sentences, lines and paragraphs, with both ends of each text.

    Of two short lines the first ends a sentence too, unless a comma or a hyphen ends it. Nothing is cut before a small
    letter.
    """
    data, ends = ngrams.utf8_buffer(texts)
    levels = _levels(data, ends, _kinds())
    return np.flatnonzero(levels), np.flatnonzero(levels > 1), np.flatnonzero(levels > 2)


@functools.cache
def _kinds() -> Bytes:
    """The kinds of every code point below 0x20000, and of those above as none."""
    kinds = np.zeros(0x110000, np.uint8)
    points = [point for point in range(0x20000) if not 0xD800 <= point < 0xE000]
    small = pc.match_substring_regex(pa.array([chr(point) for point in points]), r"\p{Ll}")
    kinds[np.array(points)[np.asarray(small)]] = SMALL
    for kind, characters in CHARACTERS.items():
        kinds[[ord(character) for character in characters]] |= kind
    return kinds


@compiled
def _levels(data: Bytes, ends: Integers, kinds: Bytes) -> Bytes:
    """Of each byte and the end: 1 if a sentence begins there, 2 if a line does too, 3 if a paragraph does, else 0."""
    levels = np.zeros(len(data) + 1, np.uint8)
    for text in range(len(ends) - 1):
        _cut_sentences(data, ends[text], ends[text + 1], kinds, levels)
        _cut_short_lines(data, ends[text], ends[text + 1], levels)
    levels[ends] = 3
    return levels


@compiled
def _cut_sentences(data: Bytes, begin: int, end: int, kinds: Bytes, levels: Bytes) -> None:
    """Cut a text after what `_sentence_end` finds, from left to right."""
    done, place = begin, begin
    while place < end:
        before = _before(data, place, kinds)
        start, stop = place, 0
        for _ in range(before):
            start -= start > done
            while data[start] & 0xC0 == 0x80:
                start -= 1
        for _ in range(before + 1 if before < 4 else 2):  # none ends with a full stop after fewer than three
            stop = _sentence_end(data, start, end, kinds) if start < end else 0
            if stop > 0 or start >= end:
                break
            start += ngrams.code_point(data, start)[1]
        if stop > 0:
            levels[stop] = _level(data, stop, end)
            done = stop
        place = max(stop, place + 1)


@compiled
def _before(data: Bytes, place: int, kinds: Bytes) -> int:
    """How many characters an end of a sentence may have before what is at a byte; -1 where nothing is that ends one."""
    byte = data[place]
    if byte == FULL_STOP:
        return 4
    if byte < 0x80:
        return 0 if kinds[byte] & MARK or byte == NEWLINE else -1
    if byte in (0xE2, 0xE3, 0xEF):  # a mark beyond ASCII begins so
        kind = kinds[ngrams.code_point(data, place)[0]]
        return 2 if kind & ANYWHERE else 0 if kind & MARK else -1
    return -1


@compiled
def _sentence_end(data: Bytes, start: int, end: int, kinds: Bytes) -> int:
    """Where the end of a sentence that begins at `start` stops, or 0; what is first here goes before what follows.

    That is a full stop after three characters or another mark, at the end of a line; the newlines of blank lines; a
    Chinese mark; and a full stop after four small letters or another mark, before spaces: with fewer letters it may be
    that of an abbreviation.
    """
    point, width = ngrams.code_point(data, start)
    kind = kinds[point]
    for stop in (_full_stop(data, start, end, 3, kinds), start + width if kind & MARK else 0):
        if stop > 0:
            stop = _skip(data, stop, end, kinds, CLOSING)
            after = _last_newline(data, stop, end, kinds)
            if after > stop:
                return after
    if point == NEWLINE:
        after = _last_newline(data, start + 1, end, kinds)
        return after if after > start + 1 else 0
    if kind & ANYWHERE:
        return _skip(data, start + width, end, kinds, CLOSING)
    stop = start + width if kind & BEFORE_SPACE else _full_stop(data, start, end, 4, kinds)
    if stop > 0:
        stop = _skip(data, stop, end, kinds, CLOSING)
        after = _skip(data, stop, end, kinds, INSIDE_LINE)
        if after > stop:
            return after
    return 0


@compiled
def _full_stop(data: Bytes, place: int, end: int, before: int, kinds: Bytes) -> int:
    """The end of a full stop after so many characters, or 0: four small letters, or three that are not spaces."""
    for _ in range(before):
        if place >= end:
            return 0
        point, width = ngrams.code_point(data, place)
        if point == FULL_STOP or (kinds[point] & SPACE if before == 3 else not kinds[point] & SMALL):
            return 0
        place += width
    return place + 1 if place < end and data[place] == FULL_STOP else 0


@compiled
def _skip(data: Bytes, place: int, end: int, kinds: Bytes, kind: int) -> int:
    """Where the characters of a kind end that begin at a place."""
    while place < end:
        point, width = ngrams.code_point(data, place)
        if not kinds[point] & kind:
            break
        place += width
    return place


@compiled
def _last_newline(data: Bytes, place: int, end: int, kinds: Bytes) -> int:
    """Where the last newline ends of the spaces that begin at a place; the place itself if there is none."""
    after = _skip(data, place, end, kinds, LINE_END)
    while after > place and data[after - 1] != NEWLINE:
        after -= 1
    return after


@compiled
def _cut_short_lines(data: Bytes, begin: int, end: int, levels: Bytes) -> None:
    """Cut a text between two short lines."""
    line, short_before = begin, False
    for place in range(begin, end):
        if data[place] == NEWLINE or place + 1 == end:
            short = place + 1 - line <= SHORT_LINE
            comma = line > 1 and (data[line - 2] == ord(",") or data[line - 2] == ord("-"))
            if short and short_before and not comma:
                levels[line] = _level(data, line, end)
            line, short_before = place + 1, short


@compiled
def _level(data: Bytes, place: int, end: int) -> int:
    """As `_levels`, of a place after its beginning where a text may be cut."""
    if place == end:
        return 3
    first = data[place]
    if first == NEWLINE or 97 <= first < 123 or (first == 0xC3 and data[place + 1] >= 0xA0):  # a to z, à to ÿ
        return 0
    line = data[place - 1] == NEWLINE
    return 1 + line + (line and place > 1 and (data[place - 2] == NEWLINE or data[place - 2] == ord("\r")))


def _first_bytes(found: ngrams.Units, ends: Integers) -> Integers:
    """Where each unit begins in the joined texts."""
    return found.starts + np.repeat(ends[:-1], np.diff(found.offsets))


def _outside(data: npt.NDArray[np.uint8], ends: Integers, starts: Integers, stops: Integers) -> npt.NDArray[np.bool_]:
    """Which bytes are in none of the parts; the line end after a part that does not begin its line stays."""
    space = np.isin(data, np.frombuffer(b" \t\r\n", np.uint8))
    content = np.maximum.accumulate(np.where(space, -1, np.arange(len(data)))) + 1  # after the last that is no space
    inside_line = ~np.isin(starts, ends) & (data[starts - 1] != ord("\n"))
    stops = np.where(inside_line & (data[stops - 1] == ord("\n")), content[stops - 1], stops)
    change = np.bincount(starts, minlength=len(data) + 1) - np.bincount(stops, minlength=len(data) + 1)
    return np.cumsum(change[:-1]) == 0


def _tidy(data: npt.NDArray[np.uint8], ends: Integers) -> pa.Array:
    """Texts of these bytes without spaces at line ends and without more than one blank line in a row."""
    texts = pc.replace_substring_regex(ngrams.strings(data, ends), r"[ \t]+\n", "\n")
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, r"\n{3,}", "\n\n"))
