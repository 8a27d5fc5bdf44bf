"""Supervised fine-tuning's data: conversations as samples with loss weights, and samples packed into batches.

A row holds whole samples, each a segment of its own with positions from 0, so that its loss and gradients are those of
the samples alone. In every epoch each sample is drawn once; see `data.packing.SharedRows`.

Shapes: N tokens of a sample, T places of a row, B rows of a batch.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.alignment import conversations
from llm_jax.alignment.config import ChatDataConfig
from llm_jax.alignment.conversations import BadRecordError, Conversation, Tally
from llm_jax.data import loader, mixture
from llm_jax.data.batch import Batch
from llm_jax.data.packing import SharedRows
from llm_jax.errors import UserError, require
from llm_jax.tokenization import chat
from llm_jax.tokenization.chat import ChatML, ChatTemplate, Message, Segment
from llm_jax.tokenization.tokenizer import Tokenizer

CUT, LONG_PROMPT, LONG_REPLY = "cut at a turn", "prompt longer than the context", "first reply too long for the context"
UNSUPERVISED, TOO_LONG, REFUSED = "no supervised token", "longer than the context", "refused by the chat template"


class Sample(NamedTuple):
    """A conversation to learn from, up to the last token that has a weight."""

    tokens: np.ndarray  # [N] int32
    labels: np.ndarray  # [N] int32: what the loss wants at each place; the tokens, but for Baichuan-2's ends of replies
    weights: np.ndarray  # [N] float32: of the loss at each place; the first is 0, as nothing comes before it
    rounds_left_out: int = 0  # at the conversation's end, because they did not fit


class ChatData(NamedTuple):
    """Samples of every source, and what befell the records that are not among them or are shorter."""

    train: dict[str, list[Sample]]
    heldout: dict[str, list[Sample]]
    tally: Tally
    heldout_conversations: list[Conversation]


def choose_template(config: ChatDataConfig, tokenizer: Tokenizer, own_template: str = "") -> ChatTemplate:
    """The chat format of a run; see `tokenization.chat.choose`, also for what is raised.

    Raises `UserError` too where `config.supervise` asks for what only chatml has.
    """
    template = chat.choose(config.template, tokenizer, own_template)
    if config.supervise != "qwen_released":
        return template
    if not isinstance(template, ChatML):
        raise UserError(
            f"ChatDataConfig.supervise='qwen_released' needs the chatml format, and this is {template.name}: "
            "set ChatDataConfig.template='chatml'"
        )
    return dataclasses.replace(template, marks_supervised=True)


def load(config: ChatDataConfig, template: ChatTemplate) -> ChatData:
    """Read, split and tokenise `config.path`, of which nothing is trained on that begins with a held-out request.

    Raises `UserError` where there is nothing to read, or nothing to train on is left.
    """
    require(config.path != "", "ChatDataConfig.path is not set: name a file or folder of conversations")
    found, tally = conversations.read(config.path, config.format)
    if config.heldout_path:
        heldout, others = conversations.read(config.heldout_path, config.format)
        tally += others
        train = conversations.without_requests_of(found, heldout, tally)
    else:
        train, heldout = conversations.split(found, config.holdout_fraction)
    learned, judged = (tokenize_all(side, template, config, tally) for side in (train, heldout))
    data = ChatData(learned, judged, tally, heldout)
    require(bool(data.train), f"{config.path} has no conversation to train on: {str(tally) or 'all are held out'}")
    return data


def tokenize_all(
    found: Iterable[Conversation], template: ChatTemplate, config: ChatDataConfig, tally: Tally
) -> dict[str, list[Sample]]:
    """The samples of every source that has any; `tally` counts the conversations that are cut or left out."""
    samples: dict[str, list[Sample]] = {}
    for conversation in found:
        try:
            sample = tokenize(conversation, template, config)
        except BadRecordError as error:
            tally.add(error.reason, conversation.record, error.detail)
            continue
        if sample.rounds_left_out:
            tally.add(CUT, conversation.record)
        samples.setdefault(conversation.source, []).append(sample)
    return samples


def tokenize(conversation: Conversation, template: ChatTemplate, config: ChatDataConfig) -> Sample:
    """The sample of a conversation, at most `config.sequence_length` tokens long.

    Raises `BadRecordError`, whose `reason` is one of this module's, where there is nothing to learn or no room for it.
    """
    messages = list(conversation.messages)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise BadRecordError(UNSUPERVISED, "there is no reply")
    try:
        sample = _sample(messages, template, config.supervise)
        if len(sample.tokens) > config.sequence_length:
            sample = _shorten(sample, messages, template, config)
    except BadRecordError:
        raise
    except UserError as error:
        raise BadRecordError(REFUSED, str(error)) from None
    if not sample.weights.any():
        raise BadRecordError(UNSUPERVISED)
    return sample


def _sample(messages: Sequence[Message], template: ChatTemplate, supervise: str) -> Sample:
    segments = template.segments(messages, add_generation_prompt=False)
    if supervise == "last":
        segments = _only_last(segments)
    tokens = [token for segment in segments for token in segment.ids]
    labels = [label for segment in segments for label in segment.labels or segment.ids]
    weights = [float(segment.supervised) for segment in segments for _ in segment.ids]
    sample = Sample(np.array(tokens, np.int32), np.array(labels, np.int32), np.array(weights, np.float32))
    sample.weights[:1] = 0.0
    return _first(sample, len(tokens))


def _only_last(segments: Sequence[Segment]) -> list[Segment]:
    """The segments, of which only those of the last reply and its end are supervised."""
    last = max((i for i, segment in enumerate(segments) if segment.supervised), default=0)
    first = last
    while first > 0 and segments[first - 1].supervised:
        first -= 1
    return [segment._replace(supervised=first <= i <= last) for i, segment in enumerate(segments)]


def _first(sample: Sample, count: int) -> Sample:
    """The first `count` tokens of a sample, without those after the last that has a weight: they teach nothing."""
    supervised = np.flatnonzero(sample.weights[:count])
    end = int(supervised[-1]) + 1 if len(supervised) else 0
    return Sample(sample.tokens[:end], sample.labels[:end], sample.weights[:end])


def _shorten(sample: Sample, messages: Sequence[Message], template: ChatTemplate, config: ChatDataConfig) -> Sample:
    """What is learned from a conversation whose `sample` is too long."""
    limit = config.sequence_length
    if config.too_long == "drop":
        raise BadRecordError(TOO_LONG, f"{len(sample.tokens):,} tokens for {limit:,}")
    start = 1 if messages[0].role == "system" else 0
    prompt = len(template.encode(messages[: start + 1]))
    if prompt >= limit:
        raise BadRecordError(LONG_PROMPT, f"{prompt:,} tokens for {limit:,}")
    if config.too_long == "truncate":
        return _first(sample, limit)

    def rounds(count: int) -> Sample:
        return _sample(messages[: start + 2 * count], template, config.supervise)

    whole = (len(messages) - start) // 2
    kept = bisect.bisect_right(range(1, whole), limit, key=lambda count: len(rounds(count).tokens))
    if not kept:
        raise BadRecordError(LONG_REPLY, f"{len(rounds(1).tokens):,} tokens with its prompt for {limit:,}")
    return rounds(kept)._replace(rounds_left_out=whole - kept)


class PackedRows:
    """The endless sequence of rows of one source's samples; `self[i]` is a pure function of i and the arguments.

    Raises `UserError` for a sample that is longer than a row.
    """

    def __init__(self, samples: Sequence[Sample], name: str, length: int, seed: int, padded: bool = False):
        self._samples = samples
        self._length = length
        self._shared = SharedRows([len(sample.tokens) for sample in samples], name, length, seed, padded)

    @property
    def windows(self) -> int:
        """Rows of an epoch."""
        return self._shared.windows

    @property
    def fill(self) -> float:
        """The share of the rows' places that hold a sample's token."""
        return self._shared.fill

    def __getitem__(self, index: int) -> Batch:
        """Row `index`, counted through all epochs: a `Batch` without its first axis."""
        return row([self._samples[i] for i in self._shared[index]], self._length)


def row(samples: Sequence[Sample], length: int) -> Batch:
    """Samples one after the other, then padding: a `Batch` without its first axis."""
    batch = Batch(*(np.zeros(length, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    start = 0
    for number, sample in enumerate(samples, start=1):
        stop = start + len(sample.tokens)
        batch.tokens[start:stop] = sample.tokens
        batch.targets[start : stop - 1] = sample.labels[1:]
        batch.loss_weights[start : stop - 1] = sample.weights[1:]
        batch.segment_ids[start:stop] = number
        batch.positions[start:stop] = np.arange(stop - start)
        start = stop
    return batch


class PackedSamples:
    """Batches for a run: row g of the run is the g-th of an endless sequence, and step s takes rows [s*B, (s+1)*B).

    Without `weights` all sources are one, and every sample is drawn once in `rows_per_epoch` consecutive rows. With
    them, each source is packed on its own, a row comes from a source in proportion to its weight, and every sample of
    a source is drawn once before any of it is drawn again. `padded` puts one sample into a row.

    Raises `UserError` for a weight of an unknown source, a sample longer than a row, or fewer rows than a batch has.
    """

    def __init__(
        self,
        samples_by_source: Mapping[str, Sequence[Sample]],
        weights: Mapping[str, float],
        sequence_length: int,
        batch_size: int,
        seed: int,
        padded: bool = False,
    ):
        self._batch_size = batch_size
        sources = mixture.pools(samples_by_source, weights, "ChatDataConfig")
        packed = {name: PackedRows(pool, name, sequence_length, seed, padded) for name, pool in sources.items()}
        self.rows_per_epoch = sum(rows.windows for rows in packed.values())
        require(
            self.rows_per_epoch >= batch_size,
            f"the conversations fill {self.rows_per_epoch:,} rows of {sequence_length:,} tokens, fewer than a batch of "
            f"{batch_size:,}: lower ChatDataConfig.batch_size or sequence_length, or add conversations",
        )
        total = sum(weights[name] for name in packed) if weights else 1.0
        shares = {name: weights[name] / total if weights else 1.0 for name in packed}
        self.fill = sum(share * packed[name].fill for name, share in shares.items())  # of places, with tokens
        self._rows = mixture.mix(packed, shares)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row of an epoch has been drawn."""
        return -(-self.rows_per_epoch // self._batch_size)

    def batch(self, step: int) -> Batch:
        """The global batch of a step, [B,T]."""
        return self._rows.batch(self._batch_size)[step]

    def train_batches(
        self, *, start_step: int = 0, process_index: int = 0, process_count: int = 1, prefetch: int = 8
    ) -> Iterator[Batch]:
        """This process's rows, [B/process_count,T], of the global batches from `start_step` on, without end.

        `prefetch` batches are prepared ahead in background threads. Raises `UserError` for a batch size that the
        processes do not divide.
        """
        return loader.batches_of_process(
            self._rows,
            self._batch_size,
            start_step=start_step,
            process_index=process_index,
            process_count=process_count,
            prefetch=prefetch,
        )


def heldout_batches(
    samples: Sequence[Sample],
    sequence_length: int,
    batch_size: int,
    *,
    max_batches: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's rows of at most `max_batches` batches with every sample once, always in the same order.

    Rows beyond the last have zero weight, so every process sees as many batches.
    """
    rows = loader.rows_of_process(batch_size, process_index, process_count)
    packed = PackedRows(samples, "heldout", sequence_length, seed=0)
    batches = min(max_batches, -(-packed.windows // batch_size))
    return (loader.stack(packed, batch * batch_size + process_index * rows, rows) for batch in range(batches))
