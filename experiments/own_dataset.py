"""A tokenizer and a dataset of its corpus as it is, for experiments that train models of their own."""

import dataclasses
from pathlib import Path

from experiments import train_tokenizer
from llm_jax import config as config_lib
from llm_jax.config import CorpusConfig, TokenizerConfig
from llm_jax.data import pipeline
from llm_jax.errors import require
from llm_jax.tokenization import tokenizer as tokenizers


def make(tokenizer: TokenizerConfig, corpus: CorpusConfig, workdir: Path) -> Path:
    """The folder of the dataset, made unless it is there: `workdir/data/dataset`, of `workdir/tokenizer`'s ids.

    The tokenizer is trained on `corpus`, whatever corpus its own config names. Raises `UserError` if `workdir` holds
    others.
    """
    model = make_tokenizer(dataclasses.replace(tokenizer, corpus=corpus), workdir / "tokenizer")
    dataset = workdir / "data" / "dataset"
    pipeline.prepare(dataclasses.replace(corpus, output=str(dataset)), tokenizers.load(model))
    return dataset


def make_tokenizer(config: TokenizerConfig, folder: Path) -> Path:
    """The tokenizer's model file, trained unless it is there; `UserError` if that one has other settings."""
    saved, model = folder / "config.json", folder / "tokenizer.model"
    if saved.is_file():
        require(
            config_lib.load(TokenizerConfig, saved) == config,
            f"{folder} holds a tokenizer of other settings: choose another --workdir",
        )
        return model
    train_tokenizer.run(config, folder)
    config_lib.save(config, saved)  # last: its presence says that the tokenizer is whole
    return model
