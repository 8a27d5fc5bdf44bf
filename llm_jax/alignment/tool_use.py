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
from typing import Any

import numpy as np

from llm_jax.alignment.conversations import BadRecordError, Conversation, Tally
from llm_jax.errors import require
from llm_jax.tokenization.chat import Message

TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}
FIELDS = ("Question", "Thought", "Action", "Action Input", "Observation", "Final Answer")
STOP = "\nQuestion:"  # the model goes on with another sample
UNPARSABLE, WRONG_TOOL, BAD_ARGUMENTS, DUPLICATE = "not parsable", "another tool", "invalid arguments", "duplicate"
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
    try:
        arguments = json.loads(written)
    except ValueError as error:
        raise BadRecordError(UNPARSABLE, f"Action Input is no JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise BadRecordError(UNPARSABLE, "Action Input is no object")
    return ToolSample(question, thought, tool, arguments, observation, answer.splitlines()[0])


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


def prompt(tools: Sequence[Tool], seeds: Sequence[ToolSample], tool: Tool) -> str:
    """What the model continues: the tools, some samples, and the beginning of one for a certain tool."""
    listed = "\n".join(f"- {each}" for each in tools)
    shown = "\n\n".join(map(str, seeds))
    return f"Tools:\n{listed}\n\nEach sample uses one tool.\n\n{shown}\n\nA sample that uses {tool.name}:\n{FIELDS[0]}:"


def write(
    complete: Complete,
    tools: Sequence[Tool],
    seeds: Sequence[ToolSample],
    count: int,
    *,
    shown: int = 3,
    seed: int = 0,
) -> tuple[list[ToolSample], Tally]:
    """Let a model write `count` samples, the tools in turn, and keep what passes the rules.

    Args:
        complete: continues beginnings of texts, all at once.
        tools: to be used.
        seeds: samples by people, each of one of the tools.
        count: how many are asked for.
        shown: seed samples in a prompt, drawn anew for each.
        seed: of that draw.

    Returns:
        The samples kept, in order, and how many each rule took away.

    Raises:
        UserError: no tools or no seeds, or a seed breaks the rules itself.
    """
    require(bool(tools) and bool(seeds), "self-instruct needs tools, and seed samples of using them")
    by_name = {tool.name: tool for tool in tools}
    for example in seeds:
        require(example.tool in by_name, f"a seed sample uses {example.tool!r}, which is none of the tools")
        check(example, by_name[example.tool])
    generator = np.random.default_rng(seed)
    wanted = [tools[i % len(tools)] for i in range(count)]
    chosen = [generator.permutation(len(seeds))[:shown] for _ in wanted]
    beginnings = [prompt(tools, [seeds[i] for i in some], tool) for some, tool in zip(chosen, wanted)]
    written = complete(beginnings)
    require(len(written) == count, f"the model wrote {len(written)} texts after {count} beginnings: one each")
    return keep([f"{FIELDS[0]}:{text}" for text in written], wanted, seeds)


def keep(
    texts: Iterable[str], wanted: Iterable[Tool], known: Iterable[ToolSample] = ()
) -> tuple[list[ToolSample], Tally]:
    """The texts that are samples of the wanted tools, none with a question asked before; and what befell the others."""
    kept: list[ToolSample] = []
    tally = Tally()
    asked = {_normalised(sample.question) for sample in known}
    for number, (text, tool) in enumerate(zip(texts, wanted, strict=True), start=1):
        try:
            sample = parse(text)
            check(sample, tool)
            if _normalised(sample.question) in asked:
                raise BadRecordError(DUPLICATE, repr(sample.question[:40]))
        except BadRecordError as error:
            tally.add(error.reason, f"sample {number}", error.detail)
            continue
        asked.add(_normalised(sample.question))
        kept.append(sample)
    return kept, tally


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
