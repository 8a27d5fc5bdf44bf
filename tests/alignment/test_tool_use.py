"""Samples of using tools: what is parsed, which rule takes what away, and what a model is shown and taught."""

import dataclasses
import json

import numpy as np
import pytest

from llm_jax.alignment import tool_use
from llm_jax.alignment.conversations import BadRecordError
from llm_jax.alignment.tool_use import BAD_ARGUMENTS, DUPLICATE, UNPARSABLE, WRONG_TOOL, Tool, ToolSample
from llm_jax.errors import UserError

WEATHER = Tool("weather", "The forecast of a city.", {"city": "string", "days": "integer"}, optional=("days",))
CLOCK = Tool("clock", "The time.", {"zone": "string"})
RAIN = ToolSample("Will it rain in Rome?", "I need a forecast.", "weather", {"city": "Rome", "days": 2}, "rain", "Yes.")
NOON = ToolSample("What time is it in Oslo?", "I need the time.", "clock", {"zone": "Oslo"}, "12:00", "It is noon.")
TEXT = """Question: Will it rain in Rome?
Thought: I need a forecast.
Action: weather
Action Input: {"city": "Rome", "days": 2}
Observation: rain
Final Answer: Yes."""


def test_a_sample_is_written_and_read_in_reacts_form():
    assert str(RAIN) == TEXT
    assert tool_use.parse(TEXT) == RAIN
    assert tool_use.parse(f"{TEXT}\nQuestion: And") == RAIN
    assert tool_use.parse(TEXT.replace("rain\n", "rain\nand wind\n")).observation == "rain\nand wind"
    chinese = dataclasses.replace(RAIN, question="罗马下雨吗？", arguments={"city": "罗马"})
    assert tool_use.parse(str(chinese)) == chinese


@pytest.mark.parametrize(
    ("broken", "detail"),
    [
        (TEXT.replace("Observation: rain\n", ""), "fields Question, Thought, Action, Action Input, Final Answer"),
        (TEXT.replace("Thought", "Idea"), "fields Question, Action"),
        (TEXT.replace(": rain", ":"), "empty Observation"),
        (TEXT.replace('"Rome",', '"Rome"'), "no JSON"),
        (TEXT.replace('{"city": "Rome", "days": 2}', "[1]"), "no object"),
        ("Sure!\n" + TEXT, "fields Question"),
        ("", "fields none"),
        (TEXT[: TEXT.index("Observation")], "fields"),
    ],
)
def test_what_is_no_sample_is_said_to_be_none(broken, detail):
    with pytest.raises(BadRecordError) as error:
        tool_use.parse(broken)
    assert error.value.reason == UNPARSABLE and detail in error.value.detail


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"tool": "clock"}, WRONG_TOOL, "'clock' for 'weather'"),
        ({"arguments": {"days": 2}}, BAD_ARGUMENTS, "lacks 'city'"),
        ({"arguments": {"city": "Rome", "hour": 2}}, BAD_ARGUMENTS, "has no 'hour'"),
        ({"arguments": {"city": 5}}, BAD_ARGUMENTS, "city is 5, no string"),
        ({"arguments": {"city": "Rome", "days": 1.5}}, BAD_ARGUMENTS, "no integer"),
        ({"arguments": {"city": "Rome", "days": True}}, BAD_ARGUMENTS, "no integer"),
    ],
)
def test_the_rules(changes, reason, detail):
    tool_use.check(RAIN, WEATHER)
    tool_use.check(dataclasses.replace(RAIN, arguments={"city": "Rome"}), WEATHER)
    with pytest.raises(BadRecordError) as error:
        tool_use.check(dataclasses.replace(RAIN, **changes), WEATHER)
    assert error.value.reason == reason and detail in error.value.detail


def test_each_rule_counts_what_it_takes_away():
    """One good sample, one each for three rules, and a question asked before but for case and punctuation."""
    wind = dataclasses.replace(RAIN, question="Is it windy?")
    again = dataclasses.replace(RAIN, question="is it WINDY")
    bare = dataclasses.replace(RAIN, question="And now?", arguments={})
    texts = [str(wind), str(NOON), str(again), str(bare), "no", str(RAIN)]
    outcomes = tool_use.judge(texts, [WEATHER] * 6, known=[RAIN])
    assert [outcome.sample for outcome in outcomes] == [wind, None, None, None, None, None]
    assert [outcome.reason for outcome in outcomes] == [
        "", WRONG_TOOL, DUPLICATE, BAD_ARGUMENTS, UNPARSABLE, DUPLICATE
    ]  # fmt: skip
    assert outcomes[3].detail == "weather lacks 'city'" and {outcome.tool for outcome in outcomes} == {"weather"}


def test_a_model_is_asked_for_tools_in_turn():
    seen = []

    def complete(beginnings):
        seen.extend(beginnings)
        wanted = [NOON if "Tool: clock\nQuestion:" in text.rpartition("\n\n")[2] else RAIN for text in beginnings]
        made = [dataclasses.replace(sample, question=f"Number {i}?") for i, sample in enumerate(wanted)]
        return [str(sample).removeprefix("Question:") + "\nQuestion: more" for sample in made]

    outcomes = tool_use.write(complete, [WEATHER, CLOCK], [RAIN, NOON], 5, shown=1)
    assert [outcome.tool for outcome in outcomes] == ["weather", "clock"] * 2 + ["weather"]
    assert [outcome.sample.tool for outcome in outcomes] == ["weather", "clock"] * 2 + ["weather"]
    assert seen[1] == f"Tools:\n- {CLOCK}\n\nSamples of using them:\n\nTool: clock\n{NOON}\n\nTool: clock\nQuestion:"
    assert str(WEATHER) == "weather(city: string, days?: integer): The forecast of a city."
    more = []
    tool_use.write(lambda texts: more.extend(texts) or texts, [WEATHER, CLOCK], [RAIN, NOON], 9, shown=1)
    assert more[:5] == seen


def test_samples_of_the_tool_are_shown_before_others_and_last():
    rains = [dataclasses.replace(RAIN, question=f"{i}?") for i in range(3)]
    noons = [dataclasses.replace(NOON, question=f"{i}?") for i in range(3)]
    drawn = [tool_use.draw(np.random.default_rng(seed), [*rains, *noons], CLOCK, 4) for seed in range(20)]
    assert all(some[0] in rains and sorted(some[1:], key=str) == noons for some in drawn)
    assert len({str(some) for some in drawn}) > 10
    assert all(sample in rains for sample in tool_use.draw(np.random.default_rng(0), rains, CLOCK, 2))
    assert f"- {WEATHER}\n- {CLOCK}\n" in tool_use.prompt([WEATHER, CLOCK], rains, CLOCK)


CALL = 'Thought: Hm.\nAction: weather\nAction Input: {"city": "Rome"}'


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (CALL, ("weather", {"city": "Rome"})),
        (CALL + "\nObservation: 3", ("weather", {"city": "Rome"})),
        (CALL.replace("{", "{\n"), ("weather", {"city": "Rome"})),
        (CALL.replace('"}', '"'), None),
        (CALL.replace("Action:", "Act:"), None),
        (CALL.replace('{"city": "Rome"}', "[]"), None),
        ("", None),
    ],
)
def test_calls_in_replies(reply, found):
    assert tool_use.call(reply) == found


@pytest.mark.parametrize("written", ["NaN", "-Infinity", "1e", '"\\ud800"', "[" * 100_000])
def test_arguments_that_no_file_can_hold_are_refused(written):
    with pytest.raises(BadRecordError, match="no JSON"):
        tool_use.parse(TEXT.replace('"Rome"', written))


def test_tools_and_samples_are_read(tmp_path):
    tools, samples = tmp_path / "tools.jsonl", tmp_path / "samples.jsonl"
    record = {"name": "clock", "description": "The time.", "parameters": {"zone": "string"}}
    other = {**dataclasses.asdict(WEATHER), "optional": ["days"]}
    tools.write_text(f"{json.dumps(record)}\n{json.dumps(other)}\n")
    samples.write_text(json.dumps(dataclasses.asdict(RAIN)) + "\n")
    assert tool_use.read_tools(tools) == [CLOCK, WEATHER]
    assert tool_use.read_samples(samples) == [RAIN]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": ["zone"]}, r"1 field that is no object \(first tools.jsonl:2: parameters is"),
        ({"description": ""}, r"1 empty field \(first tools.jsonl:2: description\)"),
        ({"returns": "x"}, r"1 unknown field \(first tools.jsonl:2: returns\)"),
        ({"parameters": {"zone": "str"}}, "tools.jsonl:2: tool clock: parameter 'zone' is of type 'str'"),
        (None, r"1 not JSON"),
    ],
)
def test_a_bad_record_of_a_tool_is_named(tmp_path, changes, message):
    record = {"name": "clock", "description": "The time.", "parameters": {"zone": "string"}}
    bad = "{" if changes is None else json.dumps(record | changes)
    (tmp_path / "tools.jsonl").write_text(f"{json.dumps(record)}\n{bad}\n")
    with pytest.raises(UserError, match=message):
        tool_use.read_tools(tmp_path / "tools.jsonl")


def test_a_conversation_teaches_the_action_and_the_answer():
    made = tool_use.conversation(RAIN, [WEATHER, CLOCK])
    assert [message.role for message in made.messages] == ["system", "user", "assistant", "user", "assistant"]
    action = made.messages[2].content.rpartition("Action Input: ")[2]
    assert json.loads(action) == {"city": "Rome", "days": 2}
    assert made.messages[3].content == "Observation: rain" and made.messages[4].content == "Final Answer: Yes."


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tool_use.write(lambda texts: texts, [], [RAIN], 1), "needs tools"),
        (lambda: tool_use.write(lambda texts: [], [WEATHER], [RAIN], 1), "wrote 0 texts after 1"),
        (lambda: tool_use.write(lambda texts: texts, [CLOCK], [RAIN], 1), "uses 'weather', which is none"),
        (lambda: tool_use.write(lambda texts: texts, [CLOCK, CLOCK], [NOON], 1), "two tools have the same name"),
        (lambda: Tool("t", "", {"a": "text"}), "of type 'text'"),
        (lambda: Tool("t", "", {"a": "string"}, optional=("b",)), "none of its parameters"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
