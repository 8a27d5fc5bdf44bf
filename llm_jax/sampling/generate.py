"""Drawing continuations with a KV cache: one prefill and one loop, compiled once for a batch of any prompts.

Prompts are padded on the left, so that every row's next token is written at the same index; padding has segment 0 and
is never looked at, and a row's positions count from its first real token. Batch size, prompt length and the numbers of
new tokens and stop ids are rounded up to powers of two, so that other prompts seldom mean another compilation.

B batch, P prompt length, N new tokens, V vocabulary, D model.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import models
from llm_jax.config import ModelConfig, SamplingConfig
from llm_jax.errors import require
from llm_jax.sampling.processors import process

SMALLEST_LENGTH = 16


class Generation(NamedTuple):
    """A continuation."""

    tokens: list[int]  # a stop id that ended it is the last one
    logprobs: list[float]  # of each token under the whole vocabulary's distribution, before any processor
    finished: str  # "stop" or "length"


class _State(NamedTuple):
    """What a decoding step changes."""

    step: jax.Array  # int32 []: how many tokens are drawn
    logits_BV: jax.Array  # of the next token
    cache: models.Cache
    position_B: jax.Array  # of the next token
    seen_BV: jax.Array  # bool; [B, 0] where no processor asks for it
    done_B: jax.Array  # bool
    tokens_BN: jax.Array
    logprobs_BN: jax.Array


def generate(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
    bos_id: int = 1,
    streams: Sequence[int] | None = None,
) -> list[Generation]:
    """Continue every prompt by at most `sampling.max_new_tokens` tokens.

    The random numbers of a row depend on (seed, its stream, step) and nothing else: not on the other prompts, not on
    the padding. A prompt alone continues as it does in a batch if it is given the same stream.

    Args:
        params: the model's parameters.
        config: the model.
        prompts: token ids; an empty prompt starts from `bos_id`.
        sampling: the processors, the temperature (0 = greedy), the length and the seed.
        stop_ids: tokens after which a continuation ends.
        pad_id: what padding is filled with; no result depends on it.
        bos_id: the prompt in place of an empty one.
        streams: one number for each prompt; by default its index. Hosts that share a job should number them apart.

    Raises:
        UserError: a prompt does not leave room for the new tokens within `config.max_length`, holds an id outside
            the vocabulary, or `streams` does not have one number a prompt.
    """
    streams = list(range(len(prompts))) if streams is None else list(streams)
    require(len(streams) == len(prompts), f"generate: {len(streams)} streams for {len(prompts)} prompts")
    if not prompts:
        return []
    filled = [list(prompt) or [bos_id] for prompt in prompts]
    _check_prompts(filled, config, sampling)
    tokens_BP, segment_ids_BP = _pad_left(filled, pad_id)
    streams_B = np.zeros(len(tokens_BP), np.int32)
    streams_B[: len(streams)] = streams
    no_ids = [-1] * (_round_up(max(4, len(stop_ids))) - len(stop_ids))
    state = _continue(
        params,
        config,
        dataclasses.replace(sampling, max_new_tokens=_bucket(sampling.max_new_tokens), seed=0),
        jnp.asarray(tokens_BP),
        jnp.asarray(segment_ids_BP),
        jnp.asarray(streams_B),
        jnp.asarray(np.array([*stop_ids, *no_ids], np.int32)),
        jax.random.key(sampling.seed),
        jnp.int32(sampling.max_new_tokens),
    )
    steps, tokens_BN, logprobs_BN = jax.device_get((state.step, state.tokens_BN, state.logprobs_BN))
    return [_collect(steps, tokens_BN, logprobs_BN, row, stop_ids) for row in range(len(prompts))]


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def _continue(
    params: Any,
    config: ModelConfig,
    sampling: SamplingConfig,
    tokens_BP: jax.Array,
    segment_ids_BP: jax.Array,
    streams_B: jax.Array,
    stop_ids: jax.Array,
    key: jax.Array,
    limit: jax.Array,
) -> _State:
    """Prefill and decode until `limit` tokens are drawn or every row is done; rows of padding are done at once."""
    stream_keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(streams_B)

    def draw(state: _State) -> _State:
        return _draw(state, sampling, stream_keys_B, stop_ids)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < limit) & ~jnp.all(state.done_B)

    def advance(state: _State) -> _State:
        return draw(_feed(params, config, state))

    state = draw(_prefill(params, config, sampling, tokens_BP, segment_ids_BP))
    return jax.lax.while_loop(unfinished, advance, state)


def _prefill(
    params: Any, config: ModelConfig, sampling: SamplingConfig, tokens_BP: jax.Array, segment_ids_BP: jax.Array
) -> _State:
    """Run the prompts through the model; only the last position reaches the vocabulary."""
    B, P = tokens_BP.shape
    N, V = sampling.max_new_tokens, config.vocab_size
    cache = models.init_cache(config, B, P + N)
    positions_BP = jnp.maximum(jnp.cumsum(segment_ids_BP, axis=1) - 1, 0)
    with jax.named_scope("prefill"):
        hidden_BPD, cache = models.hidden_states(
            params, config, tokens_BP, positions=positions_BP, segment_ids=segment_ids_BP, cache=cache
        )
        logits_BV = models.unembed(params, config, hidden_BPD[:, -1:])[:, 0]
    seen_BV = jnp.zeros((B, V if sampling.repetition_penalty != 1 else 0), bool)
    return _State(
        step=jnp.int32(0),
        logits_BV=logits_BV,
        cache=cache,
        position_B=positions_BP[:, -1] + 1,
        seen_BV=_mark(seen_BV, tokens_BP, segment_ids_BP > 0),
        done_B=segment_ids_BP[:, -1] == 0,
        tokens_BN=jnp.zeros((B, N), jnp.int32),
        logprobs_BN=jnp.zeros((B, N), jnp.float32),
    )


def _draw(state: _State, sampling: SamplingConfig, stream_keys_B: jax.Array, stop_ids: jax.Array) -> _State:
    """Draw the next token of every row and note it; what a finished row draws is never read."""
    with jax.named_scope("draw"):
        processed_BV = process(state.logits_BV, state.seen_BV, sampling)
        if sampling.temperature == 0:
            tokens_B = jnp.argmax(processed_BV, axis=-1).astype(jnp.int32)
        else:
            keys_B = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(stream_keys_B)
            tokens_B = jax.vmap(jax.random.categorical)(keys_B, processed_BV).astype(jnp.int32)
        logprobs_BV = jax.nn.log_softmax(state.logits_BV, axis=-1)
        logprobs_B = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]
    return state._replace(
        step=state.step + 1,
        seen_BV=_mark(state.seen_BV, tokens_B[:, None], ~state.done_B[:, None]),
        done_B=state.done_B | jnp.isin(tokens_B, stop_ids),
        tokens_BN=jax.lax.dynamic_update_slice(state.tokens_BN, tokens_B[:, None], (0, state.step)),
        logprobs_BN=jax.lax.dynamic_update_slice(state.logprobs_BN, logprobs_B[:, None], (0, state.step)),
    )


def _feed(params: Any, config: ModelConfig, state: _State) -> _State:
    """Run the token drawn last through the model."""
    tokens_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BN, state.step - 1, 1, axis=1)
    with jax.named_scope("decode"):
        logits_B1V, cache = models.logits(
            params, config, tokens_B1, positions=state.position_B[:, None], cache=state.cache
        )
    return state._replace(logits_BV=logits_B1V[:, 0], cache=cache, position_B=state.position_B + 1)


def _mark(seen_BV: jax.Array, tokens_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
    """`seen_BV` with the real ones of some tokens marked."""
    if seen_BV.shape[1] == 0:
        return seen_BV
    rows_B1 = jnp.arange(seen_BV.shape[0])[:, None]
    return seen_BV.at[rows_B1, tokens_BT].max(real_BT)


def _collect(
    steps: np.ndarray, tokens_BN: np.ndarray, logprobs_BN: np.ndarray, row: int, stop_ids: Sequence[int]
) -> Generation:
    """A row's tokens up to its first stop id."""
    tokens = tokens_BN[row, : int(steps)].tolist()
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), None)
    logprobs = logprobs_BN[row, : len(tokens)].tolist()
    return Generation(tokens[:end], logprobs[:end], "length" if end is None else "stop")


def _check_prompts(prompts: list[list[int]], config: ModelConfig, sampling: SamplingConfig) -> None:
    for i, prompt in enumerate(prompts):
        total = len(prompt) + sampling.max_new_tokens
        require(
            total <= config.max_length,
            f"prompt {i} has {len(prompt)} tokens: with {sampling.max_new_tokens} new ones it passes the model's "
            f"max_length of {config.max_length}; shorten it or lower max_new_tokens",
        )
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        require(
            not outside,
            f"prompt {i} holds token {outside[0] if outside else ''}, the model's vocabulary is {config.vocab_size}: "
            "was it encoded by another tokenizer?",
        )


def _pad_left(prompts: list[list[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids, int32 [B, P]; B and P are powers of two, rows added to the batch are all padding."""
    width = _bucket(max(map(len, prompts)))
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
