"""Conversations out of people's files, in the formats that are common.

messages: {"messages": [{"role", "content"}, ...]}, as OpenAI's. sharegpt: {"conversations": [{"from", "value"}, ...]}.
alpaca: {"instruction", "input", "output"}, perhaps with "system" and earlier rounds in "history". hh_rlhf: {"chosen":
"\n\nHuman: ...\n\nAssistant: ..."}; the rejected text is not read.

A record that cannot be learned from is left out, and a `Tally` says how many there were, why, and which came first.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llm_jax.alignment.config import CHAT_FORMATS
from llm_jax.config import one_of
from llm_jax.data.documents import HASH_RANGE, text_hash
from llm_jax.data.files import jsonl_lines
from llm_jax.errors import UserError, require
from llm_jax.tokenization.chat import ROLES, Message

KINDS = (".jsonl", ".jsonl.gz", ".json")
FIELDS = {"messages": "messages", "sharegpt": "conversations", "alpaca": "instruction", "hh_rlhf": "chosen"}
ROLE_NAMES = {"developer": "system", "human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")
HELD_OUT = "request that is held out"
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
Made = TypeVar("Made")


class HasMessages(Protocol):
    """What holds messages in order, with one of the user's among them."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """In order."""
        ...


Spoken = TypeVar("Spoken", bound=HasMessages)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages in order: perhaps the system's, then the user's and the assistant's in turn."""

    messages: tuple[Message, ...]
    source: str = ""
    record: str = ""  # where it was read, for messages to people: "file.jsonl:12"


@dataclasses.dataclass
class Tally:
    """How often records met with something, by what it was, and the first record of each kind."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, record: str = "", detail: str = "") -> None:
        """Count one record."""
        self.counts[reason] += 1
        self.first.setdefault(reason, " ".join(": ".join(part for part in (record, detail) if part).split()))

    def __iadd__(self, other: "Tally") -> "Tally":
        """Count what another tally has counted, too."""
        self.counts += other.counts
        self.first = other.first | self.first
        return self

    def __str__(self) -> str:
        """One line: "12 unknown role (first data.jsonl:3: 'tool'), 4 empty reply (...)"."""
        parts = (
            f"{count:,} {reason}" + f" (first {self.first[reason]})" * bool(self.first[reason])
            for reason, count in self.counts.most_common()
        )
        return ", ".join(parts)


class BadRecordError(UserError):
    """A record that is left out: the kind of mistake, and what shows it."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def read(path: str | Path, format: str = "auto") -> tuple[list[Conversation], Tally]:
    """All conversations of a file or a folder, in the files' order, and what was left out.

    Args:
        path: a .jsonl, .jsonl.gz or .json file (an array of records), or a folder with such files in it. A file is a
            source of its own, named after it.
        format: one of CHAT_FORMATS; "auto" goes by each record's fields.

    Raises:
        UserError: there is nothing to read, a file is damaged, or no record is left.
    """
    one_of("format", format, CHAT_FORMATS)

    def conversation(value: Any, source: str, record: str) -> Conversation:
        return Conversation(parse(value, format), source, record)

    return read_each(path, conversation, "conversation")


def read_each(path: str | Path, make: Callable[[Any, str, str], Made], what: str) -> tuple[list[Made], Tally]:
    """What `make` makes of each record of a file or a folder, and what was left out because it raised `BadRecordError`.

    Args:
        path: as for `read`.
        make: of a record's JSON value, the name of its source, and where it is, "file.jsonl:12".
        what: it makes, in one word, for messages.

    Raises:
        UserError: there is nothing to read, a file is damaged, or no record is left.
    """
    path = Path(path)
    found, tally = [], Tally()
    for file in _files(path, what):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        source = re.sub(r"\W", "_", re.sub(r"\.jsonl?(\.gz)?$", "", file.name, flags=re.IGNORECASE))
        for number, record in _records(file):
            try:
                value = _json(record) if isinstance(record, bytes) else record
                found.append(make(value, source, f"{name}:{number}"))
            except BadRecordError as error:
                tally.add(error.reason, f"{name}:{number}", error.detail)
    require(bool(found), f"{path} has no {what} to learn from: {str(tally) or 'it is empty'}")
    return found, tally


def parse(record: Any, format: str = "auto", needs_reply: bool = True) -> tuple[Message, ...]:
    """The messages of one record, checked.

    Raises `BadRecordError` where the record has another form than its format, the roles are unknown or out of order, a
    message is empty, or there is no reply where one is needed.
    """
    _check(isinstance(record, Mapping), "not a JSON object", type(record).__name__)
    if format == "auto":
        format = next((name for name, field in FIELDS.items() if record.get(field) is not None), "")
        _check(bool(format), "unknown format", f"fields {list(record)[:5]}")
    field = FIELDS[format]
    _check(field in record, "missing field", field)
    if format == "alpaca":
        turns = list(_alpaca(record))
    elif format == "hh_rlhf":
        turns = list(transcript(record[field]))
    else:
        turns = list(_listed(record[field]))
    if record.get("system"):  # where the list of messages has no place for it
        turns.insert(0, ("system", record["system"]))
    return in_order([_message(role, content) for role, content in turns], needs_reply)


def transcript(text: Any) -> Iterator[tuple[str, str]]:
    """Roles and contents of an HH-RLHF dialogue; `BadRecordError` for anything else."""
    before, *parts = SPEAKER.split(_text(text))
    _check(bool(parts) and not before.strip(), "no dialogue of Human and Assistant", repr(text[:30]))
    for speaker, said in zip(parts[::2], parts[1::2]):
        yield ("user" if speaker == "Human" else "assistant"), said.strip()


def in_order(messages: Sequence[Message], needs_reply: bool = True) -> tuple[Message, ...]:
    """The messages without an empty system message; `BadRecordError` where nobody could learn from or answer them."""
    first = 1 if messages and messages[0].role == "system" else 0
    spoken = messages[first:]
    for before, message in zip((None, *spoken), spoken):
        said = repr(message.content[:30])
        _check(message.role != "system", "system message in the middle", said)
        _check(before is not None or message.role == "user", "the assistant speaks first", said)
        _check(before is None or before.role != message.role, f"two {message.role} turns in a row", said)
        empty = "empty reply" if message.role == "assistant" else "empty user message"
        _check(bool(message.content.strip()), empty)
    _check(len(spoken) > needs_reply, "no reply" if needs_reply else "no message")
    return tuple(messages if first and messages[0].content.strip() else spoken)


def split(conversations: Iterable[Spoken], fraction: float) -> tuple[list[Spoken], list[Spoken]]:
    """(to train on, held out): about `fraction` of the conversations, all that begin with the same request together.

    The side follows from a hash of the first message that the user writes, so it never depends on other records.
    """
    sides: tuple[list[Spoken], list[Spoken]] = ([], [])
    for conversation in conversations:
        sides[text_hash(_first_request(conversation)) < fraction * HASH_RANGE].append(conversation)
    return sides


def without_requests_of(
    conversations: Iterable[Conversation], heldout: Iterable[Conversation], tally: Tally
) -> list[Conversation]:
    """The conversations that begin with no request that a held-out one begins with; `tally` counts the others."""
    asked = {_first_request(conversation) for conversation in heldout}
    kept = []
    for conversation in conversations:
        if _first_request(conversation) in asked:
            tally.add(HELD_OUT, conversation.record)
        else:
            kept.append(conversation)
    return kept


def _first_request(conversation: HasMessages) -> str:
    return next(message.content for message in conversation.messages if message.role == "user")


def _files(path: Path, what: str) -> list[Path]:
    require(path.exists(), f"no file or folder at {path}")
    inside = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    known = [file for file in inside if file.name.lower().endswith(KINDS)]
    require(bool(known), f"{path} holds no {what}s: none of {', '.join(KINDS)}")
    return known


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    """Each record's number from 1, and its JSON value; of JSON Lines, the line as it is."""
    if file.suffix.lower() == ".json":
        try:
            records = _json(file.read_bytes())
        except BadRecordError as error:
            raise UserError(f"{file} is {error}") from None
        require(isinstance(records, list), f"{file} is no JSON array of records: one record a line is .jsonl")
        yield from enumerate(records, start=1)
    else:
        yield from ((number, line) for number, line in enumerate(jsonl_lines(file), start=1) if line.strip())


def _json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadRecordError("not JSON", " ".join(str(error).split())) from None


def _listed(items: Any) -> Iterator[tuple[Any, Any]]:
    _check(isinstance(items, list), "messages that are no list", type(items).__name__)
    for item in items:
        _check(isinstance(item, Mapping), "message that is no JSON object", type(item).__name__)
        # The weight says which replies to learn from: to pass over it would be to train on what somebody left out.
        _check(
            item.get("weight") in (None, 1), "message weights, which are not supported", repr(item.get("weight"))[:30]
        )
        yield item.get("role", item.get("from")), item.get("content", item.get("value"))


def _alpaca(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    history = record.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    _check(pairs, "history that is no list of pairs", repr(history)[:30])
    for pair in history:
        yield from zip(("user", "assistant"), pair)
    request, given = _text(record["instruction"]), _text(record.get("input") or "")
    yield "user", f"{request}\n\n{given}" if given else request
    yield "assistant", record.get("output")


def _message(role: Any, content: Any) -> Message:
    known = ROLE_NAMES.get(role, role) if isinstance(role, str) else None
    _check(known in ROLES, "unknown role", repr(role)[:30])
    return Message(str(known), _text(content))


def _text(content: Any) -> str:
    _check(isinstance(content, str), "content that is no text", repr(content)[:30])
    try:
        content.encode()
    except UnicodeEncodeError:
        raise BadRecordError("content that is no text", "a lone surrogate") from None
    return content


def _check(condition: bool, reason: str, detail: str = "") -> None:
    if not condition:
        raise BadRecordError(reason, detail)
