"""Samples of using tools: what is parsed, which rule takes what away, and what a model is shown and taught."""

import dataclasses
import json

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
    kept, tally = tool_use.keep(texts, [WEATHER] * 6, known=[RAIN])
    assert kept == [wind]
    assert tally.counts == {WRONG_TOOL: 1, DUPLICATE: 2, BAD_ARGUMENTS: 1, UNPARSABLE: 1}


def test_a_model_is_shown_tools_and_seeds_and_asked_for_tools_in_turn():
    seen = []

    def complete(beginnings):
        seen.extend(beginnings)
        wanted = [CLOCK if "uses clock:" in beginning else RAIN for beginning in beginnings]
        made = [
            dataclasses.replace(NOON if w is CLOCK else RAIN, question=f"Number {i}?") for i, w in enumerate(wanted)
        ]
        return [str(sample).removeprefix("Question:") + "\nQuestion: more" for sample in made]

    kept, tally = tool_use.write(complete, [WEATHER, CLOCK], [RAIN, NOON], 5, shown=1)
    assert [sample.tool for sample in kept] == ["weather", "clock"] * 2 + ["weather"] and not tally.counts
    assert all(beginning.endswith("Question:") and str(WEATHER) in beginning for beginning in seen)
    assert all((str(RAIN) in beginning) != (str(NOON) in beginning) for beginning in seen)
    assert str(WEATHER) == "weather(city: string, days?: integer): The forecast of a city."


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
        (lambda: Tool("t", "", {"a": "text"}), "of type 'text'"),
        (lambda: Tool("t", "", {"a": "string"}, optional=("b",)), "none of its parameters"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
