"""Drawing continuations with a KV cache: one prefill and one loop, compiled once for a batch of any prompts.

Batch size, prompt length and the numbers of new tokens and stop ids are rounded up to powers of two, so that other
prompts seldom mean another compilation; the log says when there is one.

The loop runs on the device, see `steps`. Where the caller listens (`on_tokens`) or text can end a row (`stop_strings`),
it comes back every few tokens and goes on in the same compiled program.

B batch, P prompt length.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import ModelConfig, SamplingConfig
from llm_jax.errors import require
from llm_jax.sampling import steps
from llm_jax.sampling.processors import Processors
from llm_jax.sampling.rows import Generation, Rows
from llm_jax.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LISTENING_BLOCK = 4  # tokens between two looks at the rows where someone listens
TEXT_BLOCK = 16  # the same where only stop strings are looked for

OnTokens = Callable[[int, list[int]], None]


def generate(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    on_tokens: OnTokens | None = None,
    pad_id: int = 0,
    bos_id: int = 1,
    streams: Sequence[int] | None = None,
) -> list[Generation]:
    """Continue every prompt by at most `sampling.max_new_tokens` tokens.

    The random numbers of a row depend on (seed, its stream, its sample, step) and nothing else: not on the other
    prompts, not on the padding. A prompt alone continues as it does in a batch if it is given the same stream.

    Args:
        params: the model's parameters; those of `models.for_decoding` decode fastest.
        config: the model.
        prompts: token ids; an empty prompt starts from `bos_id`.
        sampling: the processors, the temperature (0 = greedy), the lengths, the number of samples and the seed.
        stop_ids: tokens after which a continuation ends.
        stop_strings: texts after which a continuation ends, with the token that completes them; needs `tokenizer`.
        tokenizer: turns ids into text for `stop_strings`.
        on_tokens: called with a row's number in the result and its new tokens, as they come, a few at a time.
        pad_id: what padding is filled with; no result depends on it.
        bos_id: the prompt in place of an empty one.
        streams: one number for each prompt; by default its index. Hosts that share a job should number them apart.

    Returns:
        `sampling.num_samples` continuations of the first prompt, then of the second, and so on.

    Raises:
        UserError: a prompt does not leave room for the new tokens within `sampling.max_context` (by default the
            model's `max_length`) or holds an id outside the vocabulary, `streams` does not have one number a prompt,
            or `stop_strings` come without a tokenizer or empty.
    """
    streams_B = check_streams(range(len(prompts)) if streams is None else streams, len(prompts))
    if not prompts:
        return []
    rows = Rows(len(prompts) * sampling.num_samples, stop_ids, stop_strings, tokenizer, on_tokens)
    filled = [list(prompt) or [bos_id] for prompt in prompts]
    check_prompts(filled, config, sampling)
    draws = steps.Draws.of(sampling, stop_ids)
    shape, chunks = steps.shape_for(sampling, max(map(len, filled)))
    size = steps.round_up(len(prompts))
    tokens_BP, segment_ids_BP = steps.pad_left(filled, pad_id, size, shape.chunk * chunks)
    before = steps.programs()
    streams_B = np.pad(streams_B, (0, size - len(prompts)))
    state = steps.prefill(params, config, shape, draws, streams_B, tokens_BP, segment_ids_BP)
    block = LISTENING_BLOCK if on_tokens is not None else TEXT_BLOCK if stop_strings else sampling.max_new_tokens
    limit = 0
    while limit < sampling.max_new_tokens and not rows.all_done:
        limit = min(limit + block, sampling.max_new_tokens)
        done_R = rows.done(len(state.done_R))
        state = steps.decode(params, config, draws, state, done_R, jnp.int32(limit), jnp.int32(len(done_R)))
        rows.update(*jax.device_get((state.step, state.tokens_RN, state.logprobs_RN)))
    if steps.programs() != before:
        _announce(config, shape, tokens_BP.shape, draws.processors)
    return rows.generations()


def _announce(config: ModelConfig, shape: steps.Shape, tokens: tuple[int, ...], processors: Processors) -> None:
    """Log what was compiled."""
    logger.info(
        "generate: compiled for a batch of %d prompts x %d samples, prompts up to %d, %d new tokens, cache %s; %s",
        tokens[0],
        shape.samples,
        tokens[1],
        shape.new_tokens,
        shape.cache_dtype or config.compute_dtype,
        ", ".join(processors.names()),
    )


def check_streams(streams: Iterable[int], prompts: int) -> np.ndarray:
    """The streams of some prompts, uint32; `UserError` unless there is one of 32 bits for each."""
    given = list(streams)
    require(len(given) == prompts, f"generate: {len(given)} streams for {prompts} prompts")
    require(all(0 <= stream < 2**32 for stream in given), "generate: streams must be from 0 to 2^32 - 1")
    return np.array(given, np.uint32)


def check_prompts(
    prompts: Sequence[Sequence[int]], config: ModelConfig, sampling: SamplingConfig, names: Sequence[str] = ()
) -> None:
    """Raise `UserError` where a prompt leaves no room for the new tokens or holds what is no id of the model's.

    `names` are what messages call the prompts; by default their numbers.
    """
    room = sampling.max_context or config.max_length
    for prompt, name in zip(prompts, names or [f"prompt {i}" for i in range(len(prompts))], strict=True):
        total = len(prompt) + sampling.max_new_tokens
        require(
            total <= room,
            f"{name} has {len(prompt)} tokens: with {sampling.max_new_tokens} new ones it passes the room of "
            f"{room}; shorten it, lower max_new_tokens or raise max_context (the model's max_length is "
            f"{config.max_length})",
        )
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        require(
            not outside,
            f"{name} holds token {outside[0] if outside else ''}, the model's vocabulary is {config.vocab_size}: "
            "was it encoded by another tokenizer?",
        )
