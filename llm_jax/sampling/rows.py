"""What the host knows of the rows while they are drawn: which have ended, and why."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.errors import require
from llm_jax.tokenization.tokenizer import Tokenizer


class Generation(NamedTuple):
    """A continuation."""

    tokens: list[int]  # a stop id that ended it is the last one; so is the token that completed a stop string
    logprobs: list[float]  # of each token under the whole vocabulary's distribution, before any processor
    finished: str  # "stop" or "length"


class Rows:
    """The continuations so far, cut where a stop id or a stop string ends them, and told to whoever listens."""

    def __init__(
        self,
        count: int,
        stop_ids: Sequence[int],
        stop_strings: Sequence[str],
        tokenizer: Tokenizer | None,
        on_tokens: Callable[[int, list[int]], None] | None,
    ) -> None:
        require(all(stop_strings), "generate: a stop string is empty")
        require(not stop_strings or tokenizer is not None, "generate: stop strings need the tokenizer")
        self._stop_ids = frozenset(stop_ids)
        self._stop_bytes = [text.encode() for text in stop_strings]
        self._tokenizer = tokenizer
        # Behind a text, a token keeps the space that it begins with.
        self._before = tokenizer.encode("x") if tokenizer is not None and stop_strings else []
        self._on_tokens = on_tokens
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._logprobs: list[list[float]] = [[] for _ in range(count)]
        self._done = np.zeros(count, bool)

    @property
    def all_done(self) -> bool:
        """Whether every row has met a stop."""
        return bool(self._done.all())

    def done(self, size: int) -> np.ndarray:
        """Bool [size]: which rows have ended; those beyond the real ones have."""
        return np.pad(self._done, (0, size - len(self._done)), constant_values=True)

    def update(self, step: np.ndarray, tokens_RN: np.ndarray, logprobs_RN: np.ndarray) -> None:
        """Take over what was drawn up to `step`."""
        for row in np.flatnonzero(~self._done).tolist():
            known = len(self._tokens[row])
            tokens = tokens_RN[row, : int(step)].tolist()
            end = self._end(tokens, known)
            self._done[row] = end is not None
            self._tokens[row] = tokens[:end]
            self._logprobs[row] = logprobs_RN[row, : len(self._tokens[row])].tolist()
            if self._on_tokens is not None and self._tokens[row][known:]:
                self._on_tokens(row, self._tokens[row][known:])

    def generations(self) -> list[Generation]:
        """Every row's continuation."""
        ends = ("stop" if done else "length" for done in self._done)
        return [Generation(*row) for row in zip(self._tokens, self._logprobs, ends)]

    def _end(self, tokens: list[int], known: int) -> int | None:
        """How many of the tokens are left by the first stop after the first `known` of them, which hold none."""
        end = next((i + 1 for i in range(known, len(tokens)) if tokens[i] in self._stop_ids), None)
        tokens = tokens[:end]
        if not self._holds_stop(tokens):
            return end
        return next(i for i in range(known + 1, len(tokens) + 1) if self._holds_stop(tokens[:i]))

    def _holds_stop(self, tokens: list[int]) -> bool:
        if self._tokenizer is None or not self._stop_bytes:
            return False
        # A model's vocabulary may be padded beyond the tokenizer's: such ids stand for no text.
        known = [token for token in tokens if token < self._tokenizer.vocab_size]
        text = self._tokenizer.decode_bytes([*self._before, *known])[1:]
        return any(stop in text for stop in self._stop_bytes)
