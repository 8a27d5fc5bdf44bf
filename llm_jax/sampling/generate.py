"""Drawing continuations with a KV cache: one prefill and one loop, compiled once for a batch of any prompts.

Prompts are padded on the left, so that every row's next token is written at the same index; padding has segment 0 and
is never looked at, and a row's positions count from its first real token. Batch size, prompt length and the numbers of
new tokens and stop ids are rounded up to powers of two, so that other prompts seldom mean another compilation; the log
says when there is one.

The loop runs on the device. Where the caller listens (`on_tokens`) or text can end a row (`stop_strings`), it comes
back every few tokens and goes on in the same compiled program.

B batch, R rows (B times the samples of each prompt), P prompt length, C chunk of it, N new tokens, V vocabulary,
D model.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import models
from llm_jax.config import ModelConfig, SamplingConfig
from llm_jax.errors import require
from llm_jax.sampling.processors import Processors, process
from llm_jax.sampling.rows import Generation, Rows
from llm_jax.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SMALLEST_LENGTH = 16
LISTENING_BLOCK = 4  # tokens between two looks at the rows where someone listens
TEXT_BLOCK = 16  # the same where only stop strings are looked for

OnTokens = Callable[[int, list[int]], None]


class _Shape(NamedTuple):
    """What a compiled program is made for, beside the model and the processors."""

    samples: int  # of each prompt
    new_tokens: int
    chunk: int  # of the prompt
    cache_dtype: str


class _State(NamedTuple):
    """What a decoding step changes."""

    step: jax.Array  # int32 []: how many tokens are drawn
    logits_RV: jax.Array  # of the next token
    cache: models.Cache
    position_R: jax.Array  # of the next token
    seen_RV: jax.Array  # bool; [R, 0] where no processor asks for it
    done_R: jax.Array  # bool
    tokens_RN: jax.Array
    logprobs_RN: jax.Array


class _Draws(NamedTuple):
    """How tokens are drawn; the same for every step."""

    processors: Processors
    keys_R: jax.Array  # one random key for each row
    stop_ids: jax.Array


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
    streams = list(range(len(prompts))) if streams is None else list(streams)
    require(len(streams) == len(prompts), f"generate: {len(streams)} streams for {len(prompts)} prompts")
    require(all(0 <= stream < 2**32 for stream in streams), "generate: streams must be from 0 to 2^32 - 1")
    if not prompts:
        return []
    rows = Rows(len(prompts) * sampling.num_samples, stop_ids, stop_strings, tokenizer, on_tokens)
    filled = [list(prompt) or [bos_id] for prompt in prompts]
    _check_prompts(filled, config, sampling)
    processors = Processors.of(sampling)
    shape, chunks = _shape(sampling, max(map(len, filled)))
    tokens_BP, segment_ids_BP = _pad_left(filled, pad_id, shape.chunk * chunks)
    before = _programs()
    draws = _Draws(processors, _row_keys(sampling, streams, len(tokens_BP)), _stop_array(stop_ids))
    state = _prefill(params, config, shape, draws, tokens_BP, segment_ids_BP)
    block = LISTENING_BLOCK if on_tokens is not None else TEXT_BLOCK if stop_strings else sampling.max_new_tokens
    limit = 0
    while limit < sampling.max_new_tokens and not rows.all_done:
        limit = min(limit + block, sampling.max_new_tokens)
        state = _decode(params, config, draws, state, rows.done(len(state.done_R)), jnp.int32(limit))
        rows.update(*jax.device_get((state.step, state.tokens_RN, state.logprobs_RN)))
    if _programs() != before:
        _announce(config, shape, tokens_BP.shape, processors)
    return rows.generations()


@functools.partial(jax.jit, static_argnames=("config", "shape"))
def _prefill(
    params: Any,
    config: ModelConfig,
    shape: _Shape,
    draws: _Draws,
    tokens_BP: jax.Array,
    segment_ids_BP: jax.Array,
) -> _State:
    """Run the prompts through the model, chunk by chunk, and draw each row's first token."""
    B, P = tokens_BP.shape
    R, N, V = B * shape.samples, shape.new_tokens, config.vocab_size
    positions_BP = jnp.maximum(jnp.cumsum(segment_ids_BP, axis=1) - 1, 0)
    cache = models.init_cache(
        config,
        B,
        P + N,
        shape.cache_dtype or None,
        context_length=jnp.sum(segment_ids_BP, axis=1),
        stacked=models.is_stacked(params),
    )

    def read(i: jax.Array, carry: tuple[models.Cache, jax.Array]) -> tuple[models.Cache, jax.Array]:
        cache, _ = carry
        inputs = (tokens_BP, positions_BP, segment_ids_BP)
        chunk, positions, ids = (jax.lax.dynamic_slice_in_dim(x, i * shape.chunk, shape.chunk, 1) for x in inputs)
        hidden_BCD, cache = models.hidden_states(
            params, config, chunk, positions=positions, segment_ids=ids, cache=cache
        )
        return cache, hidden_BCD[:, -1:]

    with jax.named_scope("prefill"):
        empty_B1D = jnp.zeros((B, 1, config.hidden_size), config.compute_dtype)
        cache, last_B1D = jax.lax.fori_loop(0, P // shape.chunk, read, (cache, empty_B1D))
        logits_BV = models.unembed(params, config, last_B1D)[:, 0]
    seen_BV = jnp.zeros((B, V if draws.processors.repetition_penalty is not None else 0), bool)
    seen_BV = _mark(seen_BV, tokens_BP, segment_ids_BP > 0)
    repeat = functools.partial(jnp.repeat, repeats=shape.samples, axis=0)
    state = _State(
        step=jnp.int32(0),
        logits_RV=repeat(logits_BV),
        cache=cache.repeat(shape.samples) if shape.samples > 1 else cache,
        position_R=repeat(positions_BP[:, -1] + 1),
        seen_RV=repeat(seen_BV),
        done_R=repeat(segment_ids_BP[:, -1] == 0),
        tokens_RN=jnp.zeros((R, N), jnp.int32),
        logprobs_RN=jnp.zeros((R, N), jnp.float32),
    )
    return _draw(state, draws)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _decode(
    params: Any, config: ModelConfig, draws: _Draws, state: _State, done_R: jax.Array, limit: jax.Array
) -> _State:
    """Draw until `limit` tokens are drawn or every row is done; `done_R` marks more rows as done."""

    def unfinished(state: _State) -> jax.Array:
        return (state.step < limit) & ~jnp.all(state.done_R)

    def advance(state: _State) -> _State:
        return _draw(_feed(params, config, state), draws)

    return jax.lax.while_loop(unfinished, advance, state._replace(done_R=state.done_R | done_R))


def _draw(state: _State, draws: _Draws) -> _State:
    """Draw the next token of every row and note it; what a finished row draws is never read."""
    with jax.named_scope("draw"):
        processed_RV = process(state.logits_RV, state.seen_RV, draws.processors)
        if draws.processors.temperature is None:
            tokens_R = _argmax(processed_RV)
        else:
            keys_R = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(draws.keys_R)
            tokens_R = jax.vmap(jax.random.categorical)(keys_R, processed_RV).astype(jnp.int32)
        drawn_R = jnp.take_along_axis(state.logits_RV, tokens_R[:, None], axis=-1)[:, 0]
        logprobs_R = drawn_R - jax.nn.logsumexp(state.logits_RV, axis=-1)
    return state._replace(
        step=state.step + 1,
        seen_RV=_mark(state.seen_RV, tokens_R[:, None], ~state.done_R[:, None]),
        done_R=state.done_R | jnp.isin(tokens_R, draws.stop_ids),
        tokens_RN=jax.lax.dynamic_update_slice(state.tokens_RN, tokens_R[:, None], (0, state.step)),
        logprobs_RN=jax.lax.dynamic_update_slice(state.logprobs_RN, logprobs_R[:, None], (0, state.step)),
    )


def _argmax(logits_RV: jax.Array) -> jax.Array:
    """The first of the largest, int32 [R]: as two reductions, which XLA's CPU compiler turns into vector code."""
    largest_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
    ids_V = jnp.arange(logits_RV.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(logits_RV == largest_R1, ids_V, logits_RV.shape[-1] - 1), axis=-1)


def _feed(params: Any, config: ModelConfig, state: _State) -> _State:
    """Run the token drawn last through the model."""
    tokens_R1 = jax.lax.dynamic_slice_in_dim(state.tokens_RN, state.step - 1, 1, axis=1)
    with jax.named_scope("decode"):
        logits_R1V, cache = models.logits(
            params, config, tokens_R1, positions=state.position_R[:, None], cache=state.cache
        )
    return state._replace(logits_RV=logits_R1V[:, 0], cache=cache, position_R=state.position_R + 1)


def _mark(seen_BV: jax.Array, tokens_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
    """`seen_BV` with the real ones of some tokens marked."""
    if seen_BV.shape[1] == 0:
        return seen_BV
    rows_B1 = jnp.arange(seen_BV.shape[0])[:, None]
    return seen_BV.at[rows_B1, tokens_BT].max(real_BT)


def _row_keys(sampling: SamplingConfig, streams: Sequence[int], batch_size: int) -> jax.Array:
    """A random key for each row, from the seed, its prompt's stream and the number of its sample."""
    streams_B = np.zeros(batch_size, np.uint32)
    streams_B[: len(streams)] = streams
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys_B = fold(jax.random.key(sampling.seed), streams_B)
    samples = np.arange(sampling.num_samples, dtype=np.uint32)
    return jax.vmap(fold, in_axes=(0, None))(keys_B, samples).reshape(-1)


def _stop_array(stop_ids: Sequence[int]) -> jax.Array:
    """The stop ids, int32, filled up to a power of two with what no token is."""
    no_ids = [-1] * (_round_up(max(4, len(stop_ids))) - len(stop_ids))
    return jnp.asarray(np.array([*stop_ids, *no_ids], np.int32))


def _shape(sampling: SamplingConfig, longest: int) -> tuple[_Shape, int]:
    """What to compile for, and in how many chunks prompts of at most `longest` tokens are read."""
    width = _bucket(longest)
    chunk = min(width, _bucket(sampling.prefill_chunk))
    shape = _Shape(sampling.num_samples, _bucket(sampling.max_new_tokens), chunk, sampling.cache_dtype)
    return shape, width // chunk


def _programs() -> tuple[int, ...]:
    """How many programs have been compiled."""
    functions: tuple[Any, ...] = (_prefill, _decode)
    return tuple(function._cache_size() for function in functions)


def _announce(config: ModelConfig, shape: _Shape, tokens: tuple[int, ...], processors: Processors) -> None:
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


def _check_prompts(prompts: list[list[int]], config: ModelConfig, sampling: SamplingConfig) -> None:
    room = sampling.max_context or config.max_length
    for i, prompt in enumerate(prompts):
        total = len(prompt) + sampling.max_new_tokens
        require(
            total <= room,
            f"prompt {i} has {len(prompt)} tokens: with {sampling.max_new_tokens} new ones it passes the room of "
            f"{room}; shorten it, lower max_new_tokens or raise max_context (the model's max_length is "
            f"{config.max_length})",
        )
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        require(
            not outside,
            f"prompt {i} holds token {outside[0] if outside else ''}, the model's vocabulary is {config.vocab_size}: "
            "was it encoded by another tokenizer?",
        )


def _pad_left(prompts: list[list[int]], pad_id: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids, int32 [B, width]; B is a power of two, rows added to the batch are all padding."""
    tokens = np.full((_round_up(len(prompts)), width), pad_id, np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segment_ids[row, width - len(prompt) :] = 1
    return tokens, segment_ids


def _bucket(length: int) -> int:
    """The length to compile for."""
    return _round_up(max(SMALLEST_LENGTH, length))


def _round_up(number: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (number - 1).bit_length()
