"""Sentences scored by a transformer, and what tells one model from another."""

import math

import jax
import numpy as np
import pyarrow as pa
import pytest

from llm_jax import models as transformers
from llm_jax.config import ModelConfig
from llm_jax.data.stages import byte_ngrams
from llm_jax.evaluation import sentence_bits
from llm_jax.interop import pretrained


def test_a_transformer_says_how_likely_sentences_are(monkeypatch):
    class Letters:
        bos_id = 0

        def encode_batch(self, texts):
            return [[1 + ord(c) % 30 for c in text] for text in texts]

    config = ModelConfig(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
                         ffn_size=32, max_length=64)  # fmt: skip
    params = transformers.init(config, jax.random.key(0))
    monkeypatch.setattr(pretrained, "load", lambda path: pretrained.Pretrained(config, params, Letters(), ""))
    found = byte_ngrams.buffer(pa.array(["abc. Defgh.", "x"]))
    bits = sentence_bits.transformer_bits("a/run")(found, byte_ngrams.sentences(found))
    for text, got in zip(["abc. ", "Defgh.", "x"], bits, strict=True):
        ids = [0, *Letters().encode_batch([text])[0]]
        hidden = transformers.hidden_states(params, config, np.array([ids[:-1]]))[0]
        logprobs = jax.nn.log_softmax(hidden @ transformers.unembedding(params, config).T)
        wanted = -sum(float(logprobs[i, token]) for i, token in enumerate(ids[1:])) / math.log(2)
        assert got == pytest.approx(wanted, rel=1e-4)


def test_a_model_is_known_by_its_files(tmp_path):
    run = tmp_path / "run"
    for step in (9, 10):
        for item in ("config", "integrity", "params"):
            (run / "checkpoints" / str(step) / item).mkdir(parents=True)
            (run / "checkpoints" / str(step) / item / "data").write_text(item)
    for name in ("config.json", "tokenizer.model", "metrics.jsonl"):
        (run / name).write_text(name)
    newest = run / "checkpoints" / "10"
    wanted = [run / "config.json", run / "tokenizer.model", newest / "config" / "data", newest / "integrity" / "data"]
    assert sentence_bits.model_files(str(run)) == wanted
    assert sentence_bits.model_files(str(newest / "config")) == [newest / "config" / "data"]  # a folder of another kind
    (tmp_path / "model.gguf").write_text("")
    assert sentence_bits.model_files(str(tmp_path / "model.gguf")) == [tmp_path / "model.gguf"]
