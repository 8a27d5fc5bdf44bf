"""Texts of invented languages, in which everything is known: what is a word, what is garbage, and what offends."""

import random

ENGLISH_SYLLABLES = ("ba", "ken", "tor", "mi", "sa", "lun", "de", "ra", "pol", "vi", "ne", "gar")
CHINESE = [chr(0x4E00 + 7 * i) for i in range(300)]


class Language:
    """A vocabulary, and sentences of it."""

    def __init__(self, seed: int, chinese: bool = False) -> None:
        self.generator = random.Random(seed)
        pieces = CHINESE if chinese else ENGLISH_SYLLABLES
        sizes = (1, 2) if chinese else (2, 3)
        words = ("".join(self.generator.choices(pieces, k=self.generator.choice(sizes))) for _ in range(400))
        self.words = sorted(set(words))
        self.chinese = chinese

    def sentence(self, words: int = 12) -> str:
        """Common words are common."""
        chosen = [self.words[int(len(self.words) * self.generator.random() ** 3)] for _ in range(words)]
        return "".join(chosen) + "。" if self.chinese else " ".join(chosen).capitalize() + "."

    def paragraph(self, sentences: int = 8) -> str:
        """Lines of two sentences."""
        pairs = range(sentences // 2)
        return "\n".join(("" if self.chinese else " ").join(self.sentence() for _ in "12") for _ in pairs)

    def garbage(self, size: int = 60) -> str:
        """Letters and symbols."""
        return "".join(self.generator.choices("qxzjwkfhQXZJW0123456789#@%&~", k=size))
