"""Streamed text against decoding everything at once."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_jax.sampling.stream import TextStream
from llm_jax.tokenization.tokenizer_json import JsonTokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "chat.json").read_text())
# One puts a space before every text and takes it off again, the other does not.
TOKENIZERS = {
    kind: JsonTokenizer(stored["definition"], stored["bos"], stored["eos"])
    for kind, stored in GOLDEN["tokenizers"].items()
}
emoji = [3 + byte for byte in "\U0001f600".encode()]  # of the byte-fallback tokenizer


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.lists(st.integers(0, 258) | st.integers(259, 329), max_size=4), max_size=6))
@example(parts=[emoji[:1], emoji[1:3], emoji[3:]])
@example(parts=[[1, 2], [], [0], [260], [261]])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_parts_are_the_whole(kind, parts):
    tokenizer = TOKENIZERS[kind]
    ids = [i for part in parts for i in part]
    stream = TextStream(tokenizer)
    texts = [stream.feed(part) for part in parts]
    assert "".join(texts) + stream.finish() == tokenizer.decode(i for i in ids if i < tokenizer.vocab_size)


@pytest.mark.parametrize("text", ["Paris, of France", "é 一二三 \U0001f600!", " a  b \n c"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_part_ends_within_a_character(kind, text):
    stream = TextStream(TOKENIZERS[kind])
    parts = [stream.feed([i]) for i in TOKENIZERS[kind].encode(text)]
    assert "".join(parts) == text and stream.finish() == ""
    assert not any("\ufffd" in part for part in parts)


def test_stop_ids_and_ids_without_text_are_left_out():
    tokenizer = TOKENIZERS["byte_level"]
    stop = tokenizer.encode("!")
    stream = TextStream(tokenizer, stop)
    assert stream.feed([*tokenizer.encode("hi"), 2, 99_999, *stop]) == "hi"


def test_half_a_character_at_the_end():
    stream = TextStream(TOKENIZERS["byte_fallback"])
    assert (stream.feed(emoji[:2]), stream.finish()) == ("", "\ufffd")
