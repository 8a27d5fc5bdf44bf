"""Continuing text: a tokenizer on either side of `generate`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llm_jax.config import ModelConfig, SamplingConfig
from llm_jax.errors import require
from llm_jax.sampling.generate import OnTokens, generate
from llm_jax.sampling.rows import Generation
from llm_jax.tokenization.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt and what follows it."""

    prompt: str
    completion: str
    tokens: int  # drawn, the end of the document included
    finished: str  # "stop": the model ended the document; "length": it was cut


def complete(
    params: Any,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    *,
    stop_strings: Sequence[str] = (),
    on_tokens: OnTokens | None = None,
) -> list[Completion]:
    """Continue the beginnings of documents, each up to the document's end or `sampling.max_new_tokens`.

    Prompts are encoded as training documents are: after bos, where the tokenizer has one. A continuation also ends
    before the first of `stop_strings`. `sampling.num_samples` completions of the first prompt come first. `on_tokens`
    and what is raised are those of `generate`; an empty prompt is refused where the tokenizer has no bos.
    """
    start = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    stop = [tokenizer.eos_id] if tokenizer.eos_id >= 0 else []
    encoded = tokenizer.encode_batch(prompts)
    empty = [i for i, ids in enumerate(encoded) if not start and not ids]
    require(not empty, f"prompt {empty[0] if empty else ''} is empty, and this tokenizer has no bos to begin with")
    generations = generate(
        params,
        config,
        [start + ids for ids in encoded],
        sampling,
        stop_ids=stop,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        on_tokens=on_tokens,
        pad_id=max(0, tokenizer.pad_id),
    )
    origins = [i // sampling.num_samples for i in range(len(generations))]
    rows = zip(origins, generations)
    return [_decode(tokenizer, prompts[i], encoded[i], generation, stop_strings) for i, generation in rows]


def describe(sampling: SamplingConfig) -> str:
    """How samples are drawn, in words."""
    if sampling.temperature == 0:
        parts = ["greedy"]
    else:
        parts = [f"temperature {sampling.temperature:g}"]
        parts += [f"top-k {sampling.top_k}"] if sampling.top_k else []
        parts += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    parts += [f"repetition penalty {sampling.repetition_penalty:g}"] if sampling.repetition_penalty != 1 else []
    return ", ".join(parts)


def _decode(
    tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], generation: Generation, stop_strings: Sequence[str]
) -> Completion:
    """Decode the whole text and take the prompt off: alone, a continuation could lose its first space."""
    # A model's vocabulary may be padded beyond the tokenizer's: such ids stand for no text.
    ids = [token for token in generation.tokens if token < tokenizer.vocab_size]
    start = len(tokenizer.decode_bytes(prompt_ids))  # not the prompt's own length: a tokenizer may normalise it
    text = tokenizer.decode_bytes(prompt_ids + ids)[start:].decode(errors="replace")
    ends = [text.find(stop) for stop in stop_strings if stop in text]
    return Completion(prompt, text[: min(ends, default=None)], len(generation.tokens), generation.finished)
