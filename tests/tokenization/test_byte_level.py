"""The tokenizer of bytes: an id for each, kept and read as any other, in Baichuan-2's chat format."""

import hypothesis
import hypothesis.strategies as st

from llm_jax.tokenization import byte_level, chat, tokenizer
from llm_jax.tokenization.chat import Message

BYTES = byte_level.build()


@hypothesis.given(st.text())
def test_every_byte_has_its_id(text):
    ids = BYTES.encode(text)
    assert len(ids) == len(text.encode())
    assert BYTES.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(byte_level.SPECIALS.values())


def test_ids_follow_the_bytes():
    ids = [BYTES.encode(chr(byte))[0] for byte in range(128)]
    assert ids == sorted(set(ids)) and BYTES.vocab_size == byte_level.VOCABULARY
    assert BYTES.encode("</s><reserved_106>") == [BYTES.encode(letter)[0] for letter in "</s><reserved_106>"]


def test_it_is_read_back(tmp_path):
    BYTES.save(tmp_path)
    found = tokenizer.load(tmp_path)
    assert (found.bos_id, found.eos_id, found.pad_id) == (-1, 2, 0)
    assert found.fingerprint == BYTES.fingerprint and found.encode("é a") == BYTES.encode("é a")


def test_baichuan2_takes_two_marks():
    template = chat.choose("baichuan2", BYTES)
    ids = template.encode([Message("user", "ab"), Message("assistant", "c")], add_generation_prompt=False)
    assert ids == [195, *BYTES.encode("ab"), 196, *BYTES.encode("c"), BYTES.eos_id]
