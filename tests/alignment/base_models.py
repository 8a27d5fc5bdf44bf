"""Small random models as the folders of runs, for what trains models further."""

from pathlib import Path

import jax

from llm_jax import models
from llm_jax.config import ModelConfig, TokenizerConfig
from llm_jax.tokenization.train import train_on_texts
from llm_jax.training import checkpoint

WORDS = ("one", "two", "three")
MODEL = ModelConfig(
    vocab_size=320, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, ffn_size=32, max_length=64,
    init_std=0.3,
)  # fmt: skip


def make(folder: Path, model: ModelConfig = MODEL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = train_on_texts([" ".join(WORDS) + " 一二三\n"] * 9, TokenizerConfig(vocab_size=285))
    (folder / "tokenizer.model").write_bytes(vocabulary)
    checkpoint.save_model(folder, model, models.init(model, jax.random.key(0)))
    return folder
