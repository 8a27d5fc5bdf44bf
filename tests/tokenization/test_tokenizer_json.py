"""`tokenizer.json` files against the library that wrote them, and against SentencePiece where both say the same."""

import json
import pickle

import pytest
import tokenizers
from hypothesis import example, given, settings
from sentencepiece import sentencepiece_model_pb2 as protocol
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from llm_jax.config import TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.tokenization import tokenizer
from llm_jax.tokenization.sentencepiece_model import SPACE_MARK, SentencePieceTokenizer
from llm_jax.tokenization.tokenizer_json import JsonTokenizer
from llm_jax.tokenization.train import train_on_texts
from tests.tokenization.texts import SPECIALS, TEXTS, any_text, byte_level_bpe


def llama_like(model: bytes) -> dict:
    """A SentencePiece model's conversion: its pieces, and as merges every way to make one of two others."""
    proto = protocol.ModelProto()
    proto.ParseFromString(model)
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = [
        (-piece.score, [piece.piece[:i], piece.piece[i:]])
        for piece in proto.pieces
        if piece.type == piece.NORMAL
        for i in range(1, len(piece.piece))
        if piece.piece[:i] in vocabulary and piece.piece[i:] in vocabulary
    ]
    ordered = [tuple(merge) for _, merge in sorted(merges, key=lambda entry: entry[0])]
    bpe = tokenizers.models.BPE(vocabulary, ordered, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    built = tokenizers.Tokenizer(bpe)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)])
    built.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(built.to_str())


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    return train_on_texts(TEXTS, TokenizerConfig(vocab_size=420, style="llama2"))


@pytest.fixture(scope="module")
def definitions(sentencepiece_model) -> dict[str, dict]:
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return {"byte_level": byte_level_bpe(split), "byte_fallback": llama_like(sentencepiece_model)}


def write(folder, definition, **configs):
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(params=["byte_level", "byte_fallback"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(definitions) -> dict[str, JsonTokenizer]:
    return {kind: JsonTokenizer(json.dumps(definition), 1, 2) for kind, definition in definitions.items()}


@settings(max_examples=300, deadline=None)
@given(text=any_text)
@example(text=" a <|im_start|>  b<s>😀")
def test_byte_level_ids_are_the_librarys_and_every_text_comes_back(definitions, loaded, text):
    ids = loaded["byte_level"].encode(text)
    assert loaded["byte_level"].decode_bytes(ids) == text.encode()
    if not any(special in text for special in SPECIALS):
        library = tokenizers.Tokenizer.from_str(json.dumps(definitions["byte_level"]))
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert loaded["byte_level"].decode(ids) == library.decode(ids)


@settings(max_examples=300, deadline=None)
@given(text=any_text.map(lambda text: text.replace(SPACE_MARK, "")))
@example(text=" a  b<s>😀<0x41>")
def test_byte_fallback_ids_are_sentencepieces(sentencepiece_model, loaded, text):
    direct = SentencePieceTokenizer(sentencepiece_model)
    ids = loaded["byte_fallback"].encode(text)
    assert ids == direct.encode(text)
    assert loaded["byte_fallback"].decode_bytes(ids) == direct.decode_bytes(ids) == text.encode()


def test_control_tokens_are_never_encoded_and_decode_to_nothing(loaded, definitions, kind):
    loaded, names = loaded[kind], [token["content"] for token in definitions[kind]["added_tokens"]]
    assert list(loaded.special_ids) == names
    ids = loaded.encode("x" + "y".join(names))
    assert not set(ids) & set(loaded.special_ids.values())
    assert loaded.decode([*loaded.special_ids.values(), *ids]) == "x" + "y".join(names)


def test_whole_words_that_are_looked_up_are_no_control_tokens(definitions):
    definition = json.loads(json.dumps(definitions["byte_level"]))
    definition["model"]["ignore_merges"] = True
    word = definition["added_tokens"][0]["content"] = "stop"
    definition["model"]["vocab"] = {token if i else word: i for token, i in definition["model"]["vocab"].items()}
    loaded = JsonTokenizer(json.dumps(definition))
    assert loaded.special_ids[word] == 0 and 0 not in loaded.encode("stop stop")
    assert loaded.decode(loaded.encode("stop stop")) == "stop stop"


def test_added_words_that_are_not_special_are_text(definitions, kind):
    definition = json.loads(json.dumps(definitions[kind]))
    size = len(definition["model"]["vocab"])
    added = {**definition["added_tokens"][0], "id": size, "content": "<think>", "special": False}
    definition["added_tokens"].append(added)
    loaded = JsonTokenizer(json.dumps(definition))
    assert loaded.vocab_size == size + 1 and size in loaded.encode("a<think>")
    assert loaded.decode(loaded.encode("a<think>")) == "a<think>" and "<think>" not in loaded.special_ids


def test_half_a_character(loaded, kind):
    ids = loaded[kind].encode("a😀b")
    pieces = [loaded[kind].decode_bytes([i]) for i in ids]
    assert b"".join(pieces).strip() == "a😀b".encode() and b"\xf0" in pieces


def test_batches_threads_and_copies_agree(loaded, kind):
    alone = [loaded[kind].encode(text) for text in TEXTS]
    copy = pickle.loads(pickle.dumps(loaded[kind]))
    assert copy.encode_batch(TEXTS, workers=1) == copy.encode_batch(TEXTS) == alone
    assert copy.fingerprint == loaded[kind].fingerprint


def test_padding_and_truncation_of_the_file_are_not_applied(definitions, loaded):
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "<s>"}  # fmt: skip
    cut = JsonTokenizer(json.dumps({**definitions["byte_level"], "truncation": truncation, "padding": padding}), 1, 2)
    assert cut.encode_batch(["a", TEXTS[0]]) == loaded["byte_level"].encode_batch(["a", TEXTS[0]])


@pytest.mark.parametrize(
    ("configs", "ids"),
    [
        ({}, (-1, -1, -1)),
        ({"config": {"bos_token_id": 0, "eos_token_id": 2}}, (-1, 2, 2)),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [1, 2]}}, (-1, 1, 1)),
        (
            {"tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": None, "pad_token": "<|endoftext|>"}},
            (-1, 2, 0),
        ),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|endoftext|>"}}, (-1, 2, 2)),
        ({"tokenizer_config": {"eos_token": None, "bos_token": "<|endoftext|>", "add_bos_token": True}}, (0, -1, -1)),
        ({"tokenizer_config": {"eos_token": "<|nothing|>"}, "config": {"eos_token_id": 2}}, (-1, -1, -1)),
    ],
)
def test_the_files_beside_it_name_the_specials(tmp_path, definitions, configs, ids):
    loaded = tokenizer.load(write(tmp_path, definitions["byte_level"], **configs))
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == ids


def test_a_document_begins_as_the_file_says(tmp_path, definitions):
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    loaded = tokenizer.load(write(tmp_path, definitions["byte_fallback"], tokenizer_config=config))
    assert (loaded.bos_id, loaded.eos_id) == (1, 2)
    write(tmp_path, definitions["byte_fallback"], tokenizer_config={**config, "add_bos_token": False})
    assert tokenizer.load(tmp_path).bos_id == -1


def test_saving_and_opening_again(tmp_path, loaded, kind):
    path = loaded[kind].save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert path == tmp_path / "tokenizer.json"
    assert (again.bos_id, again.eos_id, again.pad_id) == (1, 2, 2)
    assert again.encode_batch(TEXTS) == loaded[kind].encode_batch(TEXTS)
    assert again.special_ids == loaded[kind].special_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: "{", "is not a tokenizer.json"),
        (lambda d: "[]", "is not a tokenizer.json"),
        (lambda d: json.dumps(d)[:-90], "is not a tokenizer.json"),
        (lambda d: json.dumps({**d, "model": {**d["model"], "type": "WordPiece"}}), "is a WordPiece model"),
        (lambda d: json.dumps({**d, "decoder": None}), "neither byte-level tokens nor byte fallback"),
        (lambda d: json.dumps({**d, "model": {**d["model"], "merges": [["q", "nothing"]]}}), "cannot be used"),
        (lambda d: json.dumps({**d, "model": {**d["model"], "vocab": ["a"]}}), "model.vocab is not an object of ids"),
        (lambda d: json.dumps({**d, "model": {**d["model"], "vocab": {"a": "0"}}}), "model.vocab is not an object"),
        (lambda d: json.dumps({**d, "model": {**d["model"], "vocab": {"a": -1}}}), "model.vocab is not an object"),
        (lambda d: json.dumps({**d, "model": {"type": "BPE", "merges": []}}), "model.vocab is not an object of ids"),
        (lambda d: json.dumps({**d, "added_tokens": "abc"}), "added_tokens is not a list of tokens"),
        (lambda d: json.dumps({**d, "added_tokens": [{"id": 1, "content": "a"}]}), "added_tokens is not a list"),
    ],
)
def test_unusable_files(tmp_path, definitions, change, message):
    (tmp_path / "tokenizer.json").write_text(change(definitions["byte_level"]))
    with pytest.raises(UserError, match=message) as caught:
        tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({"generation_config": {"eos_token_id": []}}, r"generation_config.json: eos_token_id is \[\], which is no id"),
        ({"config": {"eos_token_id": "7"}}, "config.json: eos_token_id is '7', which is no id"),
        ({"config": {"eos_token_id": -7}}, "eos_token_id is -7, which is no id"),
        ({"tokenizer_config": {"eos_token": {}}}, "tokenizer_config.json: eos_token is {}, which names no token"),
        ({"tokenizer_config": {"eos_token": ["</s>"]}}, r"eos_token is \['</s>'\], which names no token"),
    ],
)
def test_specials_of_the_wrong_type(tmp_path, definitions, configs, message):
    with pytest.raises(UserError, match=message):
        tokenizer.load(write(tmp_path, definitions["byte_level"], **configs))


def test_a_special_that_the_vocabulary_lacks_is_said_to_be_missing(tmp_path, definitions, caplog):
    loaded = tokenizer.load(write(tmp_path, definitions["byte_level"], tokenizer_config={"eos_token": "<|nothing|>"}))
    assert loaded.eos_id == -1
    assert "eos_token is '<|nothing|>', which is not in the vocabulary" in caplog.text


def test_wrong_ids(tmp_path, definitions, loaded):
    with pytest.raises(UserError, match="eos id 9999 is outside the vocabulary"):
        tokenizer.load(write(tmp_path, definitions["byte_level"], config={"eos_token_id": 9999}))
    with pytest.raises(UserError, match="id 400 is outside the vocabulary of 400"):
        loaded["byte_level"].decode([400])
    with pytest.raises(UserError, match="lone surrogate"):
        loaded["byte_level"].encode("\ud800")
    with pytest.raises(UserError, match="lone surrogate"):
        loaded["byte_level"].encode_batch(["", "\ud800"])
