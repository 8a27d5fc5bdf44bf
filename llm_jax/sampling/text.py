"""Continuing text: a tokenizer on either side of `generate`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llm_jax.config import ModelConfig, SamplingConfig
from llm_jax.sampling.generate import Generation, generate
from llm_jax.tokenization.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt and what follows it."""

    prompt: str
    completion: str
    tokens: int  # drawn, the end of the document included
    finished: str  # "stop": the model ended the document; "length": it was cut


def complete(
    params: Any, config: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig
) -> list[Completion]:
    """Continue the beginnings of documents, each up to the document's end or `sampling.max_new_tokens`.

    Prompts are encoded as training documents are: after bos, where the tokenizer has one. Raises what `generate` does.
    """
    start = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    stop = [tokenizer.eos_id] if tokenizer.eos_id >= 0 else []
    encoded = tokenizer.encode_batch(prompts)
    generations = generate(
        params, config, [start + ids for ids in encoded], sampling, stop_ids=stop, pad_id=tokenizer.pad_id
    )
    return [_decode(tokenizer, *row) for row in zip(prompts, encoded, generations)]


def _decode(tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], generation: Generation) -> Completion:
    """Decode the whole text and take the prompt off: alone, a continuation could lose its first space."""
    # A model's vocabulary may be padded beyond the tokenizer's: such ids stand for no text.
    ids = [token for token in generation.tokens if token < tokenizer.vocab_size]
    text = tokenizer.decode_bytes(prompt_ids + ids)[len(prompt.encode()) :].decode(errors="replace")
    return Completion(prompt, text, len(generation.tokens), generation.finished)
