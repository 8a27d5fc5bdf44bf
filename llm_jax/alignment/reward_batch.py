"""Pairs of responses as batches of a reward model: both responses of a pair in one row, with other pairs beside them.

Every response stands in a row with its prompt as a segment of its own, and is scored at its segment's last token: the
one that ends a reply, or the last of its own words. What would come after that token is left out, as a causal model
would not see it.

Rows hold whole pairs: see `alignment.pair_rows`.

Legend: B rows, T tokens of a row, P pairs of a row, R responses of a row; the last axis, 2, is (chosen, rejected).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.alignment import pair_rows
from llm_jax.alignment.config import POOLINGS, RewardDataConfig, RewardLossConfig
from llm_jax.alignment.conversations import BadRecordError, Tally
from llm_jax.alignment.preferences import Pair
from llm_jax.alignment.rewards import Prompt
from llm_jax.config import one_of
from llm_jax.data.packing import SharedRows
from llm_jax.errors import require
from llm_jax.tokenization.chat import ChatTemplate, Message
from llm_jax.tokenization.tokenizer import Tokenizer


class RewardBatch(NamedTuple):
    """Rows of pairs. A place without a pair has weight 0 and ends at index 0."""

    tokens: np.ndarray  # int32 [B,T]
    segment_ids: np.ndarray  # int32 [B,T], from 1; 0 = padding
    positions: np.ndarray  # int32 [B,T], from 0 in each segment
    ends: np.ndarray  # int32 [B,P,2]: index of the token that is scored
    weights: np.ndarray  # float32 [B,P]
    strengths: np.ndarray  # int32 [B,P], from 1
    safety_labels: np.ndarray  # float32 [B,P,2], 1 = unsafe
    safety_weights: np.ndarray  # float32 [B,P,2], 0 = no label


class ResponseBatch(NamedTuple):
    """Rows of responses that are no pairs."""

    tokens: np.ndarray  # int32 [B,T], like the next two as in `RewardBatch`
    segment_ids: np.ndarray
    positions: np.ndarray
    ends: np.ndarray  # int32 [B,R]
    places: np.ndarray  # int32 [B,R]: which response it is; -1 = none


class EncodedPair(NamedTuple):
    """A pair as tokens: prompt and response, up to the token that is scored."""

    chosen: np.ndarray  # int32
    rejected: np.ndarray  # int32
    strength: np.ndarray  # int32, no axes
    safety_labels: np.ndarray  # float32 [2]
    safety_weights: np.ndarray  # float32 [2]

    @property
    def length(self) -> int:
        """Tokens of both responses."""
        return len(self.chosen) + len(self.rejected)


@dataclasses.dataclass(frozen=True)
class ResponseEncoder:
    """Turns a prompt and a response into ids, the last of which is the one that is scored.

    With a template, a prompt and its response are a conversation; without one, or without a prompt, they are one text
    that begins with bos, where there is one. A response that was cut off before its end gets an end token all the same:
    only `rewards.missing_end_penalty` tells it from others.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    pooling: str = "end"

    def __post_init__(self) -> None:
        one_of("pooling", self.pooling, POOLINGS)

    def __call__(self, prompt: Prompt, response: str) -> np.ndarray:
        """int32 [tokens]. Raises `UserError` where the template refuses the messages, or there is nothing to score."""
        words, end = self._chat(prompt, response) if self.template and prompt else (self._text(prompt, response), None)
        if self.pooling == "end":
            end = self.tokenizer.eos_id if end is None else end
            require(end >= 0, "this tokenizer has no token that ends a text to score: set pooling to 'last'")
            words = [*words, end]
        require(bool(words), "there is nothing to score: prompt and response are empty")
        return np.array(words, np.int32)

    def _text(self, prompt: Prompt, response: str) -> list[int]:
        text = "".join([*(message.content for message in prompt), response])
        return [*([self.tokenizer.bos_id] if self.tokenizer.bos_id >= 0 else []), *self.tokenizer.encode(text)]

    def _chat(self, prompt: Prompt, response: str) -> tuple[list[int], int | None]:
        """The conversation up to the token that ends it, and that token if the template writes one."""
        assert self.template is not None
        ids = self.template.encode([*prompt, Message("assistant", response)], add_generation_prompt=False)
        last = max((i for i, token in enumerate(ids) if token in self.template.stop_ids), default=len(ids))
        if self.tokenizer.decode(ids[last + 1 :]).strip():  # an earlier message's: a file's template may write no end
            return ids, None
        return ids[:last], next(iter(ids[last:]), None)  # and without the line break that ChatML has after it


def encode_pair(pair: Pair, encoder: ResponseEncoder, sequence_length: int) -> EncodedPair:
    """A pair as tokens.

    Raises `BadRecordError` where both responses are the same to the model or do not fit into a row together, and
    `UserError` where the template refuses the messages.
    """
    chosen, rejected = (encoder(pair.prompt, text) for text in (pair.chosen, pair.rejected))
    if np.array_equal(chosen, rejected):
        raise BadRecordError("responses of the same tokens", repr(pair.chosen[:30]))
    if len(chosen) + len(rejected) > sequence_length:
        raise BadRecordError(f"too long for {sequence_length} tokens", f"{len(chosen)} + {len(rejected)} tokens")
    labels = (pair.chosen_safe, pair.rejected_safe)
    return EncodedPair(
        chosen,
        rejected,
        np.array(pair.strength, np.int32),
        np.array([is_safe is False for is_safe in labels], np.float32),
        np.array([is_safe is not None for is_safe in labels], np.float32),
    )


def encode_pairs(
    pairs: Iterable[Pair], encoder: ResponseEncoder, sequence_length: int
) -> tuple[dict[str, list[EncodedPair]], Tally]:
    """The pairs of each source as tokens, and a count of those that are left out (see `encode_pair`).

    Raises `UserError` where no pair is left.
    """
    return pair_rows.encode_all(pairs, lambda pair: encode_pair(pair, encoder, sequence_length))


def check_strengths(pairs: Mapping[str, Sequence[EncodedPair]], config: RewardLossConfig) -> None:
    """Raise `UserError` where a preference is stronger than any that the loss has a margin for."""
    for name, found in pairs.items():
        strongest = max(int(pair.strength) for pair in found)
        require(
            strongest <= len(config.margins),
            f"source {name!r} has preferences of strength {strongest}, and RewardLossConfig.margin={config.margin!r} "
            f"has {len(config.margins)} steps: map them with PreferenceConfig.strength_scale, or set it to 'none'",
        )


class Layout(NamedTuple):
    """A row of sequences, each a segment: the fields of `ResponseBatch` without their first axis."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    ends: np.ndarray


def _lay_out(sequences: Sequence[np.ndarray], length: int, places: int) -> Layout:
    """One row of sequences, then padding."""
    tokens, segment_ids, positions = (np.zeros(length, np.int32) for _ in range(3))
    ends = np.zeros(places, np.int32)
    start = 0
    for place, sequence in enumerate(sequences):
        stop = start + len(sequence)
        tokens[start:stop] = sequence
        segment_ids[start:stop] = place + 1
        positions[start:stop] = np.arange(len(sequence))
        ends[place] = stop - 1
        start = stop
    return Layout(tokens, segment_ids, positions, ends)


def _row(pairs: Sequence[EncodedPair], length: int, places: int) -> RewardBatch:
    """One row of pairs: a `RewardBatch` without its first axis."""
    layout = _lay_out([response for pair in pairs for response in (pair.chosen, pair.rejected)], length, 2 * places)
    weights, strengths = np.zeros(places, np.float32), np.zeros(places, np.int32)
    labels, label_weights = np.zeros((places, 2), np.float32), np.zeros((places, 2), np.float32)
    for place, pair in enumerate(pairs):
        weights[place] = 1.0
        strengths[place] = pair.strength
        labels[place] = pair.safety_labels
        label_weights[place] = pair.safety_weights
    return RewardBatch(*layout[:3], layout.ends.reshape(places, 2), weights, strengths, labels, label_weights)


class PackedPairs(pair_rows.PackedPairs[EncodedPair, RewardBatch]):
    """Batches for a run."""

    def __init__(self, pairs: Mapping[str, Sequence[EncodedPair]], config: RewardDataConfig):
        """Pairs of each source, as `encode_pairs` gives them for the config's sequence length."""
        super().__init__(pairs, config, _row)


def heldout_batches(
    pairs: Sequence[EncodedPair], config: RewardDataConfig, process_index: int = 0, process_count: int = 1
) -> Iterator[RewardBatch]:
    """This process's rows of batches with every pair once; see `pair_rows.heldout_batches`."""
    return pair_rows.heldout_batches(pairs, config, _row, process_index, process_count)


def response_batches(
    sequences: Sequence[np.ndarray], sequence_length: int, batch_size: int, packed: bool = True
) -> Iterator[ResponseBatch]:
    """Encoded responses in rows, for scoring them alone. Raises `UserError` where one does not fit into a row.

    A row has a power of two of places for ends, so that similar responses are scored by one compiled program.
    """
    lengths = [len(sequence) for sequence in sequences]
    for index, length in enumerate(lengths):
        require(
            length <= sequence_length,
            f"response {index + 1} of {len(lengths)} has {length} tokens with its prompt, and there is room for "
            f"{sequence_length}",
        )
    rows = SharedRows(lengths, "responses", sequence_length, seed=0, padded=not packed)
    places = pair_rows.power_of_two(rows.most)
    for start in range(0, rows.windows, batch_size):
        items = [rows[i] if i < rows.windows else [] for i in range(start, start + batch_size)]
        layouts = [_lay_out([sequences[i] for i in row], sequence_length, places) for row in items]
        numbers = [[*row, *[-1] * (places - len(row))] for row in items]
        stacked = Layout(*map(np.stack, zip(*layouts)))
        yield ResponseBatch(*stacked, places=np.array(numbers, np.int32))
