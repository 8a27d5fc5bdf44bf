"""Conversations become documents beside the others."""

import json

import daft
import pytest

from llm_jax.data.stages import COLUMNS
from llm_jax.data.stages.instructions import Instructions, InstructionsConfig
from llm_jax.errors import UserError


@pytest.fixture
def documents():
    return daft.from_pydict({name: ["x"] for name in COLUMNS})


def conversation(*contents):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def test_each_file_becomes_a_source(tmp_path, documents):
    (tmp_path / "exercises.jsonl").write_text(f"{conversation('3+4?', '7')}\n{conversation('再见', '再见！', '!')}\n")
    (tmp_path / "talk.jsonl").write_text(conversation("Hi", "Hello") + "\n")
    result = Instructions(InstructionsConfig(str(tmp_path))).apply(documents, tmp_path)
    rows = result.added.select(*COLUMNS).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("instructions_exercises/00000000", "instructions_exercises", "und", "text", "exercises.jsonl:1", "3+4?\n\n7"),
        ("instructions_exercises/00000001", "instructions_exercises", "und", "text", "exercises.jsonl:2",
         "再见\n\n再见！\n\n!"),
        ("instructions_talk/00000000", "instructions_talk", "und", "text", "talk.jsonl:1", "Hi\n\nHello"),
    ]  # fmt: skip
    assert result.facts == {"conversations": {"instructions_exercises": 2, "instructions_talk": 1}}
    assert result.documents.to_pylist() == [{**dict.fromkeys(COLUMNS, "x"), "dropped": None}]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"messages": [{"role": "user"}]}', '{"messages": [1]}'])
def test_what_is_no_conversation_is_named(tmp_path, documents, line):
    (tmp_path / "a.jsonl").write_text(f"{conversation('a', 'b')}\n{line}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: no conversation of the form"):
        Instructions(InstructionsConfig(str(tmp_path))).apply(documents, tmp_path)


def test_a_folder_without_conversations_is_refused(tmp_path, documents):
    with pytest.raises(UserError, match=r"no \.jsonl file in"):
        Instructions(InstructionsConfig(str(tmp_path))).apply(documents, tmp_path)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="hold no conversation"):
        Instructions(InstructionsConfig(str(tmp_path))).apply(documents, tmp_path)
    assert not InstructionsConfig().enabled
