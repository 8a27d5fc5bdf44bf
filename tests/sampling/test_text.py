"""Continuing text: the ids on either side, and what is printed is the text that was drawn."""

import unicodedata

import pytest

from llm_jax.config import ModelConfig, SamplingConfig, TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.sampling import text
from llm_jax.sampling.generate import Generation
from llm_jax.tokenization.sentencepiece_model import SentencePieceTokenizer
from llm_jax.tokenization.train import train_on_texts

TEXTS = ["one two three 一二三\n" * 9]


@pytest.fixture(params=["baichuan2", "llama2"])
def tokenizer(request) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_on_texts(TEXTS, TokenizerConfig(vocab_size=285, style=request.param)))


def completed(monkeypatch, tokenizer, prompts, continuations, samples=1, **more):
    """What `complete` makes of continuations drawn by a stand-in for the model, and the prompts it was given."""
    given = {}

    def generate(params, config, prompts, sampling, **options):
        given.update(prompts=prompts, **options)
        return [Generation(tokens, [0.0] * len(tokens), "stop") for tokens in continuations]

    monkeypatch.setattr(text, "generate", generate)
    sampling = SamplingConfig(num_samples=samples)
    return text.complete(None, ModelConfig(vocab_size=300), tokenizer, prompts, sampling, **more), given


def test_prompts_are_encoded_as_documents_begin(monkeypatch, tokenizer):
    _, given = completed(monkeypatch, tokenizer, ["one", ""], [[2], [2]])
    assert given["prompts"] == [[1, *tokenizer.encode("one")], [1]]
    assert (given["stop_ids"], given["pad_id"]) == ([2], 0)


@pytest.mark.parametrize(("whole", "cut"), [("one two three", 3), ("one二三\n 一", 3), ("一二 \u2581", 2), ("one", 0)])
def test_a_completion_is_the_rest_of_the_text(monkeypatch, tokenizer, whole, cut):
    prompt = tokenizer.encode(whole[:cut])
    marked = tokenizer.encode(whole)
    if marked[: len(prompt)] != prompt:  # another segmentation at the border: spell the rest in bytes
        marked = prompt + [3 + byte for byte in whole[cut:].encode()]
    (sample,), _ = completed(monkeypatch, tokenizer, [whole[:cut]], [[*marked[len(prompt) :], tokenizer.eos_id]])
    assert (sample.prompt, sample.completion) == (whole[:cut], whole[cut:])
    assert (sample.tokens, sample.finished) == (len(marked) - len(prompt) + 1, "stop")


def test_ids_beyond_the_tokenizer_print_as_nothing(monkeypatch, tokenizer):
    (sample,), _ = completed(monkeypatch, tokenizer, ["one"], [[299]])
    assert (sample.completion, sample.tokens) == ("", 1)


def test_text_ends_before_a_stop_string(monkeypatch, tokenizer):
    ids = tokenizer.encode(" two three")
    options = {"stop_strings": ["thr", "o t"]}
    (sample,), given = completed(monkeypatch, tokenizer, ["one"], [ids], **options)
    assert sample.completion.strip() == "tw"
    assert (given["stop_strings"], given["tokenizer"]) == (["thr", "o t"], tokenizer)


def test_each_sample_belongs_to_its_prompt(monkeypatch, tokenizer):
    prompts, ids = ["one ", "two "], [tokenizer.encode(word) for word in ("一", "二", "三", "one")]
    samples, _ = completed(monkeypatch, tokenizer, prompts, ids, 2)
    assert [sample.prompt for sample in samples] == ["one ", "one ", "two ", "two "]


def test_a_normalised_prompt_takes_nothing_off_the_completion(monkeypatch, tokenizer):
    class Composing:
        bos_id = eos_id = pad_id = -1
        vocab_size = 256

        def encode_batch(self, texts):
            return [list(unicodedata.normalize("NFC", text).encode()) for text in texts]

        def decode_bytes(self, ids):
            return bytes(ids)

    (sample,), _ = completed(monkeypatch, Composing(), ["cafe\u0301"], [list(b" is nice")])
    assert sample.completion == " is nice"
    with pytest.raises(UserError, match="prompt 1 is empty, and this tokenizer has no bos"):
        completed(monkeypatch, Composing(), ["a", ""], [[1], [1]])
