"""Reading conversations: every format, every kind of bad record, and the split."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.alignment import conversations
from llm_jax.alignment.conversations import BadRecordError, Conversation, Tally, parse, read
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message

U, A, S = "user", "assistant", "system"
ONE = ((U, "Who?"), (A, "I."))


def said(messages):
    return tuple((message.role, message.content) for message in messages)


def listed(*turns, role="role", content="content"):
    return [{role: name, content: text} for name, text in turns]


GOOD = {
    "openai": ({"messages": listed(("developer", "Be brief."), *ONE)}, "messages", ((S, "Be brief."), *ONE)),
    "system apart": ({"system": "Be brief.", "messages": listed(*ONE)}, "messages", ((S, "Be brief."), *ONE)),
    "empty system": ({"messages": listed((S, " \n"), *ONE)}, "messages", ONE),
    "trailing request": ({"messages": listed(*ONE, (U, "So?"))}, "messages", (*ONE, (U, "So?"))),
    "sharegpt": (
        {"conversations": listed(("human", "Who?"), ("gpt", "I."), role="from", content="value")},
        "sharegpt",
        ONE,
    ),
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca", ((U, "Add.\n\n1 2"), (A, "3"))),
    "alpaca alone": ({"instruction": "Who?", "input": "", "output": "I."}, "alpaca", ONE),
    "alpaca rounds": (
        {"instruction": "So?", "output": "So.", "history": [["Who?", "I."]], "system": "s"},
        "alpaca",
        ((S, "s"), *ONE, (U, "So?"), (A, "So.")),
    ),
    "hh": (
        {"chosen": "\n\nHuman: Who?\n\nAssistant: I.\n\nHuman: A\n\nB: C\n\nAssistant:\nD", "rejected": "x"},
        "hh_rlhf",
        (*ONE, (U, "A\n\nB: C"), (A, "D")),
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_formats(case):
    record, format, wanted = GOOD[case]
    assert said(parse(record)) == said(parse(record, format)) == wanted


BAD = {
    "unknown role": [
        {"messages": listed((U, "x"), ("tool", "y"))},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": ["user"], "content": "x"}]},
    ],
    "two user turns in a row": [{"messages": listed((U, "x"), (U, "y"), (A, "z"))}],
    "two assistant turns in a row": [{"messages": listed(*ONE, (A, "z"))}],
    "system message in the middle": [{"messages": listed(*ONE, (S, "z"))}, {"messages": listed((S, "z"), (S, "z"))}],
    "the assistant speaks first": [{"messages": listed((A, "x"), (U, "y"))}, {"messages": listed((S, "s"), (A, "x"))}],
    "empty reply": [
        {"messages": listed((U, "x"), (A, " \n"))},
        {"instruction": "x", "output": ""},
        {"chosen": "\n\nHuman: x\n\nAssistant:"},
    ],
    "empty user message": [{"messages": listed((U, ""), (A, "x"))}],
    "no reply": [{"messages": listed((U, "x"))}, {"messages": []}, {"messages": listed((S, "x"))}],
    "content that is no text": [
        {"messages": listed((U, 3), (A, "x"))},
        {"messages": listed((U, "\ud800"), (A, "x"))},
        {"instruction": "x"},
        {"instruction": "x", "input": 3, "output": "y"},
        {"chosen": [1]},
    ],
    "messages that are no list": [{"messages": "x"}],
    "message that is no JSON object": [{"messages": ["x"]}],
    "message weights, which are not supported": [{"messages": [{"role": A, "content": "x", "weight": 0}]}],
    "history that is no list of pairs": [{"instruction": "x", "output": "y", "history": [["a"]]}],
    "no dialogue of Human and Assistant": [{"chosen": "Who?"}, {"chosen": "x\n\nHuman: Who?\n\nAssistant: I."}],
    "not a JSON object": [[1], "x", None],
    "unknown format": [{"text": "x"}, {}],
}


@pytest.mark.parametrize(("reason", "record"), [(reason, record) for reason in BAD for record in BAD[reason]])
def test_bad_records(reason, record):
    with pytest.raises(BadRecordError) as error:
        parse(record)
    assert error.value.reason == reason
    assert "\n" not in str(error.value)


def test_a_format_that_is_named_and_not_there():
    with pytest.raises(BadRecordError, match="missing field: instruction"):
        parse({"messages": listed(*ONE)}, "alpaca")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["messages", "conversations", "instruction", "input", "output", "history", "chosen", "system"]
items = st.fixed_dictionaries({"role": st.sampled_from([U, A, S, "x"]) | json_values, "content": json_values})
anything = st.dictionaries(st.sampled_from(FIELDS), json_values | st.lists(items, max_size=4), max_size=4)


@settings(max_examples=200, deadline=None)
@given(anything)
def test_any_json_is_a_conversation_in_order_or_a_bad_record(record):
    try:
        messages = parse(record)
    except BadRecordError as error:
        assert "\n" not in str(error)
        return
    spoken = messages[messages[0].role == S :]
    assert [message.role for message in spoken] == [(U, A)[i % 2] for i in range(len(spoken))] and len(spoken) > 1
    assert all(message.content.strip() for message in messages)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_files_and_where_records_come_from(tmp_path):
    good = {"messages": listed(*ONE)}
    write(tmp_path / "a-b.jsonl", good, {"chosen": "\n\nHuman: x\n\nAssistant: y"})
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "array.json").write_text("\ufeff" + json.dumps([{"x": 1}, good]))
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(b"\n" + json.dumps(good).encode() + b"\n"))
    (tmp_path / "notes.txt").write_text("no conversations")
    found, tally = read(tmp_path)
    places = [(conversation.source, conversation.record) for conversation in found]
    assert places == [
        ("a_b", "a-b.jsonl:1"),
        ("a_b", "a-b.jsonl:2"),
        ("array", "inner/array.json:2"),
        ("z", "z.jsonl.gz:2"),
    ]
    assert said(found[2].messages) == ONE
    assert str(tally) == "1 unknown format (first inner/array.json:1: fields ['x'])"


def test_bad_records_are_counted_and_the_first_is_named(tmp_path):
    path = write(
        tmp_path / "data.jsonl",
        {"messages": listed(*ONE)},
        {"messages": listed((U, "x\ny"), ("tool", "z"))},
        {"messages": listed((U, "x"), (A, ""))},
        {"messages": listed(("bot", "x"))},
    )
    path.write_text(path.read_text() + "{broken\n")
    found, tally = read(path)
    assert len(found) == 1
    assert tally.counts == {"unknown role": 2, "empty reply": 1, "not JSON": 1}
    assert str(tally).startswith(
        "2 unknown role (first data.jsonl:2: 'tool'), 1 empty reply (first data.jsonl:3), 1 not"
    )
    assert "data.jsonl:5: Expecting property name" in str(tally)


def test_what_cannot_be_read_at_all(tmp_path):
    cases = {
        "no file or folder at .*nowhere": tmp_path / "nowhere",
        "has no conversation to learn from: 1 empty reply": write(
            tmp_path / "bad.jsonl", {"instruction": "x", "output": ""}
        ),
        "has no conversation to learn from: it is empty": write(tmp_path / "empty.jsonl"),
    }
    (tmp_path / "folder").mkdir()
    cases["none of .jsonl, .jsonl.gz, .json"] = tmp_path / "folder"
    (tmp_path / "object.json").write_text("{}")
    cases["no JSON array of records"] = tmp_path / "object.json"
    (tmp_path / "broken.json").write_text("[")
    cases["broken.json is not JSON: "] = tmp_path / "broken.json"
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 99)[:-4])
    cases["cut.jsonl.gz is truncated or not gzip"] = tmp_path / "cut.jsonl.gz"
    for message, path in cases.items():
        with pytest.raises(UserError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="did you mean 'sharegpt'"):
        read(tmp_path, "shareGPT")


def test_a_tally_names_each_reason_once():
    tally = Tally()
    assert not str(tally)
    for record in ("a:1", "a:2"):
        tally.add("odd", record, "x\ny")
    tally.add("rare")
    assert str(tally) == "2 odd (first a:1: x y), 1 rare"


def test_the_split_goes_by_the_first_request_alone():
    found = [
        Conversation((Message(S, str(i)), Message(U, f"request {i % 500}"), Message(A, f"reply {i}")))
        for i in range(1000)
    ]
    train, heldout = conversations.split(found, 0.1)
    assert len(train) + len(heldout) == 1000 and 60 < len(heldout) < 140
    requests = [{conversation.messages[1].content for conversation in side} for side in (train, heldout)]
    assert not requests[0] & requests[1]
    assert conversations.split(found[:7], 0.1) == tuple(
        [c for c in side if c in found[:7]] for side in (train, heldout)
    )
    assert conversations.split(found, 0.0) == (found, [])
