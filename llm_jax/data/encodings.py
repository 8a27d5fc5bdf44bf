"""Bytes to text: which encoding they are in, what had to be repaired, and texts that UTF-8 and tools can hold.

Short texts in legacy encodings are told apart by what is frequent in them: nearly all ideographs of a Chinese text are
among the 3,755 of GB 2312's first level, or Big5's 5,401, and bytes read in the wrong encoding seldom are.
"""

import codecs
import functools
import re
from typing import NamedTuple

SAMPLE_BYTES = 1 << 16  # that decide about an encoding
LEAST_SCORE = 0.6  # of the characters outside ASCII are expected ones, in the right encoding
LEAST_WIDE = 16  # bytes that tell a wide encoding without a mark
MOST_CONTROLS = 0.01  # of what is text
WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What pages call an encoding, and the larger one that holds it: as browsers do.
SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "iso8859-1": "cp1252", "ascii": "cp1252", "big5": "big5hkscs"}
PUNCTUATION = "、。，．：；？！（）「」『』《》〈〉【】“”‘’—…·～％　\ufeff"
WESTERN = "ªºàâäáãåæçéèêëíìîïñóòôöõøœúùûüýÿßÀÂÄÁÃÅÆÇÉÈÊËÍÎÓÔÖÕØÚÜ¿¡«»“”‘’„–—…•·°§£€©®\xa0"
CENTRAL = "ąćęłńóśźżĄĆĘŁŃÓŚŹŻáčďéěíňóřšťúůýžÁČĎÉĚÍŇÓŘŠŤÚŮÝŽľĺŕäôőűöüŐŰăâîșțşţđ„”–—"
CONTROLS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
SURROGATES = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"
BYTE_ORDER_MARK = "\ufeff"


class Decoded(NamedTuple):
    """A text, the encoding that it was in, and how many characters could not be read and were replaced."""

    text: str
    encoding: str
    replaced: int


def _table(encoding: str, leads: range, trails: range = range(0xA1, 0xFF)) -> str:
    return bytes(byte for lead in leads for trail in trails for byte in (lead, trail)).decode(encoding, "ignore")


@functools.cache
def _expected() -> dict[str, frozenset[str]]:
    """The characters that are frequent in texts of each encoding; the first of equals is preferred."""
    kana = "".join(map(chr, range(0x3041, 0x30FF)))
    cyrillic = "".join(map(chr, range(0x430, 0x450))) + "ёіїєґ№«»—–"  # small: KOI8 has capitals where cp1251 has them
    wide = "".join(map(chr, range(0xFF01, 0xFF5F)))
    characters = {
        "euc_kr": _table("euc_kr", range(0xB0, 0xC9)),  # whose bytes are a part of the next one's
        "gb18030": PUNCTUATION + wide + _table("gb18030", range(0xB0, 0xD8)),
        "big5hkscs": PUNCTUATION + wide + _table("big5", range(0xA4, 0xC7), range(0x40, 0xFF)),
        "shift_jis": PUNCTUATION + kana + _table("shift_jis", range(0x88, 0x98), range(0x40, 0xFD)),
        "euc_jp": PUNCTUATION + kana + _table("euc_jp", range(0xB0, 0xD0)),
        "cp1252": WESTERN,
        "cp1251": cyrillic,
        "koi8_r": cyrillic,
        "cp1250": CENTRAL,
    }
    return {encoding: frozenset(expected) for encoding, expected in characters.items()}


def decode(data: bytes, declared: str = "") -> Decoded | None:
    """Text of bytes in UTF-8, with or without faults, in the encoding that they declare, or in one that fits them.

    Returns None for what is no text, and for what `wide` names an encoding of.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return Decoded(data.decode(), "utf-8", 0)
    except UnicodeDecodeError as error:
        start = error.start
    encoding = _declared(data, declared) or _fitting(data[max(start - SAMPLE_BYTES // 2, 0) :][:SAMPLE_BYTES])
    return _replaced(data, encoding) if encoding else None


def wide(beginning: bytes) -> str:
    """UTF-16 or UTF-32 where the first bytes of a file are in one of them, else ""."""
    marked = next((encoding for mark, encoding in WIDE_MARKS.items() if beginning.startswith(mark)), "")
    if marked or len(beginning) < LEAST_WIDE:
        return marked
    beginning = beginning[: len(beginning) // 2 * 2]
    nulls = [beginning[half::2].count(0) * 2 for half in (0, 1)]
    if sum(nulls) > 1.2 * len(beginning):
        return ""  # hardly anything but nulls
    # Without a mark, UTF-16 shows by a script whose characters have a null byte each, as Latin ones do.
    return next((name for name, count in zip(("utf-16-be", "utf-16-le"), nulls) if count > 0.8 * len(beginning)), "")


def _declared(data: bytes, name: str) -> str:
    try:
        encoding = codecs.lookup(name).name if name else ""
        encoding = SUPERSETS.get(encoding, encoding)
        return encoding if encoding and encoding != "utf-8" and data.decode(encoding) is not None else ""
    except (LookupError, UnicodeError):
        return ""


def _replaced(data: bytes, encoding: str) -> Decoded:
    text = data.decode(encoding, "replace")
    try:
        own = data.count(REPLACEMENT.encode(encoding))
    except UnicodeEncodeError:
        own = 0
    return Decoded(text, encoding, max(text.count(REPLACEMENT) - own, 0))


def _fitting(sample: bytes) -> str:
    """The encoding in which a sample has the most expected characters; UTF-8 where most of it is, "" for none."""
    text = sample.decode(errors="replace")
    if len(CONTROLS.findall(text)) > MOST_CONTROLS * len(text) + 1:
        return ""
    outside = sum(not character.isascii() for character in text)
    if text.count(REPLACEMENT) < outside / 4:
        return "utf-8"
    scores = {encoding: _score(sample, encoding, expected) for encoding, expected in _expected().items()}
    best = max(scores, key=lambda encoding: scores[encoding])
    return best if scores[best] >= LEAST_SCORE else ""


def _score(sample: bytes, encoding: str, expected: frozenset[str]) -> float:
    text = [character for character in sample.decode(encoding, "replace") if not character.isascii()]
    return sum(character in expected for character in text) / max(len(text), 1)


class Cleaned(NamedTuple):
    """A text that has a UTF-8 form, and how many characters were taken out of it or replaced."""

    text: str
    nulls: int
    marks: int
    surrogates: int


def clean(text: str) -> Cleaned:
    """Without null characters and byte-order marks, and with U+FFFD for halves of surrogate pairs."""
    nulls, marks = text.count("\0"), text.count(BYTE_ORDER_MARK)
    if nulls or marks:
        text = text.replace("\0", "").replace(BYTE_ORDER_MARK, "")
    try:
        text.encode()
        return Cleaned(text, nulls, marks, 0)
    except UnicodeEncodeError:
        text, surrogates = SURROGATES.subn(REPLACEMENT, text)
        return Cleaned(text, nulls, marks, surrogates)
