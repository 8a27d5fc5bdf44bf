"""What a policy is asked: prompts out of files as token ids, and which of them an iteration takes.

A record is {"prompt": text or messages}, or a conversation in any format of `conversations`, of which a last reply is
cut off. It may have an "answer" (by default the reply cut off), for rewards that compare, and "unsafe": true.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.alignment import conversations
from llm_jax.alignment.conversations import BadRecordError, Tally
from llm_jax.alignment.policy_config import PromptDataConfig
from llm_jax.alignment.sft import REFUSED
from llm_jax.data.loader import rows_of_process
from llm_jax.data.packing import permutation
from llm_jax.errors import UserError, require
from llm_jax.tokenization import chat
from llm_jax.tokenization.chat import ChatTemplate, Message
from llm_jax.tokenization.tokenizer import Tokenizer

TOO_LONG = "prompt longer than PromptDataConfig.max_tokens"
NOT_PLAIN = "several messages, which no plain text is"


class Prompt(NamedTuple):
    """What is asked, and what is known about it."""

    messages: tuple[Message, ...]  # the last is the user's; a plain text is one message
    tokens: tuple[int, ...]  # with what a reply comes after
    unsafe: bool = False  # tagged as one that may draw unsafe responses
    answer: str = ""  # what would be right, where something is
    record: str = ""  # where it was read: "file.jsonl:12"


class PromptData(NamedTuple):
    """Prompts to train on and held-out ones, and what befell the records that are not among them."""

    train: list[Prompt]
    heldout: list[Prompt]
    tally: Tally


def choose_template(config: PromptDataConfig, tokenizer: Tokenizer, own_template: str = "") -> ChatTemplate | None:
    """How the model is talked to, None for plain text; see `tokenization.chat.choose`, also for what is raised."""
    return None if config.template == "none" else chat.choose(config.template, tokenizer, own_template)


def load(config: PromptDataConfig, tokenizer: Tokenizer, template: ChatTemplate | None) -> PromptData:
    """Read, tokenise and split `config.path`.

    Args:
        config: what to read.
        tokenizer: of the model.
        template: how it is talked to; None = a prompt is the beginning of a text.

    Raises:
        UserError: there is nothing to read, or no prompt is left to train on.
    """
    require(config.path != "", "PromptDataConfig.path is not set: name a file or folder of prompts")
    read = functools.partial(parse, format=config.format)
    found, tally = conversations.read_each(config.path, read, "prompt")
    kept = tokenize_all(found, tokenizer, template, config.max_tokens, tally)
    data = PromptData(*conversations.split(kept, config.holdout_fraction), tally)
    require(bool(data.train), f"{config.path} has no prompt to train on: {str(tally) or 'all are held out'}")
    return data


def parse(record: Any, source: str, place: str, format: str = "auto") -> Prompt:
    """The prompt of a record's JSON value, without tokens; `BadRecordError` where there is none. `source` is not kept.

    Args:
        record: the value.
        source: its file.
        place: where it is, "file.jsonl:12".
        format: one of `policy_config.PROMPT_FORMATS`.
    """
    del source
    fields = record if isinstance(record, Mapping) else {}
    answer, unsafe = fields.get("answer"), fields.get("unsafe", False)
    if not isinstance(answer, str | None):
        raise BadRecordError("answer that is no text", repr(answer)[:30])
    if not isinstance(unsafe, bool):
        raise BadRecordError("unsafe that is neither true nor false", repr(unsafe)[:30])
    if format == "prompt" or (format == "auto" and fields.get("prompt") is not None):
        asked = fields.get("prompt")
        listed = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        record, format = {"messages": listed, "system": fields.get("system")}, "messages"
    messages = conversations.parse(record, format, needs_reply=False)
    if messages[-1].role == "assistant":
        answer = messages[-1].content if answer is None else answer
        messages = messages[:-1]
    return Prompt(messages, (), unsafe, answer or "", place)


def tokenize_all(
    prompts: Iterable[Prompt], tokenizer: Tokenizer, template: ChatTemplate | None, max_tokens: int, tally: Tally
) -> list[Prompt]:
    """The prompts with their tokens; `tally` counts those that are left out."""
    kept = []
    for prompt in prompts:
        try:
            tokens = encode(prompt.messages, tokenizer, template)
            if len(tokens) > max_tokens:
                raise BadRecordError(TOO_LONG, f"{len(tokens):,} tokens for {max_tokens:,}")
        except BadRecordError as error:
            tally.add(error.reason, prompt.record, error.detail)
            continue
        except UserError as error:
            tally.add(REFUSED, prompt.record, str(error))
            continue
        kept.append(prompt._replace(tokens=tuple(tokens)))
    return kept


def encode(messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """The ids after which a response comes; a plain text follows bos, where there is one, as in training."""
    if template is not None:
        return template.encode(messages)
    if len(messages) != 1:
        raise BadRecordError(NOT_PLAIN, f"{len(messages)} messages")
    start = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    return start + tokenizer.encode(messages[0].content)


def stop_ids(tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[int, ...]:
    """The tokens that end a response."""
    if template is not None:
        return template.stop_ids
    return (tokenizer.eos_id,) if tokenizer.eos_id >= 0 else ()


@dataclasses.dataclass(frozen=True)
class PromptStream:
    """The prompts of each iteration: all of them once, in an order of its own, before any comes again.

    Prompt g of the run is the g-th of an endless sequence, iteration i takes [i*B, (i+1)*B) of it, and each process a
    contiguous part of that. Raises `UserError` where there are none, or the processes do not divide the batch.
    """

    prompts: Sequence[Prompt]
    batch_size: int  # of all processes
    seed: int = 0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        require(len(self.prompts) > 0, "there are no prompts to draw from")
        require(self.batch_size > 0, f"batch_size={self.batch_size} must be positive")
        self._count()

    def _count(self) -> int:
        return rows_of_process(self.batch_size, self.process_index, self.process_count)

    def batch(self, step: int) -> list[Prompt]:
        """This process's prompts of an iteration: a function of the seed and `step` alone."""
        first = step * self.batch_size + self.process_index * self._count()
        places = [divmod(index, len(self.prompts)) for index in range(first, first + self._count())]
        orders = {epoch: permutation(len(self.prompts), self.seed, epoch) for epoch in {epoch for epoch, _ in places}}
        return [self.prompts[orders[epoch][within]] for epoch, within in places]

    def streams(self, step: int) -> np.ndarray:
        """Numbers for the prompts of `batch(step)`, uint32, different for every prompt of a run."""
        first = step * self.batch_size + self.process_index * self._count()
        return (np.arange(first, first + self._count()) % 2**32).astype(np.uint32)
