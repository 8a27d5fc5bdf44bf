"""Self-instruct for tools: a model writes samples of using tools, rules keep the good ones (Qwen, section 3.4).

Samples have the form of ReAct (Yao et al., 2022): a question, a thought, an action with its input, and, once the tool
has been observed, a final answer. From a few seed samples and the tools' schemas a loaded model writes more of them,
each meant for a tool that is named to it. Kept are those that can be parsed, use that tool, give it valid arguments,
and are not said already. Tools are described, never run: observations are the model's own, and the report of the yield
says how many samples each rule took away.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llm_jax.alignment import conversations
from llm_jax.alignment.conversations import BadRecordError, Conversation
from llm_jax.errors import UserError, require
from llm_jax.tokenization.chat import Message

TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}
JSON_NAMES = {str: "string", list: "array", dict: "object"}
FIELDS = ("Question", "Thought", "Action", "Action Input", "Observation", "Final Answer")
STOP = "\nQuestion:"  # the model goes on with another sample
UNPARSABLE, WRONG_TOOL, BAD_ARGUMENTS, DUPLICATE = "not parsable", "another tool", "invalid arguments", "duplicate"
REASONS = (UNPARSABLE, WRONG_TOOL, BAD_ARGUMENTS, DUPLICATE)  # in the order in which the rules look
Made = TypeVar("Made")
Complete = Callable[[Sequence[str]], Sequence[str]]  # beginnings of texts -> what the model writes after them


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool as a model is told of it."""

    name: str
    description: str
    parameters: Mapping[str, str]  # name -> one of TYPES
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in self.parameters.items():
            require(kind in TYPES, f"tool {self.name}: parameter {name!r} is of type {kind!r}, not {', '.join(TYPES)}")
        unknown = sorted(set(self.optional) - set(self.parameters))
        require(not unknown, f"tool {self.name}: optional parameters {unknown} are none of its parameters")

    def __str__(self) -> str:
        """The line that describes it."""
        marks = {name: "?" if name in self.optional else "" for name in self.parameters}
        listed = ", ".join(f"{name}{marks[name]}: {kind}" for name, kind in self.parameters.items())
        return f"{self.name}({listed}): {self.description}"


@dataclasses.dataclass(frozen=True)
class ToolSample:
    """One use of a tool."""

    question: str
    thought: str
    tool: str
    arguments: Mapping[str, Any]
    observation: str
    answer: str

    def __str__(self) -> str:
        """In ReAct's form."""
        arguments = json.dumps(dict(self.arguments), ensure_ascii=False)
        values = (self.question, self.thought, self.tool, arguments, self.observation, self.answer)
        return "\n".join(f"{field}: {value}" for field, value in zip(FIELDS, values))


class Outcome(NamedTuple):
    """What became of a text that a model was to write."""

    tool: str  # that it was to use
    sample: ToolSample | None = None  # where it was kept
    reason: str = ""  # one of REASONS, where it was not
    detail: str = ""


def parse(text: str) -> ToolSample:
    """The sample that a text in ReAct's form begins with; `BadRecordError` where it is none."""
    end = text.find(STOP, text.find(FIELDS[0]) + 1)
    parts = re.split(rf"(?m)^({'|'.join(map(re.escape, FIELDS))}):", text if end < 0 else text[:end])
    names, values = parts[1::2], [part.strip() for part in parts[2::2]]
    if parts[0].strip() or tuple(names) != FIELDS:
        raise BadRecordError(UNPARSABLE, f"fields {', '.join(names) or 'none'}")
    if not all(values):
        raise BadRecordError(UNPARSABLE, f"empty {FIELDS[values.index('')]}")
    question, thought, tool, written, observation, answer = values
    return ToolSample(question, thought, tool, _arguments(written), observation, answer.splitlines()[0])


def call(reply: str) -> tuple[str, dict[str, Any]] | None:
    """The tool that a reply uses, and its arguments; None where it uses none."""
    found = re.search(r"(?ms)^Action:([^\n]*)\n+Action Input:(.*?)(?:\nObservation:|\Z)", reply)
    try:
        return (found[1].strip(), _arguments(found[2])) if found else None
    except BadRecordError:
        return None


def _arguments(written: str) -> dict[str, Any]:
    try:
        arguments = json.loads(written, parse_constant=_refuse_constant)
        json.dumps(arguments, ensure_ascii=False).encode()  # lone surrogates can be escaped, but not written
    except (ValueError, RecursionError) as error:
        raise BadRecordError(UNPARSABLE, f"Action Input is no JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise BadRecordError(UNPARSABLE, "Action Input is no object")
    return arguments


def check(sample: ToolSample, tool: Tool) -> None:
    """Raise `BadRecordError` unless the sample uses this tool, with arguments that it takes."""
    if sample.tool != tool.name:
        raise BadRecordError(WRONG_TOOL, f"{sample.tool!r} for {tool.name!r}")
    for name in tool.parameters:
        if name not in sample.arguments and name not in tool.optional:
            raise BadRecordError(BAD_ARGUMENTS, f"{tool.name} lacks {name!r}")
    for name, value in sample.arguments.items():
        if name not in tool.parameters:
            raise BadRecordError(BAD_ARGUMENTS, f"{tool.name} has no {name!r}")
        kind = tool.parameters[name]
        truth = isinstance(value, bool) and kind != "boolean"  # which Python counts among the integers
        if truth or not isinstance(value, TYPES[kind]):
            raise BadRecordError(BAD_ARGUMENTS, f"{tool.name}: {name} is {value!r}, no {kind}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def read_tools(path: str | Path) -> list[Tool]:
    """The tools in a .jsonl or .json file: {"name", "description", "parameters": {name: type}, "optional": [names]}.

    Raises `UserError` naming the first record that is none.
    """

    def tool(record: Any) -> Tool:
        made = _made(Tool, record, {"optional": []})
        return dataclasses.replace(made, optional=tuple(made.optional))

    return _read(path, tool, "tool")


def read_samples(path: str | Path) -> list[ToolSample]:
    """The samples in a .jsonl or .json file, by the fields of `ToolSample`.

    Raises `UserError` naming the first record that is none.
    """
    return _read(path, lambda record: _made(ToolSample, record, {}), "sample")


def _read(path: str | Path, make: Callable[[Any], Made], what: str) -> list[Made]:
    found, tally = conversations.read_each(path, lambda value, source, record: make(value), what)
    require(not tally.counts, f"{path} holds what is no {what}: {tally}")
    return found


def _made(cls: type[Made], record: Any, defaults: Mapping[str, Any]) -> Made:
    """A dataclass of a record's fields, which must be of the same kinds of JSON values."""
    hints = {"parameters": dict, "arguments": dict, "optional": list}
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object", type(record).__name__)
    values = {**defaults, **record}
    for name in names:
        wanted = hints.get(name, str)
        if name not in values:
            raise BadRecordError("missing field", name)
        if not isinstance(values[name], wanted):
            raise BadRecordError(f"field that is no {JSON_NAMES[wanted]}", f"{name} is {values[name]!r}"[:60])
        if values[name] == "":
            raise BadRecordError("empty field", name)
    unknown = [name for name in values if name not in names]
    if unknown:
        raise BadRecordError("unknown field", unknown[0])
    try:
        return cls(**values)
    except UserError as error:
        raise BadRecordError("refused", str(error)) from None


def prompt(tools: Sequence[Tool], seeds: Sequence[ToolSample], tool: Tool) -> str:
    """What the model continues: the tools that are used, samples of it, and the beginning of one for a certain tool."""
    used = {tool.name, *(sample.tool for sample in seeds)}
    listed = "\n".join(f"- {each}" for each in tools if each.name in used)
    shown = "\n\n".join(f"Tool: {sample.tool}\n{sample}" for sample in seeds)
    return f"Tools:\n{listed}\n\nSamples of using them:\n\n{shown}\n\nTool: {tool.name}\n{FIELDS[0]}:"


def draw(generator: np.random.Generator, seeds: Sequence[ToolSample], tool: Tool, shown: int) -> list[ToolSample]:
    """Seed samples to show: those of the tool last, and others only where it has too few."""
    drawn = [seeds[i] for i in generator.permutation(len(seeds))]
    return sorted(drawn, key=lambda sample: sample.tool != tool.name)[:shown][::-1]


def write(
    complete: Complete,
    tools: Sequence[Tool],
    seeds: Sequence[ToolSample],
    count: int,
    *,
    shown: int = 3,
    seed: int = 0,
) -> list[Outcome]:
    """Let a model write `count` samples, the tools in turn, and judge each by the rules.

    Args:
        complete: continues beginnings of texts, all at once.
        tools: to be used.
        seeds: samples by people, each of one of the tools.
        count: how many are asked for; the beginnings of fewer are the first ones of more.
        shown: seed samples in a prompt, drawn anew for each; see `draw`.
        seed: of that draw.

    Raises:
        UserError: no tools or no seeds, or a seed breaks the rules itself.
    """
    require(bool(tools) and bool(seeds), "self-instruct needs tools, and seed samples of using them")
    by_name = {tool.name: tool for tool in tools}
    require(len(by_name) == len(tools), "two tools have the same name")
    for example in seeds:
        require(example.tool in by_name, f"a seed sample uses {example.tool!r}, which is none of the tools")
        check(example, by_name[example.tool])
    generator = np.random.default_rng(seed)
    wanted = [tools[i % len(tools)] for i in range(count)]
    written = complete([prompt(tools, draw(generator, seeds, tool, shown), tool) for tool in wanted])
    require(len(written) == count, f"the model wrote {len(written)} texts after {count} beginnings: one each")
    return judge([f"{FIELDS[0]}:{text}" for text in written], wanted, seeds)


def judge(texts: Iterable[str], wanted: Iterable[Tool], known: Iterable[ToolSample] = ()) -> list[Outcome]:
    """Which texts are samples of the wanted tools, none with a question asked before; one outcome a text."""
    outcomes = []
    asked = {_normalised(sample.question) for sample in known}
    for text, tool in zip(texts, wanted, strict=True):
        try:
            sample = parse(text)
            check(sample, tool)
            question = _normalised(sample.question)
            if question in asked:
                raise BadRecordError(DUPLICATE, repr(sample.question[:40]))
        except BadRecordError as error:
            outcomes.append(Outcome(tool.name, reason=error.reason, detail=error.detail))
        else:
            asked.add(question)
            outcomes.append(Outcome(tool.name, sample))
    return outcomes


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def conversation(sample: ToolSample, tools: Sequence[Tool], source: str = "tools") -> Conversation:
    """A sample as a conversation: the tools in the system's message, the observation as a message of the user's."""
    system = "You can use these tools, one at a time:\n" + "\n".join(f"- {tool}" for tool in tools)
    arguments = json.dumps(dict(sample.arguments), ensure_ascii=False)
    return Conversation(
        (
            Message("system", system),
            Message("user", sample.question),
            Message("assistant", f"Thought: {sample.thought}\nAction: {sample.tool}\nAction Input: {arguments}"),
            Message("user", f"Observation: {sample.observation}"),
            Message("assistant", f"Final Answer: {sample.answer}"),
        ),
        source,
    )
