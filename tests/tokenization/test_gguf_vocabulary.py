"""Tokenizers inside GGUF files encode as the tokenizer that was written into the file."""

import logging

import gguf
import pytest
import tokenizers
from hypothesis import example, given, settings
from sentencepiece import sentencepiece_model_pb2 as protocol
from tokenizers import pre_tokenizers

from llm_jax.config import TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.tokenization import tokenizer
from llm_jax.tokenization.sentencepiece_model import SentencePieceTokenizer
from llm_jax.tokenization.train import train_on_texts
from tests.tokenization.test_tiktoken_file import PATTERN
from tests.tokenization.texts import SPECIALS, TEXTS, any_text, byte_level_bpe

TRIPLE_DIGITS = PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def isolated(pattern):
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": isolated(PATTERN),
    "llama-bpe": isolated(TRIPLE_DIGITS),
}


def write(path, fields):
    """A file without tensors, with `tokenizer.ggml.*` fields."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_int32, float: writer.add_float32,
               list: writer.add_array}[type(value)]  # fmt: skip
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_fields(definition, pre):
    vocabulary = sorted(definition["model"]["vocab"], key=definition["model"]["vocab"].get)
    return {
        "model": "gpt2", "pre": pre, "tokens": vocabulary,
        "token_type": [3 if token in SPECIALS else 1 for token in vocabulary],
        "merges": [" ".join(merge) for merge in definition["model"]["merges"]],
        "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """By kind of split: the library's tokenizer and ours out of the file.

    The vocabulary was trained without any split, so that every way to split gives ids of its own.
    """
    pairs = {}
    definition = byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), size=600)
    for name, split in SPLITS.items():
        path = tmp_path_factory.mktemp(name) / "model.gguf"
        library = tokenizers.Tokenizer(
            tokenizers.models.BPE(definition["model"]["vocab"], [tuple(m) for m in definition["model"]["merges"]])
        )
        library.pre_tokenizer = split
        library.normalizer = tokenizers.normalizers.NFC() if name == "qwen2" else None
        pairs[name] = library, tokenizer.load(write(path, byte_level_fields(definition, name)))
    return pairs


@settings(max_examples=150, deadline=None)
@given(text=any_text)
@example(text="in 1984. 12345 don't CAN'T e\u0301té  \r\n\n  第二条  公民")
@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_ids_are_those_of_the_tokenizer_that_was_written(byte_level, name, text):
    library, ours = byte_level[name]
    assert ours.encode(text) == library.encode(text).ids


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("qwen2", False)])
def test_llama_3_takes_words_of_the_vocabulary_whole(tmp_path, pre, whole):
    fields = byte_level_fields(byte_level_bpe(), pre)
    fields |= {"tokens": [*fields["tokens"], "zebra"], "token_type": [*fields["token_type"], 1]}
    ours = tokenizer.load(write(tmp_path / "model.gguf", fields))  # no merges lead to the new word
    assert (ours.encode("zebra") == [400]) is whole
    assert ours.decode([400]) == "zebra"


def test_what_a_byte_level_file_says_of_specials(byte_level, tmp_path):
    ours = byte_level["smollm"][1]
    assert ours.special_ids == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (-1, 2, 2)  # a bos that is not said to begin texts begins none
    assert byte_level["llama-bpe"][1].bos_id == 0
    fields = byte_level_fields(byte_level_bpe(), "smollm") | {"add_bos_token": True, "padding_token_id": 1}
    ours = tokenizer.load(write(tmp_path / "model.gguf", fields))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 2, 1)


def sentencepiece_fields(model):
    proto = protocol.ModelProto()
    proto.ParseFromString(model)
    return {
        "model": "llama", "tokens": [piece.piece for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces], "token_type": [piece.type for piece in proto.pieces],
        "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
    }  # fmt: skip


@pytest.fixture(scope="module")
def sentencepieces(tmp_path_factory):
    pairs = {}
    for style in ("llama2", "baichuan2"):
        model = train_on_texts(TEXTS, TokenizerConfig(vocab_size=420, style=style))
        path = tmp_path_factory.mktemp(style) / "model.gguf"
        pairs[style] = SentencePieceTokenizer(model), tokenizer.load(write(path, sentencepiece_fields(model)))
    return pairs


@settings(max_examples=150, deadline=None)
@given(text=any_text)
@pytest.mark.parametrize("style", ["llama2", "baichuan2"])
def test_sentencepiece_ids_are_those_of_the_model_that_was_written(sentencepieces, style, text):
    trained, ours = sentencepieces[style]
    ids = trained.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode_bytes(ids) == trained.decode_bytes(ids)


def test_what_a_sentencepiece_file_says_of_specials(sentencepieces, tmp_path):
    trained, ours = sentencepieces["llama2"]
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 0)
    assert ours.special_ids == trained.special_ids == {"<s>": 1, "</s>": 2}
    model = train_on_texts(TEXTS, TokenizerConfig(vocab_size=420))
    ours = tokenizer.load(write(tmp_path / "model.gguf", sentencepiece_fields(model) | {"add_bos_token": False}))
    assert (ours.bos_id, ours.eos_id) == (-1, 2)


def test_an_unsaid_split_is_said_to_be_a_guess(tmp_path, caplog):
    fields = byte_level_fields(byte_level_bpe(), "default")
    with caplog.at_level(logging.WARNING):
        ours = tokenizer.load(write(tmp_path / "model.gguf", fields))
    assert "does not say how its tokenizer splits text" in caplog.text
    assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "chameleon"}, "unknown way 'chameleon'; known: default, gpt-2, smollm"),
        ({"model": "t5"}, "of the kind 't5'; gpt2 and llama can be read"),
        ({"model": None}, "holds no tokenizer"),
        ({"tokens": None}, "holds no tokenizer"),
        ({"token_type": [1, 1]}, "token_type has 2 of 400 entries"),
        ({"eos_token_id": 400}, "eos_token_id=400 is outside the vocabulary"),
        ({"model": "llama"}, "scores has 0 of 400 entries"),
        ({"model": "llama", "scores": [0.0] * 400}, "no byte fallback"),
        ({"merges": ["nothing of"]}, "cannot be used"),
        ({"eos_token_id": "2"}, "eos_token_id is '2', not of type int"),
        ({"bos_token_id": 1.5}, "bos_token_id is 1.5, not of type int"),
        ({"bos_token_id": -5}, "bos_token_id=-5 is outside the vocabulary"),
        ({"pre": True}, "pre is True, not of type str"),
        ({"tokens": [*range(400)]}, "tokens is not a list of type str"),
        ({"tokens": "abc"}, "tokens is not a list of type str"),
        ({"merges": [1, 2]}, "merges is not a list of type str"),
        ({"scores": ["a"] * 400}, "scores is not a list of type float"),
        ({"token_type": ["a"] * 400}, "token_type is not a list of type int"),
        ({"token_type": [1] * 399 + [77]}, "token_type has 77, which is no type of token"),
    ],
)
def test_unusable_files(tmp_path, changes, message):
    fields = byte_level_fields(byte_level_bpe(), "smollm") | changes
    path = write(tmp_path / "model.gguf", {key: value for key, value in fields.items() if value is not None})
    with pytest.raises(UserError, match=message) as caught:
        tokenizer.load(path)
    assert "\n" not in str(caught.value) and "model.gguf" in str(caught.value)
