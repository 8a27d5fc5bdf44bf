"""Encoding and decoding: every text comes back byte for byte, in the way SentencePiece itself would encode it."""

import multiprocessing
import pickle
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from sentencepiece import sentencepiece_model_pb2 as protocol

from llm_jax.config import TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.tokenization.sentencepiece_model import SPACE_MARK, SentencePieceTokenizer
from llm_jax.tokenization.tokenizer import load
from llm_jax.tokenization.train import train_on_texts
from tests.tokenization.texts import ENGLISH, TEXTS, any_text


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    styles = ("baichuan2", "baichuan1", "llama2")
    return {style: train_on_texts(TEXTS, TokenizerConfig(vocab_size=420, style=style)) for style in styles}


@pytest.fixture(scope="module")
def tokenizers(models) -> dict[str, SentencePieceTokenizer]:
    return {style: SentencePieceTokenizer(model) for style, model in models.items()}


@pytest.fixture(scope="module")
def tokenizer(tokenizers) -> SentencePieceTokenizer:
    return tokenizers["baichuan2"]


@settings(max_examples=400, deadline=None)
@given(text=any_text)
@example(text="")
@example(text=" ")
@example(text=f" {SPACE_MARK} {SPACE_MARK}{SPACE_MARK}x")
@example(text="\0\0 <s> </s><unk><0x41>\r\n\t\u2585\ufeff\U0010ffff")
@pytest.mark.parametrize("style", ["baichuan2", "baichuan1", "llama2"])
def test_any_text_comes_back(tokenizers, style, text):
    tokenizer = tokenizers[style]
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


@settings(max_examples=400, deadline=None)
@given(text=any_text.map(lambda text: text.replace(SPACE_MARK, "")))
@pytest.mark.parametrize("style", ["baichuan2", "baichuan1", "llama2"])
def test_ids_are_those_of_sentencepiece(models, tokenizers, style, text):
    direct = sentencepiece.SentencePieceProcessor(model_proto=models[style])
    assert tokenizers[style].encode(text) == direct.encode(text)


def test_text_like_a_special_piece_is_ordinary_text(tokenizer):
    specials = {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id}
    assert not specials & set(tokenizer.encode("<s>hello</s><unk><pad>"))


def test_ids_of_the_specials(tokenizer):
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 0)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id]) == "hi"


def test_markers_of_chat_formats_are_control_pieces(models, tokenizer):
    proto = protocol.ModelProto()
    proto.ParseFromString(models["baichuan2"])
    for text in ("<reserved_106>", "<|im_start|>", "<b>"):
        proto.pieces.add(piece=text, score=0.0, type=protocol.ModelProto.SentencePiece.USER_DEFINED)
    marked = SentencePieceTokenizer(proto.SerializeToString())
    assert marked.special_ids == {"<s>": 1, "</s>": 2, "<reserved_106>": 420, "<|im_start|>": 421}
    text = "<reserved_106>hello<|im_start|> <b>"
    assert not {420, 421} & set(marked.encode(text)) and marked.encode("x<b>")[-1] == 422
    assert marked.decode([420, *marked.encode(text), 421]) == text
    assert marked.encode("hello") == tokenizer.encode("hello")


def test_half_a_character(tokenizer):
    ids = tokenizer.encode("a\U0001f600b")  # never trained on: four byte pieces
    assert tokenizer.decode_bytes(ids[:3]) == b"a\xf0\x9f"
    assert tokenizer.decode(ids[:3]) == "a\ufffd"
    assert tokenizer.decode_bytes(ids[:3]) + tokenizer.decode_bytes(ids[3:]) == "a\U0001f600b".encode()


@pytest.mark.parametrize("wrong", [-1, 420, 10**9])
def test_an_id_outside_the_vocabulary(tokenizer, wrong):
    with pytest.raises(UserError, match=f"id {wrong} is outside the vocabulary of 420"):
        tokenizer.decode([5, wrong])


def test_a_lone_surrogate(tokenizer):
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("a\ud800b")


def test_batches_threads_and_processes_agree(tokenizer):
    alone = [tokenizer.encode(text) for text in TEXTS]
    fresh = pickle.loads(pickle.dumps(tokenizer))
    assert fresh.fingerprint == tokenizer.fingerprint
    assert fresh.encode_batch(TEXTS, workers=2) == alone
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(pickle.loads(pickle.dumps(tokenizer)).encode, TEXTS)) == alone
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        assert list(processes.map(tokenizer.encode, TEXTS)) == alone


def test_forgetting_atoms_changes_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr("llm_jax.tokenization.sentencepiece_model.MAX_ATOMS", 3)
    fresh = pickle.loads(pickle.dumps(tokenizer))
    for _ in range(2):
        for text in [*TEXTS, f"a{SPACE_MARK}b"]:
            assert fresh.encode(text) == tokenizer.encode(text)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*nothing\.model: train one with"):
        load(tmp_path / "nothing.model")


@pytest.mark.parametrize("damage", [lambda m: b"", lambda m: b"junk" * 9, lambda m: m[:-1], lambda m: m[: len(m) // 2]])
def test_a_damaged_file(models, tmp_path, damage):
    path = tmp_path / "damaged.model"
    path.write_bytes(damage(models["baichuan2"]))
    with pytest.raises(UserError, match=r"damaged\.model") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_damage_anywhere_ends_in_one_line(models):
    generator = random.Random(0)
    for _ in range(150):
        damaged = bytearray(models["llama2"][: generator.choice([None, generator.randrange(1, 3000)])])
        for _ in range(3):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        try:
            SentencePieceTokenizer(bytes(damaged), "it").decode_bytes([5])
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith(("it ", "id 5"))


def test_pieces_that_the_library_refuses(models):
    model = protocol.ModelProto.FromString(models["llama2"])
    model.pieces[300].piece = model.pieces[301].piece
    with pytest.raises(UserError, match=r"^it cannot be used: .*already defined"):
        SentencePieceTokenizer(model.SerializeToString(), "it")
    model.pieces[300].piece, model.pieces[300].type = "<0xZZ>", model.pieces[300].BYTE
    with pytest.raises(UserError, match="its byte piece '<0xZZ>' is not written <0xNN>"):
        SentencePieceTokenizer(model.SerializeToString(), "it")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "byte_fallback": True, "hard_vocab_limit": False}, "not a BPE model"),
        ({"model_type": "bpe", "vocab_size": 60}, "no byte fallback"),
        ({"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nfkc"}, "normalises"),
        ({"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}, "normalises"),
    ],
)
def test_models_that_would_lose_text_are_refused(tmp_path, options, message):
    prefix, options = tmp_path / "other", {"vocab_size": 310, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([ENGLISH]), model_prefix=str(prefix), minloglevel=3, **options
    )
    with pytest.raises(UserError, match=message):
        load(Path(f"{prefix}.model"))
