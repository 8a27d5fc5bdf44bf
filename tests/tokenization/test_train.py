"""Training: the settings reach the model, no text is skipped, and impossible sizes are explained."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as protocol

from llm_jax.config import TokenizerConfig
from llm_jax.data.documents import Document
from llm_jax.errors import UserError
from llm_jax.tokenization import report, train
from llm_jax.tokenization.sentencepiece_model import SPACE_MARK, SentencePieceTokenizer

TEXT = "if value == 2024:\n        return  value\n\n\n" * 20 + "你好，世界。\n" * 20


def trained(texts: list[str], vocab_size: int, style: str = "baichuan2") -> tuple[SentencePieceTokenizer, list[str]]:
    model = train.train_on_texts(texts, TokenizerConfig(vocab_size=vocab_size, style=style))
    proto = protocol.ModelProto()
    proto.ParseFromString(model)
    return SentencePieceTokenizer(model), [piece.piece for piece in proto.pieces]


def test_the_model_records_the_settings_of_baichuan2():
    proto = protocol.ModelProto()
    proto.ParseFromString(train.train_on_texts([TEXT], TokenizerConfig(vocab_size=310)))
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    assert (trainer.model_type, trainer.vocab_size, trainer.byte_fallback) == (trainer.BPE, 310, True)
    assert (trainer.split_digits, trainer.allow_whitespace_only_pieces) == (True, True)
    assert trainer.character_coverage == pytest.approx(0.9999)
    assert trainer.max_sentencepiece_length == 32
    assert (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id) == (0, 1, 2, -1)
    assert (normalizer.name, normalizer.precompiled_charsmap) == ("identity", b"")
    assert (normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces) == (False, False)


@pytest.mark.parametrize(("style", "prefix"), [("baichuan2", False), ("baichuan1", True), ("llama2", True)])
def test_styles_differ_in_the_dummy_prefix(style, prefix):
    tokenizer, _ = trained([TEXT], 310, style)
    assert (tokenizer.encode("value") == tokenizer.encode(" value")[1:]) is False
    assert (tokenizer.encode("value") == trained([TEXT], 310)[0].encode(" value")) is prefix


def test_pieces_of_spaces_and_line_ends_are_learnt_and_digits_stay_apart():
    tokenizer, pieces = trained([TEXT], 320)
    assert SPACE_MARK * 8 in pieces and "\n\n\n" in pieces
    assert not [piece for piece in pieces if re.search(r"\d.|.\d", piece) and not piece.startswith("<0x")]
    assert len(tokenizer.encode("2024")) == 4


def test_long_documents_are_learnt_to_their_end():
    tail = "zebra" * 40
    text = "a b c d\n" * 4000 + "x" * 20000 + "\n" + f"{tail} \u2585 {SPACE_MARK} \0 {tail}"
    _, pieces = trained([text], 300)
    assert "zebra" in pieces


@given(st.text(), st.integers(1, 40))
def test_splitting_keeps_all_but_reserved_characters(text, repeats):
    text = text * repeats
    assert "".join(train.split_text(text)) == train.RESERVED.sub("", text)


@pytest.mark.parametrize("text", ["line\n" * 5000, "字" * 9999, "\n" * 9000, "word " * 3000])
def test_splitting_keeps_within_the_limit(text):
    parts = list(train.split_text(text))
    assert "".join(parts) == text
    assert max(len(part.encode()) for part in parts) <= train.SENTENCE_BYTES
    assert len(parts) <= 1.5 * len(text.encode()) / train.SENTENCE_BYTES + 1


def test_too_large_a_vocabulary_names_one_that_fits():
    with pytest.raises(UserError, match=r"vocabulary of 9000 is larger than this text supports") as caught:
        trained([TEXT], 9000)
    largest = int(re.search(r"set vocab_size to (\d+) or less", str(caught.value))[1])
    assert trained([TEXT], largest)[0].vocab_size == largest
    with pytest.raises(UserError):
        trained([TEXT], largest + 1)


def test_a_lower_coverage_leaves_rare_characters_to_bytes():
    text = TEXT * 20 + "罕"
    covered = train.train_on_texts([text], TokenizerConfig(vocab_size=310, character_coverage=1.0))
    assert len(SentencePieceTokenizer(covered).encode("罕")) == 1
    assert len(trained([text], 310)[0].encode("罕")) == 3


def test_too_small_a_vocabulary_names_one_that_fits():
    with pytest.raises(UserError, match="too small for the characters of this text") as caught:
        trained([TEXT], 260)
    smallest = int(re.search(r"set vocab_size to (\d+) or more", str(caught.value))[1])
    assert trained([TEXT], smallest)[0].vocab_size == smallest


@pytest.mark.parametrize("texts", [[], [""], ["\0", SPACE_MARK]])
def test_no_text(texts):
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        trained(texts, 300)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), UserError("broken.jsonl, line 7"), OSError(28, "full")])
def test_a_failure_in_reading_is_passed_on_and_leaves_no_file(tmp_path, failure):
    def documents():
        yield Document("mine", "en", TEXT)
        raise failure

    with pytest.raises(type(failure)) as caught:
        train.train(documents(), TokenizerConfig(vocab_size=300), tmp_path / "tokenizer.model")
    assert caught.value is failure
    assert list(tmp_path.iterdir()) == []


def test_the_report_counts_by_language():
    tokenizer, _ = trained([TEXT], 310)
    texts = [("en", "if value"), ("zh", "你好"), ("en", "return \x00")]
    rows = report.measure(tokenizer, [Document("mine", language, text) for language, text in texts])
    assert [row.language for row in rows] == ["en", "zh", "all"]
    english, chinese, everything = rows
    assert (english.documents, english.bytes, english.exact) == (2, 16, 2)
    assert english.tokens == len(tokenizer.encode("if value")) + len(tokenizer.encode("return \x00"))
    assert (chinese.bytes, chinese.characters, chinese.bytes_per_token) == (6, 2, 6 / chinese.tokens)
    assert (everything.bytes, everything.tokens) == (22, english.tokens + chinese.tokens)


def test_the_report_notices_a_text_that_does_not_come_back(monkeypatch):
    tokenizer, _ = trained([TEXT], 310)
    monkeypatch.setattr(SentencePieceTokenizer, "decode_bytes", lambda self, ids: b"other")
    assert report.measure_text(tokenizer, "value", "en").exact == 0
