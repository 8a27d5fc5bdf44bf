"""Preferences: pairs of responses to one prompt, one of them preferred, by how much, and what is known about both.

A record of a file is a JSON object with the fields FIELDS. `prompt` is a text or a list of messages; without it,
`chosen` and `rejected` are two plain texts, or two whole dialogues that differ in the last reply (HH-RLHF's
transcripts, or lists of messages). How strong a preference is, `strength` says, or two ratings, of which
`PreferenceConfig` makes one.
"""

import dataclasses
import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.alignment.config import PreferenceConfig
from llm_jax.alignment.conversations import SPEAKER, BadRecordError, Tally, parse, read_each
from llm_jax.config import one_of
from llm_jax.data.documents import HASH_RANGE, text_hash
from llm_jax.data.packing import permutation
from llm_jax.errors import require
from llm_jax.files import write_lines
from llm_jax.tokenization.chat import Message

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "strength",
    "chosen_rating",
    "rejected_rating",
    "chosen_safe",
    "rejected_safe",
    "category",
    "source",
)
MOST_STEPS = 5
DEFAULT = PreferenceConfig()


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses, of which people prefer the chosen one; `BadRecordError` where that makes no sense."""

    prompt: tuple[Message, ...]  # ends with the user's message; () = two plain texts
    chosen: str
    rejected: str
    strength: int = 1  # steps of preference: 1 negligibly or unsure .. 4 (or 5) significantly
    chosen_safe: bool | None = None  # None = nobody said
    rejected_safe: bool | None = None
    category: str = ""  # a class of the prompt, tiers parted by "/"
    source: str = ""
    record: str = ""  # where it was read, for messages to people: "file.jsonl:12"

    def __post_init__(self) -> None:
        _check(bool(self.chosen.strip() and self.rejected.strip()), "empty response")
        _check(self.chosen.strip() != self.rejected.strip(), "equal responses", repr(self.chosen[:30]))
        _check(1 <= self.strength <= MOST_STEPS, "strength out of range", f"{self.strength} is not in 1..{MOST_STEPS}")
        _check(not self.prompt or self.prompt[-1].role == "user", "prompt that does not end with the user")


class Split(NamedTuple):
    """The two sides of a set of pairs, and how many pairs would have stood on both."""

    train: list[Pair]
    heldout: list[Pair]
    dropped: int


def read(path: str | Path, config: PreferenceConfig = DEFAULT) -> tuple[list[Pair], Tally]:
    """All pairs of a file or a folder, in the files' order, and what was left out.

    Args:
        path: a .jsonl, .jsonl.gz or .json file (an array of records), or a folder with such files in it. Records that
            do not name their source have the file's name.
        config: how strengths and ratings count.

    Raises:
        UserError: there is nothing to read, a file is damaged, or no pair is left.
    """

    def pair(value: Any, source: str, record: str) -> Pair:
        made = parse_pair(value, config)
        return dataclasses.replace(made, source=made.source or source, record=record)

    return read_each(path, pair, "pair")


def write(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as JSON Lines that `read` gives back, all but their `record`; atomically."""
    records = map(dataclasses.asdict, pairs)
    write_lines(Path(path), ({name: each[name] for name in each if name != "record"} for each in records))


def parse_pair(record: Any, config: PreferenceConfig) -> Pair:
    """The pair in one record.

    Raises `BadRecordError` for unknown fields, a prompt without a response, dialogues that differ before the last
    reply, equal responses, and strengths or ratings out of range or too close to each other.
    """
    _check(isinstance(record, Mapping), "not a JSON object", type(record).__name__)
    _check_fields(record, config)
    prompt, chosen, rejected = _responses(record)
    return Pair(
        prompt,
        chosen,
        rejected,
        _strength(record, config),
        chosen_safe=_optional(record, "chosen_safe", bool),
        rejected_safe=_optional(record, "rejected_safe", bool),
        category=_optional(record, "category", str) or "",
        source=_optional(record, "source", str) or "",
    )


def strength_of(gap: float, config: PreferenceConfig) -> int:
    """The steps of preference that a gap between two ratings means: one more from each of `strength_gaps` on."""
    return 1 + sum(gap >= edge for edge in config.strength_gaps)


def split(pairs: Iterable[Pair], fraction: float) -> Split:
    """Hold out about `fraction` of the prompts with all of their pairs, by a hash that depends on no other record.

    Dialogues are held apart by their first user message, as conversations for fine-tuning are, so no opening is on
    both sides. Plain texts are held apart by themselves: a pair of one text of each side is dropped.
    """
    require(0 <= fraction < 1, f"the held-out fraction must be in [0, 1), got {fraction}")
    train: list[Pair] = []
    heldout: list[Pair] = []
    dropped = 0
    for pair in pairs:
        sides = {is_held_out(text, fraction) for text in _keys(pair)}
        if len(sides) > 1:
            dropped += 1
        else:
            (heldout if sides.pop() else train).append(pair)
    return Split(train, heldout, dropped)


def of_categories(pairs: Sequence[Pair], categories: Sequence[str]) -> list[Pair]:
    """The pairs of these categories; () = all. Raises `UserError` for one that no pair has."""
    present = tuple(sorted({pair.category for pair in pairs}))
    for name in categories:
        one_of("PreferenceConfig.categories", name, present)
    return [pair for pair in pairs if not categories or pair.category in categories]


def draw(pairs: Sequence[Pair], limit: int, seed: int) -> list[Pair]:
    """`limit` of the pairs in their order, drawn by `seed`, fewer being a part of more; 0 = all.

    Raises `UserError` where there are not as many.
    """
    require(limit <= len(pairs), f"data.limit={limit:,}: there are only {len(pairs):,} training pairs")
    return [pairs[i] for i in sorted(permutation(len(pairs), seed)[: limit or None])]


def is_held_out(text: str, fraction: float) -> bool:
    """The side of a text, by its hash."""
    return text_hash(text) < fraction * HASH_RANGE


def counts(pairs: Iterable[Pair]) -> dict[str, Counter[str]]:
    """How many pairs there are by source, category, strength, and what is known of the responses' safety."""
    found: dict[str, Counter[str]] = {name: Counter() for name in ("source", "category", "strength", "safety")}
    words = {True: "safe", False: "unsafe", None: "unknown"}
    for pair in pairs:
        found["source"][pair.source] += 1
        found["category"][pair.category] += 1
        found["strength"][str(pair.strength)] += 1
        found["safety"][f"{words[pair.chosen_safe]} over {words[pair.rejected_safe]}"] += 1
    return found


def _keys(pair: Pair) -> Iterator[str]:
    if pair.prompt:
        yield next(message.content for message in pair.prompt if message.role == "user")
    else:
        yield from (pair.chosen, pair.rejected)


def _check_fields(record: Mapping[str, Any], config: PreferenceConfig) -> None:
    """A misspelt field would be a lost one, so what is not known must be named to be ignored."""
    for field in record:
        if field not in FIELDS and field not in config.ignored_fields:
            near = difflib.get_close_matches(field, FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name it in PreferenceConfig.ignored_fields to ignore it"
            raise BadRecordError(f"unknown field {field!r}", hint)
    for field in ("chosen", "rejected"):
        _check(record.get(field) is not None, f"no field {field!r}", f"only {', '.join(record)}")


def _responses(record: Mapping[str, Any]) -> tuple[tuple[Message, ...], str, str]:
    """The prompt that both responses have, and the two."""
    chosen, rejected = record["chosen"], record["rejected"]
    prompt = record.get("prompt")
    if prompt is None and _is_dialogue(chosen) and _is_dialogue(rejected):
        *before, reply = _dialogue(chosen)
        *other, other_reply = _dialogue(rejected)
        _check(before == other, "dialogues that differ before the last reply")
        return tuple(before), reply.content, other_reply.content
    replies = _reply(chosen), _reply(rejected)
    if not prompt:
        return (), *replies
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    _check(isinstance(messages, list), "prompt that is neither text nor messages", type(prompt).__name__)
    # Checked as the conversations that the two make.
    ends = [_dialogue([*messages, {"role": "assistant", "content": reply}]) for reply in replies]
    return tuple(ends[0][:-1]), ends[0][-1].content, ends[1][-1].content


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and SPEAKER.match(value) is not None)


def _dialogue(value: list[Any] | str) -> tuple[Message, ...]:
    """The messages of a dialogue that ends with the assistant's reply."""
    messages = parse({"chosen": value}, "hh_rlhf") if isinstance(value, str) else parse({"messages": value}, "messages")
    _check(messages[-1].role == "assistant", "dialogue that does not end with a reply", messages[-1].content[:30])
    return messages


def _reply(value: Any) -> str:
    """A response, which some sets write as a list of one message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")
    _check(isinstance(value, str), "response that is no text", type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecordError("response that is no text", "a lone surrogate") from None
    return value


def _strength(record: Mapping[str, Any], config: PreferenceConfig) -> int:
    ratings = [_optional(record, field, float, int) for field in ("chosen_rating", "rejected_rating")]
    step = _optional(record, "strength", int)
    if ratings == [None, None]:
        return _scaled(1 if step is None else step, config)
    _check(step is None, "both a strength and ratings")
    _check(None not in ratings, "only one of two ratings")
    low, high = config.rating_range
    for rating in ratings:
        _check(low <= rating <= high, "rating out of range", f"{rating} is not in [{low}, {high}]")
    gap = ratings[0] - ratings[1]
    _check(gap > 0, "chosen rated no higher than rejected", f"{ratings[0]} and {ratings[1]}")
    _check(gap >= config.minimum_gap, "ratings too close", f"{ratings[0]} and {ratings[1]}")
    return strength_of(gap, config)


def _scaled(step: int, config: PreferenceConfig) -> int:
    """A step of the records' own scale as one of ours."""
    if not config.strength_scale:
        return step
    _check(1 <= step <= len(config.strength_scale), "strength out of range", f"{step}")
    return config.strength_scale[step - 1]


def _optional(record: Mapping[str, Any], field: str, *types: type) -> Any:
    value = record.get(field)
    kind = " or ".join(kind.__name__ for kind in types)
    _check(value is None or type(value) in types, f"field {field!r} that is no {kind}", repr(value)[:30])
    return value


def _check(condition: bool, reason: str, detail: str = "") -> None:
    if not condition:
        raise BadRecordError(reason, detail)
