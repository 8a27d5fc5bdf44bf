"""Conversations as token ids: the formats of LLaMA-2, Baichuan-2 and Qwen, and the template that a file brings along.

A template turns messages into segments: ids, whose they are, and whether a model learns to write them. Control tokens
are placed by id, and what people write is encoded as plain text, so no message can pass for a control token.
"""

import abc
import dataclasses
import itertools
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from llm_jax.config import SamplingConfig
from llm_jax.errors import UserError, require
from llm_jax.tokenization import template_sandbox
from llm_jax.tokenization.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
NONCHARACTERS = range(0xFDD0, 0xFDF0)  # no text has them; Unicode keeps them for uses such as this
TEMPLATES = ("auto", "llama2", "baichuan2", "chatml", "file")
UNTRAINABLE = "the file's chat template {}, so nobody can tell what a model is to write: name another template"


@dataclasses.dataclass(frozen=True)
class Message:
    """What somebody says."""

    role: str  # one of ROLES
    content: str

    def __post_init__(self) -> None:
        require(self.role in ROLES, f"a message's role is {self.role!r}; it must be one of {', '.join(ROLES)}")
        require(isinstance(self.content, str), f"a message's content must be text, got {self.content!r}")


class Segment(NamedTuple):
    """A run of tokens in a conversation."""

    ids: list[int]
    role: str  # whose message it belongs to
    supervised: bool  # whether the model is the one to write it: a reply and the token that ends it
    labels: tuple[int, ...] = ()  # what the model is to write in place of the ids; () = the ids


class ChatTemplate(abc.ABC):
    """A format of conversations over a tokenizer."""

    name: str
    tokenizer: Tokenizer
    sampling = SamplingConfig(temperature=0.6, top_p=0.9)  # ours, where no report says how its model is sampled

    @property
    @abc.abstractmethod
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply."""

    @abc.abstractmethod
    def segments(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Segment]:
        """A conversation in order.

        Args:
            messages: perhaps a system message, then the user and the assistant in turn.
            add_generation_prompt: end with what a reply comes after; the last message must then be the user's.

        Raises:
            UserError: the messages are not in that order, or the format has no room for what one of them says.
        """

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation; see `segments`."""
        return [token for segment in self.segments(messages, add_generation_prompt) for token in segment.ids]

    def reply_text(self, ids: Iterable[int]) -> str:
        """What generated ids say, without the tokens that end a reply and ids of a vocabulary padded beyond ours."""
        size, stop = self.tokenizer.vocab_size, self.stop_ids
        return self.tokenizer.decode([token for token in ids if token < size and token not in stop])


@dataclasses.dataclass(frozen=True)
class Llama2(ChatTemplate):
    """LLaMA-2's: every round between bos and eos, its marks plain text, the system's words in the first body."""

    tokenizer: Tokenizer
    name = "llama2"
    marks = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def __post_init__(self) -> None:
        require(
            self.tokenizer.bos_id >= 0 and self.tokenizer.eos_id >= 0,
            "the llama2 chat format needs a tokenizer with bos and eos tokens: name another chat template",
        )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_id,)

    def segments(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Segment]:
        system, rounds = split_rounds(messages, add_generation_prompt)
        self._refuse_marks(messages)
        segments = []
        for i, (user, *reply) in enumerate(rounds):
            instruction = f"<<SYS>>\n{system.content}\n<</SYS>>\n\n" if system and i == 0 else ""
            body = f"[INST] {(instruction + user.content).strip()} [/INST]"
            segments.append(Segment([self.tokenizer.bos_id, *self.tokenizer.encode(body)], "user", False))
            for message in reply:
                words = encode_inside(self.tokenizer, f" {message.content.strip()} ")
                segments.append(Segment([*words, self.tokenizer.eos_id], "assistant", True))
        return segments

    def _refuse_marks(self, messages: Sequence[Message]) -> None:
        """The marks are plain text, so a user who writes them could pass for the system: Meta's code refuses, too."""
        for i, message in enumerate(messages):
            found = [mark for mark in self.marks if mark in message.content and message.role != "assistant"]
            require(not found, f"message {i + 1} holds {''.join(found[:1])}, which the llama2 chat format reserves")


@dataclasses.dataclass(frozen=True)
class Baichuan2(ChatTemplate):
    """Baichuan-2's: the system's words, then a marker before every message and nothing after it; no bos.

    What ends a reply is the next user's marker, or eos after the last one. In training, eos is the label in both
    places, so that a model learns to end its replies with it.
    """

    tokenizer: Tokenizer
    user_id: int = 195
    assistant_id: int = 196
    name = "baichuan2"
    sampling = SamplingConfig(temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05)

    def __post_init__(self) -> None:
        require(
            self.tokenizer.eos_id >= 0,
            "the baichuan2 chat format needs a tokenizer with an eos token: name another chat template",
        )
        for token in (self.user_id, self.assistant_id):
            surface = self.tokenizer.decode_bytes([token]) if token < self.tokenizer.vocab_size else b"?"
            require(
                not surface or surface.startswith(b"<reserved_"),
                f"the baichuan2 chat format uses id {token} as a marker, which is not reserved in this tokenizer: name "
                "another chat template, such as llama2",
            )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_id, self.user_id, self.assistant_id)

    def segments(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Segment]:
        system, rounds = split_rounds(messages, add_generation_prompt)
        segments = [Segment(self.tokenizer.encode(system.content), "system", False)] if system else []
        end = self.tokenizer.eos_id
        for i, (user, *reply) in enumerate(rounds):
            segments.append(Segment([self.user_id], "user", i > 0, (end,) if i > 0 else ()))
            segments.append(Segment(self.tokenizer.encode(user.content), "user", False))
            if reply or add_generation_prompt:
                segments.append(Segment([self.assistant_id], "assistant", False))
            segments += [Segment(self.tokenizer.encode(message.content), "assistant", True) for message in reply]
        return [*segments, *([Segment([end], "assistant", True)] if len(rounds[-1]) > 1 else [])]


@dataclasses.dataclass(frozen=True)
class ChatML(ChatTemplate):
    """Qwen's: every message between <|im_start|> with its role and <|im_end|>; a system message is never missing.

    The report trains on replies and the <|im_end|> after them (Qwen, section 3.1). With `marks_supervised`, as in the
    fine-tuning code published with the models (finetune.py), the loss is also on every message's <|im_start|>, its
    <|im_end|> and the line break after it, whoever speaks; on neither role names nor other people's words.
    """

    tokenizer: Tokenizer
    marks_supervised: bool = False
    name = "chatml"
    default_system = "You are a helpful assistant."
    sampling = SamplingConfig(top_p=0.8)

    def __post_init__(self) -> None:
        for text in ("<|im_start|>", "<|im_end|>"):
            require(
                text in self.tokenizer.special_ids,
                f"the chatml chat format needs a tokenizer with {text}: name another chat template, such as llama2",
            )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        end_of_text = (self.tokenizer.eos_id,) if self.tokenizer.eos_id not in (-1, self._end) else ()
        return (self._end, self._start, *end_of_text)

    def segments(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Segment]:
        system, rounds = split_rounds(messages, add_generation_prompt)
        system = system or Message("system", self.default_system)
        newline = encode_inside(self.tokenizer, "\n")
        marks = self.marks_supervised
        segments = []
        for message in (system, *(message for one_round in rounds for message in one_round)):
            role, words = message.role, encode_inside(self.tokenizer, message.content)
            segments += [*self._header(role, newline), Segment(words, role, role == "assistant")]
            segments.append(Segment([self._end], role, role == "assistant" or marks))
            segments.append(Segment(newline, role, marks))
        return [*segments, *(self._header("assistant", newline) if add_generation_prompt else [])]

    def _header(self, role: str, newline: list[int]) -> list[Segment]:
        name = [*encode_inside(self.tokenizer, role), *newline]
        return [Segment([self._start], role, self.marks_supervised), Segment(name, role, False)]

    @property
    def _start(self) -> int:
        return self.tokenizer.special_ids["<|im_start|>"]

    @property
    def _end(self) -> int:
        return self.tokenizer.special_ids["<|im_end|>"]


@dataclasses.dataclass(frozen=True)
class JinjaTemplate(ChatTemplate):
    """The template in a checkpoint's own files, rendered in a sandbox.

    Control tokens are found in the rendered text, where the template writes them by name. Where a message holds such
    a name, a mark inside keeps it apart until the text is cut. A template that changes messages in a way that depends
    on the mark is refused, as nobody could tell then which tokens are its own. So is one that writes more control
    tokens than it does for meaningless messages of the same shape: it has made a name out of what somebody wrote.

    To train on, a reply is what the template adds to the ids after which a model is asked for it, up to the first token
    that would have stopped the model.
    """

    tokenizer: Tokenizer
    source: str
    name = "file"

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The end of text, and the control token that the template puts after a reply."""
        found = [self.tokenizer.eos_id] if self.tokenizer.eos_id >= 0 else []
        probe = "0a1b2c"
        text = self._render([Message("user", "hi"), Message("assistant", probe)], False)
        _, named, after = text.partition(probe)
        control = self._control.match(after.lstrip()) if named else None
        return tuple(dict.fromkeys([*found, *([self.tokenizer.special_ids[control[0]]] if control else [])]))

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation; see `segments`, which refuses more: a format may be good to talk in only."""
        return self._checked(messages, add_generation_prompt, time.time())

    def segments(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Segment]:
        """A conversation in order; whatever is not a reply has no role, as the template does not say whose it is.

        Raises `UserError` also where replies cannot be told apart: the template writes a conversation in another way
        once a reply is in it, ends a reply with no token, or writes replies that depend on what others say.
        """
        split_rounds(messages, add_generation_prompt)
        now = time.time()
        ids = self._checked(messages, add_generation_prompt, now)
        spans = self._replies(messages, ids, now)
        neutral = [m if m.role == "assistant" else self._without_words(m) for m in messages]
        others = self._ids(neutral, add_generation_prompt, now)
        same = [others[i:j] for i, j in self._replies(neutral, others, now)] == [ids[i:j] for i, j in spans]
        require(same, UNTRAINABLE.format("writes replies in a way that depends on what others say"))
        edges = [0, *(edge for span in spans for edge in span), len(ids)]
        runs = [ids[first:last] for first, last in itertools.pairwise(edges)]
        return [Segment(run, "assistant" if i % 2 else "", i % 2 == 1) for i, run in enumerate(runs)]

    def _replies(self, messages: Sequence[Message], ids: list[int], now: float) -> list[tuple[int, int]]:
        """Where in a conversation's ids its replies begin and end."""
        spans = []
        for i, message in enumerate(messages):
            if message.role == "assistant":
                prompt = self._ids(messages[:i], True, now)
                replied = self._ids(messages[: i + 1], False, now) if i + 1 < len(messages) else ids
                kept = ids[: len(replied)] == replied and replied[: len(prompt)] == prompt
                require(kept, UNTRAINABLE.format("writes a conversation in another way once there is a reply"))
                ends = (j for j in range(len(prompt), len(replied)) if replied[j] in self.stop_ids)
                end = next(ends, -1)
                require(end >= 0, UNTRAINABLE.format("ends a reply with no token that would stop a model"))
                spans.append((len(prompt), end + 1))
        return spans

    def _checked(self, messages: Sequence[Message], add_generation_prompt: bool, now: float) -> list[int]:
        """The ids, unless somebody's words have become control tokens."""
        text, mark = self._marked(messages, add_generation_prompt, now)
        self._refuse_made_names(text, messages, add_generation_prompt, now)
        return self._split(text, mark)

    def _ids(self, messages: Sequence[Message], add_generation_prompt: bool, now: float) -> list[int]:
        """The ids, of messages that are part of what was checked."""
        return self._split(*self._marked(messages, add_generation_prompt, now))

    def _split(self, text: str, mark: str) -> list[int]:
        """The ids of a rendered text, whose control tokens are by id."""
        ids = []
        for i, run in enumerate(self._control.split(text)):
            ids += [self.tokenizer.special_ids[run]] if i % 2 else self.tokenizer.encode(run.replace(mark, ""))
        return ids

    def _marked(self, messages: Sequence[Message], add_generation_prompt: bool, now: float) -> tuple[str, str]:
        """The rendered conversation, and the mark in it that keeps what people write from being a control token."""
        spoken = "".join(message.content for message in messages)
        mark = next((chr(code) for code in NONCHARACTERS if chr(code) not in spoken), "")
        require(bool(mark), "the conversation is no text: it holds every noncharacter of Unicode")
        plain = self._render(messages, add_generation_prompt, now)
        kept = [dataclasses.replace(m, content=self._keep_apart(m.content, mark)) for m in messages]
        if kept == list(messages):
            return plain, mark
        marked = self._render(kept, add_generation_prompt, now)
        require(
            marked.replace(mark, "") == plain,
            "a message holds the name of a control token in a place where the file's chat template looks for it: "
            "rephrase the message or name another template",
        )
        return marked, mark

    def _refuse_made_names(
        self, text: str, messages: Sequence[Message], add_generation_prompt: bool, now: float
    ) -> None:
        """Refuse a text with more control tokens than it has where a letter that no name has replaces what is written.

        First all of it, then only the punctuation: a template may leave out a message because of its words.
        """
        for replaced in (r"\S", r"[^\w\s]|_"):
            neutral = [self._without_words(message, replaced) for message in messages]
            meant = Counter(self._control.findall(self._render(neutral, add_generation_prompt, now)))
            for name in Counter(self._control.findall(text)) - meant:
                raise UserError(
                    f"the file's chat template makes the control token {name} out of what a message says: "
                    "rephrase the message or name another template"
                )

    def _without_words(self, message: Message, replaced: str = r"\S") -> Message:
        """The message with a letter that no control token has in place of whatever matches."""
        return dataclasses.replace(message, content=re.sub(replaced, self._letter, message.content))

    @cached_property
    def _letter(self) -> str:
        names = "".join(self.tokenizer.special_ids)
        return next(chr(code) for code in itertools.count(0x4E00) if chr(code) not in names)

    def _keep_apart(self, content: str, mark: str) -> str:
        """The content with a mark inside whatever is a control token's name, or at its end begins one."""
        names = tuple(self.tokenizer.special_ids)

        def marked(first: re.Match[str]) -> str:
            tail = content[first.start() :].rstrip()
            return first[0] + mark * any(tail.startswith(name) or name.startswith(tail) for name in names)

        return (
            re.sub("[" + re.escape("".join({name[0] for name in names})) + "]", marked, content) if names else content
        )

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Any control token's name, the longest first, as a group."""
        names = sorted(self.tokenizer.special_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, now: float | None = None) -> str:
        names = {token: name for name, token in self.tokenizer.special_ids.items()}
        variables = {
            "messages": [dataclasses.asdict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": names.get(self.tokenizer.bos_id, ""),
            "eos_token": names.get(self.tokenizer.eos_id, ""),
            "pad_token": names.get(self.tokenizer.pad_id, ""),
        }
        return template_sandbox.render(self.source, variables, now)


def split_rounds(
    messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[Message | None, list[tuple[Message, ...]]]:
    """The system message, if there is one, and rounds of a user's message and the reply to it.

    Raises `UserError` where the messages are in another order, or the last one is not the user's though a reply to it
    is to be generated.
    """
    system = messages[0] if messages and messages[0].role == "system" else None
    spoken = messages[1:] if system else messages
    require(bool(spoken), "the conversation has no message of the user's")
    for i, message in enumerate(spoken):
        wanted = ROLES[1 + i % 2]
        place = f"message {i + 1 + (system is not None)} is the {message.role}'s"
        require(message.role == wanted, f"{place}, where the {wanted}'s must come: the two take turns")
    require(
        not add_generation_prompt or spoken[-1].role == "user",
        "the last message is the assistant's: there is nothing to reply to",
    )
    return system, [tuple(spoken[i : i + 2]) for i in range(0, len(spoken), 2)]


def fit(template: ChatTemplate, messages: Sequence[Message], max_tokens: int) -> list[Message]:
    """The messages without the oldest rounds that do not fit into `max_tokens`; the system message stays.

    Raises `UserError` where the last message alone is too long, and what `segments` does.
    """
    system, rounds = split_rounds(messages, add_generation_prompt=True)
    for first in range(len(rounds)):
        kept = [*([system] if system else []), *(message for one_round in rounds[first:] for message in one_round)]
        tokens = len(template.encode(kept))
        if tokens <= max_tokens:
            return kept
    raise UserError(f"the last message needs {tokens} tokens, and there is room for {max_tokens}: shorten it")


def choose(name: str, tokenizer: Tokenizer, own_template: str = "") -> ChatTemplate:
    """A template by its name in TEMPLATES.

    Args:
        name: "file" is the checkpoint's own; "auto" is that one, or chatml where the tokenizer has its tokens.
        tokenizer: what to encode with.
        own_template: the Jinja template in the checkpoint's files; "" = it has none.

    Raises:
        UserError: there is no such template, the tokenizer lacks what it needs, or "auto" finds none.
    """
    require(name in TEMPLATES, f"unknown chat template {name!r}; it must be one of {', '.join(TEMPLATES)}")
    if name == "auto":
        name = "file" if own_template else "chatml" if "<|im_start|>" in tokenizer.special_ids else ""
        require(bool(name), "this model does not say how it is talked to: name a chat template, llama2 or baichuan2")
    if name == "file":
        require(bool(own_template), "this model's files hold no chat template: name one, llama2, baichuan2 or chatml")
        return JinjaTemplate(tokenizer, own_template)
    return {"llama2": Llama2, "baichuan2": Baichuan2, "chatml": ChatML}[name](tokenizer)


def encode_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in the middle of a line: without the space that some tokenizers put before every text."""
    adds_space = tokenizer.decode_bytes(tokenizer.encode("x") * 2) == b"x x"
    for before in ("\n", "x", ".", "0") if adds_space else ():
        head = tokenizer.encode(before)
        whole = tokenizer.encode(before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return tokenizer.encode(text)
