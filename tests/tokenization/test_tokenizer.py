"""Opening whichever tokenizer a folder has, and one that belongs to the model."""

import json
import types

import pytest
import sentencepiece

from llm_jax.config import TokenizerConfig
from llm_jax.data.packages import fetch_all, members
from llm_jax.errors import UserError
from llm_jax.tokenization import tokenizer
from llm_jax.tokenization.published import MISTRAL
from llm_jax.tokenization.sentencepiece_model import SentencePieceTokenizer
from llm_jax.tokenization.tokenizer_json import JsonTokenizer
from llm_jax.tokenization.train import train_on_texts
from tests.tokenization.texts import TEXTS, byte_level_bpe


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_on_texts(TEXTS, TokenizerConfig(vocab_size=390)))


@pytest.fixture(scope="module")
def converted() -> JsonTokenizer:
    return JsonTokenizer(json.dumps(byte_level_bpe(size=380)))


def test_a_folder_with_both_files_counts_by_the_trained_one(tmp_path, trained, converted):
    trained.save(tmp_path)
    assert tokenizer.load(tmp_path).fingerprint == trained.fingerprint
    converted.save(tmp_path)
    assert tokenizer.load(tmp_path).fingerprint == trained.fingerprint


def test_unless_something_was_added_in_fine_tuning(tmp_path, trained):
    extended = JsonTokenizer(json.dumps(byte_level_bpe(size=400)))
    trained.save(tmp_path)
    extended.save(tmp_path)
    assert tokenizer.load(tmp_path).fingerprint == extended.fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), r"no tokenizer in .*thing: it has no tokenizer\.model, qwen\.tiktoken or"),
        (lambda path: None, "no tokenizer at .*thing: train one with"),
        (lambda path: path.touch(), r"thing is no tokenizer that can be read: it does not end in \.model"),
    ],
)
def test_nothing_to_open(tmp_path, make, message):
    make(tmp_path / "thing")
    with pytest.raises(UserError, match=message):
        tokenizer.load(tmp_path / "thing")


def test_a_copy_is_the_same_tokenizer(tmp_path, trained):
    for original in (trained, JsonTokenizer(json.dumps(byte_level_bpe()), 0, 2, 1)):
        source, target = tmp_path / original.fingerprint / "source", tmp_path / original.fingerprint / "target"
        source.mkdir(parents=True)
        target.mkdir()
        tokenizer.copy(original.save(source), target)
        again = tokenizer.load(target)
        assert again.encode_batch(TEXTS) == original.encode_batch(TEXTS)
        assert (again.bos_id, again.eos_id, again.pad_id) == (original.bos_id, original.eos_id, original.pad_id)
        assert not list(target.glob("*.partial"))


def test_a_tokenizer_has_no_ids_that_its_model_lacks(trained):
    tokenizer.check_vocabulary(trained, 390, "runs/demo")
    tokenizer.check_vocabulary(trained, 512, "runs/demo")
    with pytest.raises(UserError, match="does not belong to runs/demo: it has 390 ids, the model only 389"):
        tokenizer.check_vocabulary(trained, 389, "runs/demo")


@pytest.mark.parametrize(("extra", "warned"), [(1024, False), (1025, True)])
def test_a_model_with_many_more_ids_than_padding_explains(trained, caplog, extra, warned):
    tokenizer.check_vocabulary(trained, 390 + extra, "runs/demo")
    assert ("does the tokenizer belong to runs/demo? It has 390 ids" in caplog.text) is warned


def test_padding_in_proportion_to_a_large_vocabulary(caplog):
    large = types.SimpleNamespace(vocab_size=100_000)
    tokenizer.check_vocabulary(large, 110_000, "runs/demo")
    assert not caplog.text
    tokenizer.check_vocabulary(large, 110_001, "runs/demo")
    assert "the model has 110001" in caplog.text


@pytest.mark.slow
def test_a_released_vocabulary_of_the_same_kind_as_llama_2s(tmp_path):
    path = tmp_path / "tokenizer.model"
    ((_, content),) = members(fetch_all([MISTRAL], tmp_path)[MISTRAL.name], "*/tokenizer.model.v1")
    path.write_bytes(content)
    ours, library = tokenizer.load(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (32_000, 1, 2, 0)
    for text in (*TEXTS, "".join(TEXTS), "  leading, İ ﬁ 😀 <s>[INST] hi [/INST]</s>", "x" * 5000):
        assert ours.encode(text) == library.encode(text)
        assert ours.decode(ours.encode(text)) == text
