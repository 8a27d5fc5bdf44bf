"""Released tokenizers out of packages: their rules of splitting beside the library's, and packages that lack them."""

import base64
import itertools
import zipfile

import pytest
import tiktoken
from hypothesis import example, given, settings
from tiktoken_ext import openai_public

from llm_jax.config import TokenizerConfig
from llm_jax.data.packages import FetchError
from llm_jax.errors import UserError
from llm_jax.tokenization import published
from llm_jax.tokenization.published import CL100K_SPLIT, O200K_SPLIT, PUBLISHED, ByteRanks, LossyPieces
from llm_jax.tokenization.train import train_on_texts
from tests.tokenization.texts import TEXTS, any_text

# Every pair of ASCII, so that merges show where text was split.
PAIRS = [bytes(pair) for pair in itertools.product(range(128), repeat=2)]
TOKENS = [*(bytes([byte]) for byte in range(256)), *PAIRS]
FILE = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(TOKENS))
RULES = {"cl100k_base": CL100K_SPLIT, "o200k_base": O200K_SPLIT}
ODD = "DON'T don't I'll 12345 don'T\n\n  x  \r\n http://a/b!\n/ CamelCase XMLFile é\u0301 \u3000第一条 \n  "


@pytest.fixture(scope="module")
def pairs():
    """Ours and the library's under each of the rules, over the same ranks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **options: {})
        rules = {name: getattr(openai_public, name)()["pat_str"] for name in RULES}
    ranks = {token: rank for rank, token in enumerate(TOKENS)}
    return [
        (ByteRanks(FILE, name, RULES[name]), tiktoken.Encoding(name, pat_str=rule, mergeable_ranks=ranks,
                                                               special_tokens={}))
        for name, rule in rules.items()
    ]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(text=any_text)
@example(text=ODD)
@example(text="\n".join(TEXTS))
def test_text_is_split_as_the_library_does(pairs, text):
    for ours, theirs in pairs:
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode_bytes(ours.encode(text)) == text.encode()
        assert ours.vocab_size == len(TOKENS)


def test_the_rules_differ(pairs):
    (cl100k, _), (o200k, _) = pairs
    assert cl100k.encode(ODD) != o200k.encode(ODD)


def test_without_byte_fallback_text_is_lost():
    text = "some words and some more words\n" * 20
    config = TokenizerConfig(vocab_size=40)
    lossy = LossyPieces(train_on_texts([text], config, {"byte_fallback": False}))
    assert lossy.vocab_size == 40
    assert lossy.decode_bytes(lossy.encode(text)) == text.encode()
    assert lossy.decode_bytes(lossy.encode("some 字 words")) != "some 字 words".encode()
    with pytest.raises(UserError, match="too small for the characters"):  # the 256 bytes were not left out
        train_on_texts([text], config)


def test_a_file_is_read_out_of_its_package(tmp_path, monkeypatch):
    package = tmp_path / "litellm.whl"
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr(PUBLISHED["cl100k"].file, FILE)
    monkeypatch.setattr(published, "fetch_all", lambda packages, cache: {packages[0].name: package})
    assert published.fetch("cl100k", tmp_path).encode("ab1234") == [256 + 97 * 128 + 98, 256 + 49 * 128 + 50, 51, 52]
    with pytest.raises(UserError, match=r"litellm==1\.109\.1 has no file .*fb374"):
        published.fetch("o200k", tmp_path)
    monkeypatch.setattr(published, "fetch_all", lambda packages, cache: {packages[0].name: FetchError("no network")})
    with pytest.raises(UserError, match=r"cannot get the tokenizer qwen out of dashscope==2\.0\.2: no network"):
        published.fetch("qwen", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ids", "size"),
    [
        ("cl100k", [9906, 1917], 100_256),
        ("o200k", [13225, 2375], 199_998),
        ("qwen", [9707, 1879], 151_851),
        ("mistral", [22557, 1526], 32_000),
    ],
)
def test_the_released_ones(name, ids, size, tmp_path):
    tokenizer = published.fetch(name, tmp_path)
    assert tokenizer.encode("Hello world") == ids and tokenizer.vocab_size == size
    for text in TEXTS:
        assert name == "qwen" or tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
