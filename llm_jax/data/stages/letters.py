"""How likely the words of a sentence are, apart from its digits, signs and quotations.

A table's row, an equation or a heading's underline is unlikely to a language model and no garbage: what is no letter
says nothing here. Characters of scripts without spaces are judged one by one, by how often a sample has them, so that a
rare one is as unlikely as a rare word and no more; words of alphabets by a model of sentences. Words with letters that
the sample hardly has are names and quotations.
"""

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

WORD = re.compile(r"[^\W\d_]+")
CHARACTER = re.compile("[\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")  # without spaces
IDEOGRAPHS = (0x4E00, 0x9FA6)  # what garbage is made of
MOST_UNSEEN = 0.01  # share of a script's text that a sample may not have seen, for it to say what is likely there
RARE = 1e-5  # share of the letters of a sample; those of alphabets that the corpus is written in have more
LATIN_END = "\u0250"  # of the letters that any language written in Latin ones may have; of one misread, too
SIGN = re.compile(r"[!-/:-@\[-`{-~\d]")
LEAST_BYTES = 20  # of words, to judge a text by them
LEAST_SHARE = 0.3  # of its bytes of letters and signs that are letters; with less it is a table or an equation


class Words(NamedTuple):
    """What there is to be judged of a text."""

    characters: str  # of scripts without spaces, each once: what a text repeats is its subject
    words: str  # of alphabets, with spaces between them
    letters: int  # bytes of all letters
    signs: int  # digits, punctuation and other signs of ASCII

    def sizes(self) -> tuple[int, int]:
        """Bytes of the characters and of the words."""
        return _size(self.characters), _size(self.words.replace(" ", ""))


@dataclasses.dataclass(frozen=True)
class Letters:
    """How often a sample has its letters."""

    bits: dict[str, float]  # -log2 of the share of each character of scripts without spaces; "" for any other
    known: bool  # whether the sample has enough of such scripts
    usual: float  # bits of such a character in a sample's text, in the mean
    random: float  # of one drawn from all ideographs
    common: str  # letters of alphabets that are not rare

    def words(self, text: str) -> Words:
        """The words of a text, without those in scripts of which the sample says nothing."""
        text = unicodedata.normalize("NFKC", text)
        found = WORD.findall(text)
        characters = "".join(dict.fromkeys(CHARACTER.findall(text))) if self.known else ""
        words = (part for word in found for part in CHARACTER.split(word) if part)
        known = " ".join(word for word in words if all(c < LATIN_END or c in self.common for c in word.lower()))
        return Words(characters, known, _size("".join(found)), len(SIGN.findall(text)))

    def place(self, characters: str) -> float:
        """Where the characters lie between those of the sample (0) and random ones (1)."""
        unknown = self.bits[""]
        mean = float(np.mean([self.bits.get(character, unknown) for character in characters])) if characters else 0.0
        return (mean - self.usual) / max(self.random - self.usual, 1.0)

    def places(self, words: Sequence[Words], word_places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Where texts lie between what is usual (0) and random (1), by their bytes in scripts of either kind.

        `word_places` are those of their words of alphabets.
        """
        sizes = np.array([one.sizes() for one in words], np.float64).reshape(-1, 2)
        places = np.column_stack([[self.place(one.characters) for one in words], word_places])
        return (places * sizes).sum(axis=1) / np.maximum(sizes.sum(axis=1), 1)


def _size(text: str) -> int:
    return len(text.encode())


def learn(texts: Iterable[str]) -> Letters:
    """Count the letters of a sample.

    What was never seen has the share of what was seen once (Good and Turing), spread over all ideographs of Unicode's
    main block that were not seen.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.lower())
    characters = {c: n for c, n in counts.items() if CHARACTER.match(c)}
    alphabets = {c: n for c, n in counts.items() if c.isalpha() and c not in characters}
    total = sum(characters.values())
    once = max(sum(n == 1 for n in characters.values()), 1)
    block = [chr(point) for point in range(*IDEOGRAPHS)]
    unseen = max(sum(c not in characters for c in block), 1)
    bits = {c: float(np.log2((total + once) / n)) for c, n in characters.items()}
    bits[""] = float(np.log2((total + once) * unseen / once))
    usual = sum(bits[c] * n for c, n in characters.items()) / max(total, 1)
    common = sorted(c for c, n in alphabets.items() if n >= RARE * sum(alphabets.values()))
    random = float(np.mean([bits.get(c, bits[""]) for c in block]))
    return Letters(bits, once <= MOST_UNSEEN * total, usual, random, "".join(common))


def is_text(words: Words) -> bool:
    """Whether there are enough words to say something of a sentence."""
    return sum(words.sizes()) >= LEAST_BYTES and words.letters >= LEAST_SHARE * (words.letters + words.signs)
