"""Tokens to text while they are being drawn."""

import codecs
from collections.abc import Collection, Sequence

from llm_jax.tokenization.tokenizer import Tokenizer


class TextStream:
    """The text of a continuation in parts, none of which ends within a character."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int] = ()):
        """Decode with `tokenizer`, leaving out `stop_ids`."""
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._before = tokenizer.encode("x")  # behind a text, a token keeps the space that it begins with
        self._start = len(tokenizer.decode_bytes(self._before))
        self._begun = False

    def feed(self, ids: Sequence[int]) -> str:
        """The text that the next tokens complete; ids outside the tokenizer's vocabulary have none."""
        known = [i for i in ids if i not in self._stop_ids and 0 <= i < self._tokenizer.vocab_size]
        inside = self._tokenizer.decode_bytes([*self._before, *known])[self._start :]
        new = inside if self._begun else self._tokenizer.decode_bytes(known)
        self._begun = self._begun or bool(inside)
        return self._decoder.decode(new)

    def finish(self) -> str:
        """What is left at the end: U+FFFD where the tokens stop within a character."""
        return self._decoder.decode(b"", final=True)
