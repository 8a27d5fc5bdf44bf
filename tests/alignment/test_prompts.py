"""Prompts out of files, and which of them an iteration takes."""

import collections
import json

import numpy as np
import pytest

from llm_jax.alignment import prompts
from llm_jax.alignment.policy_config import PromptDataConfig
from llm_jax.alignment.prompts import Prompt, PromptStream
from llm_jax.config import TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.tokenization.chat import Message
from llm_jax.tokenization.train import train_on_texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_on_texts(["one two three 一二三\n"] * 9, TokenizerConfig(vocab_size=285)))
    return tokenizers.load(path)


def written(folder, *records):
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


RECORDS = [
    {"prompt": "one", "answer": "two", "unsafe": True},
    {"prompt": [user("one"), assistant("two"), user("three")], "system": "be brief"},
    {"messages": [user("two"), assistant("three")]},
    {"messages": [user("two"), assistant("three"), user("one")]},
    {"conversations": [{"from": "human", "value": "three"}, {"from": "gpt", "value": "one"}], "answer": "two"},
    {"instruction": "three", "output": "one two"},
    {"chosen": "\n\nHuman: one one\n\nAssistant: two two"},
]


def test_every_format_gives_what_is_asked_and_the_reply_cut_off_is_the_answer(tmp_path, tokenizer):
    config = PromptDataConfig(path=written(tmp_path, *RECORDS), template="llama2")
    template = prompts.choose_template(config, tokenizer)
    found = prompts.load(config, tokenizer, template)
    turns = [[(message.role[0], message.content) for message in prompt.messages] for prompt in found.train]
    assert turns == [
        [("u", "one")],
        [("s", "be brief"), ("u", "one"), ("a", "two"), ("u", "three")],
        [("u", "two")],
        [("u", "two"), ("a", "three"), ("u", "one")],
        [("u", "three")],
        [("u", "three")],
        [("u", "one one")],
    ]
    assert [prompt.answer for prompt in found.train] == ["two", "", "three", "", "two", "one two", "two two"]
    assert [prompt.unsafe for prompt in found.train] == [True] + [False] * 6
    assert [prompt.record for prompt in found.train] == [f"asked.jsonl:{i}" for i in range(1, 8)]
    for prompt in found.train:
        assert list(prompt.tokens) == template.encode(prompt.messages)
    assert prompts.stop_ids(tokenizer, template) == template.stop_ids
    assert not found.heldout and not str(found.tally)


def test_a_plain_prompt_is_the_beginning_of_a_text(tmp_path, tokenizer):
    config = PromptDataConfig(path=written(tmp_path, *RECORDS), template="none")
    assert prompts.choose_template(config, tokenizer) is None
    found = prompts.load(config, tokenizer, None)
    assert list(found.train[0].tokens) == [tokenizer.bos_id, *tokenizer.encode("one")]
    assert prompts.stop_ids(tokenizer, None) == (tokenizer.eos_id,)
    assert len(found.train) == 5
    assert str(found.tally) == "2 several messages, which no plain text is (first asked.jsonl:2: 4 messages)"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": ""}, "empty user message"),
        ({"prompt": 3}, "messages that are no list"),
        ({"prompt": []}, "no message"),
        ({"prompt": "x", "answer": 3}, "answer that is no text"),
        ({"prompt": "x", "unsafe": "yes"}, "unsafe that is neither true nor false"),
        ({"prompt": "one " * 40}, "prompt longer than PromptDataConfig.max_tokens"),
        ({"prompt": "[INST]"}, "refused by the chat template"),
        ({"question": "x"}, "unknown format"),
        ("one", "not a JSON object"),
    ],
)
def test_what_cannot_be_asked_is_left_out_and_counted(tmp_path, tokenizer, record, reason):
    config = PromptDataConfig(path=written(tmp_path, {"prompt": "one"}, record), template="llama2", max_tokens=60)
    found = prompts.load(config, tokenizer, prompts.choose_template(config, tokenizer))
    assert [prompt.record for prompt in found.train] == ["asked.jsonl:1"]
    assert dict(found.tally.counts) == {reason: 1}
    assert "asked.jsonl:2" in str(found.tally)


def test_the_limit_is_the_longest_prompt_that_stays(tmp_path, tokenizer):
    path = written(tmp_path, {"prompt": "one two three"})
    length = 1 + len(tokenizer.encode("one two three"))
    config = PromptDataConfig(path=path, template="none", max_tokens=length)
    assert len(prompts.load(config, tokenizer, None).train) == 1
    with pytest.raises(UserError, match="has no prompt to train on: 1 prompt longer than"):
        prompts.load(PromptDataConfig(path=path, template="none", max_tokens=length - 1), tokenizer, None)


def test_the_held_out_side_follows_from_the_first_message_alone(tmp_path, tokenizer):
    records = [{"prompt": [user(f"{i % 40}"), assistant("x"), user(f"{i}")]} for i in range(80)]
    config = PromptDataConfig(path=written(tmp_path, *records), template="llama2", holdout_fraction=0.3)
    template = prompts.choose_template(config, tokenizer)
    found = prompts.load(config, tokenizer, template)
    sides = [{prompt.messages[0].content for prompt in side} for side in (found.train, found.heldout)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40 and 4 <= len(sides[1]) <= 20
    fewer = PromptDataConfig(path=written(tmp_path, *records[::3]), template="llama2", holdout_fraction=0.3)
    again = prompts.load(fewer, tokenizer, template)
    assert {prompt.messages[0].content for prompt in again.heldout} <= sides[1]


MANY = [Prompt((Message("user", str(i)),), (i,)) for i in range(10)]


def test_every_prompt_comes_once_before_any_comes_again():
    stream = PromptStream(MANY, 4, seed=1)
    asked = [prompt.tokens[0] for step in range(10) for prompt in stream.batch(step)]
    epochs = [asked[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert PromptStream(MANY, 4, seed=1).batch(7) == stream.batch(7)
    assert [PromptStream(MANY, 4, seed=2).batch(step) for step in range(3)] != [stream.batch(i) for i in range(3)]


def test_processes_share_a_batch_and_their_numbers_never_meet():
    whole = PromptStream(MANY, 6, seed=1)
    parts = [PromptStream(MANY, 6, 1, index, 3) for index in range(3)]
    seen = collections.Counter()
    for step in range(5):
        assert [prompt for part in parts for prompt in part.batch(step)] == whole.batch(step)
        np.testing.assert_array_equal(np.concatenate([part.streams(step) for part in parts]), whole.streams(step))
        seen.update(whole.streams(step).tolist())
    assert len(seen) == 30 and whole.streams(0).dtype == np.uint32
    assert PromptStream(MANY, 6).streams(2**30).max() < 2**32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptStream([], 4), "there are no prompts"),
        (lambda: PromptStream(MANY, 0), "batch_size=0 must be positive"),
        (lambda: PromptStream(MANY, 4, 0, 0, 3), "batch_size=4 is not divisible by the 3 processes"),
        (lambda: PromptDataConfig(template="alpaca"), "template"),
        (lambda: PromptDataConfig(format="csv"), "format"),
        (lambda: PromptDataConfig(holdout_fraction=1.0), r"holdout_fraction=1.0 must be in \[0, 1\)"),
        (lambda: PromptDataConfig(max_tokens=0), "max_tokens"),
        (lambda: prompts.load(PromptDataConfig(), None, None), "path is not set"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()
