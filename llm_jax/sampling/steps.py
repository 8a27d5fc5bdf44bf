"""The compiled programs that draw tokens with a KV cache: read prompts, draw, and let other prompts take rows over.

Prompts are padded on the left, so that every row's next token is written at the same index; padding has segment 0 and
is never looked at, and a row's positions count from its first real token. A prompt that takes over a row is laid so
that it ends at that index too: what the row held before is of segment 0 from then on. When all columns are drawn,
`compact` moves every row back by as many as none of them needs any longer.

B batch, R rows (B times the samples of each prompt), F rows taken over, P prompt length, C chunk of it, N columns (new
tokens), V vocabulary, D model.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import models
from llm_jax.config import ModelConfig, SamplingConfig
from llm_jax.models.cache import LayerCache
from llm_jax.sampling.processors import Processors, process

SMALLEST_LENGTH = 16


class Shape(NamedTuple):
    """What a compiled program is made for, beside the model and the processors."""

    samples: int  # of each prompt
    new_tokens: int  # columns
    chunk: int  # of the prompt
    cache_dtype: str
    for_update: bool = False  # note the kept mass, and logprobs of the logits over the temperature, as updates use


class Draws(NamedTuple):
    """How tokens are drawn; the same for every step."""

    processors: Processors
    key: jax.Array  # from which each row's follows
    stop_ids: jax.Array
    most: jax.Array  # int32 []: tokens that a row draws

    @classmethod
    def of(cls, sampling: SamplingConfig, stop_ids: Sequence[int]) -> "Draws":
        """Those of a configuration."""
        return cls(
            Processors.of(sampling),
            jax.random.key(sampling.seed),
            _stop_array(stop_ids),
            jnp.int32(sampling.max_new_tokens),
        )


class State(NamedTuple):
    """What a decoding step changes."""

    step: jax.Array  # int32 []: how many columns are drawn
    logits_RV: jax.Array  # of the next token
    cache: models.Cache
    position_R: jax.Array  # of the next token
    keys_R: jax.Array  # one random key for each row
    drawn_R: jax.Array  # int32, tokens until the row was done
    seen_RV: jax.Array  # bool; [R, 0] where no processor asks for it
    done_R: jax.Array  # bool
    tokens_RN: jax.Array
    logprobs_RN: jax.Array
    kept_mass_RN: jax.Array | None  # float32, the probability of all tokens that could be drawn; only for updates


@functools.partial(jax.jit, static_argnames=("config", "shape"))
def prefill(
    params: Any,
    config: ModelConfig,
    shape: Shape,
    draws: Draws,
    streams_B: jax.Array,
    tokens_BP: jax.Array,
    segment_ids_BP: jax.Array,
) -> State:
    """Run the prompts through the model, chunk by chunk, and draw each row's first token.

    The random numbers of a row depend on the key of `draws`, its stream (uint32 [B]), its sample and how many tokens it
    has drawn, and on nothing else.
    """
    return _begin(params, config, shape, draws, streams_B, tokens_BP, segment_ids_BP)


def _begin(
    params: Any,
    config: ModelConfig,
    shape: Shape,
    draws: Draws,
    streams_B: jax.Array,
    tokens_BP: jax.Array,
    segment_ids_BP: jax.Array,
) -> State:
    B, N, V = len(tokens_BP), shape.new_tokens, config.vocab_size
    R = B * shape.samples
    positions_BP = jnp.maximum(jnp.cumsum(segment_ids_BP, axis=1) - 1, 0)
    cache, logits_BV = _read(params, config, shape, tokens_BP, segment_ids_BP, positions_BP)
    seen_BV = jnp.zeros((B, V if draws.processors.repetition_penalty is not None else 0), bool)
    seen_BV = _mark(seen_BV, tokens_BP, segment_ids_BP > 0)
    repeat = functools.partial(jnp.repeat, repeats=shape.samples, axis=0)
    state = State(
        step=jnp.int32(0),
        logits_RV=repeat(logits_BV),
        cache=cache.repeat(shape.samples) if shape.samples > 1 else cache,
        position_R=repeat(positions_BP[:, -1] + 1),
        keys_R=_row_keys(draws.key, streams_B, shape.samples),
        drawn_R=jnp.zeros(R, jnp.int32),
        seen_RV=repeat(seen_BV),
        done_R=repeat(segment_ids_BP[:, -1] == 0),
        tokens_RN=jnp.zeros((R, N), jnp.int32),
        logprobs_RN=jnp.zeros((R, N), jnp.float32),
        kept_mass_RN=jnp.zeros((R, N), jnp.float32) if shape.for_update else None,
    )
    return _draw(state, draws)


def _read(
    params: Any,
    config: ModelConfig,
    shape: Shape,
    tokens_BP: jax.Array,
    segment_ids_BP: jax.Array,
    positions_BP: jax.Array,
) -> tuple[models.Cache, jax.Array]:
    """The cache with the prompts in it, and the logits [B, V] of what comes next."""
    B, P = tokens_BP.shape
    cache = models.init_cache(
        config,
        B,
        P + shape.new_tokens,
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
        return cache, models.unembed(params, config, last_B1D)[:, 0]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    params: Any,
    config: ModelConfig,
    draws: Draws,
    state: State,
    done_R: jax.Array,
    limit: jax.Array,
    enough: jax.Array | int,
) -> State:
    """Draw until `limit` columns are drawn or `enough` rows are done; `done_R` marks more rows as done."""

    def unfinished(state: State) -> jax.Array:
        return (state.step < limit) & (jnp.sum(state.done_R) < enough)

    def advance(state: State) -> State:
        return _draw(_feed(params, config, state), draws)

    return jax.lax.while_loop(unfinished, advance, state._replace(done_R=state.done_R | done_R))


@functools.partial(jax.jit, static_argnames=("config", "shape"), donate_argnames="state")
def refill(
    params: Any,
    config: ModelConfig,
    shape: Shape,
    draws: Draws,
    state: State,
    rows_F: jax.Array,
    streams_B: jax.Array,
    tokens_BP: jax.Array,
    segment_ids_BP: jax.Array,
) -> State:
    """Let the samples of other prompts take over rows that are done, and draw their first tokens into the last column.

    Args:
        params: as for `prefill`.
        config: the model.
        shape: as for `prefill`; P must be the same too.
        draws: as for `prefill`.
        state: at least one column is drawn.
        rows_F: int32, which row each sample takes; R or above for those of a prompt that is only padding.
        streams_B: as for `prefill`, with F = B * samples.
        tokens_BP: prompts, padded on the left.
        segment_ids_BP: theirs.
    """
    fresh = _begin(params, config, shape._replace(new_tokens=1), draws, streams_B, tokens_BP, segment_ids_BP)
    start = state.step - 1  # the column of what is drawn but not fed, and the first slot that a new prompt may fill

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[rows_F].set(new, mode="drop")

    def put_along(array: jax.Array, new: jax.Array, axis: int, row_axis: int = 0) -> jax.Array:
        window = jax.lax.dynamic_slice_in_dim(array, start, new.shape[axis], axis)
        window = jnp.moveaxis(put(jnp.moveaxis(window, row_axis, 0), jnp.moveaxis(new, row_axis, 0)), 0, row_axis)
        return jax.lax.dynamic_update_slice_in_dim(array, window, start, axis)

    row_axis = 1 if models.is_stacked(params) else 0
    cache = models.Cache(
        layers=jax.tree.map(
            lambda old, new: put_along(old, new, row_axis + 2, row_axis), state.cache.layers, fresh.cache.layers
        ),
        segment_ids=put_along(state.cache.segment_ids.at[rows_F].set(0, mode="drop"), fresh.cache.segment_ids, axis=1),
        length=state.cache.length,
        context_length=put(state.cache.context_length, fresh.cache.context_length),
    )
    columns = {
        name: put_along(getattr(state, name), getattr(fresh, name), axis=1)
        for name in ("tokens_RN", "logprobs_RN", "kept_mass_RN")
        if getattr(state, name) is not None
    }
    rows = {
        name: put(getattr(state, name), getattr(fresh, name))
        for name in ("logits_RV", "position_R", "keys_R", "drawn_R", "seen_RV", "done_R")
    }
    return state._replace(cache=cache, **columns, **rows)


@functools.partial(jax.jit, donate_argnames="state")
def compact(state: State, shift: jax.Array) -> State:
    """Move everything back by `shift` columns, whose slots no row that is not done needs."""
    stacked = isinstance(state.cache.layers, LayerCache)

    def back(array: jax.Array, axis: int) -> jax.Array:
        return jnp.roll(array, -shift, axis)

    length = state.cache.length - shift
    segment_ids = back(state.cache.segment_ids, 1)
    filled = jnp.arange(segment_ids.shape[1]) < length
    cache = state.cache._replace(
        layers=jax.tree.map(lambda slots: back(slots, 3 if stacked else 2), state.cache.layers),
        segment_ids=jnp.where(filled, segment_ids, 0),
        length=length,
    )
    return state._replace(
        step=state.step - shift,
        cache=cache,
        tokens_RN=back(state.tokens_RN, 1),
        logprobs_RN=back(state.logprobs_RN, 1),
        kept_mass_RN=None if state.kept_mass_RN is None else back(state.kept_mass_RN, 1),
    )


def _draw(state: State, draws: Draws) -> State:
    """Draw the next token of every row and note it; what a finished row draws is never read."""
    with jax.named_scope("draw"):
        processed_RV = process(state.logits_RV, state.seen_RV, draws.processors)
        if draws.processors.temperature is None:
            tokens_R = _argmax(processed_RV)
        else:
            keys_R = jax.vmap(jax.random.fold_in)(state.keys_R, state.drawn_R)
            tokens_R = jax.vmap(jax.random.categorical)(keys_R, processed_RV).astype(jnp.int32)
        for_update, temperature = state.kept_mass_RN is not None, draws.processors.temperature
        scaled_RV = state.logits_RV / temperature if for_update and temperature is not None else state.logits_RV
        drawn_R = jnp.take_along_axis(scaled_RV, tokens_R[:, None], axis=-1)[:, 0]
        normalizer_R = jax.nn.logsumexp(scaled_RV, axis=-1)
        kept_mass_RN = state.kept_mass_RN
        if kept_mass_RN is not None:
            kept_mass_R = jnp.exp(jax.nn.logsumexp(processed_RV, axis=-1) - normalizer_R)
            kept_mass_RN = _note(kept_mass_RN, kept_mass_R, state.step)
    drawn = state.drawn_R + ~state.done_R
    return state._replace(
        step=state.step + 1,
        drawn_R=drawn,
        seen_RV=_mark(state.seen_RV, tokens_R[:, None], ~state.done_R[:, None]),
        done_R=state.done_R | jnp.isin(tokens_R, draws.stop_ids) | (drawn >= draws.most),
        tokens_RN=_note(state.tokens_RN, tokens_R, state.step),
        logprobs_RN=_note(state.logprobs_RN, drawn_R - normalizer_R, state.step),
        kept_mass_RN=kept_mass_RN,
    )


def _note(columns_RN: jax.Array, values_R: jax.Array, step: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(columns_RN, values_R[:, None], (0, step))


def _argmax(logits_RV: jax.Array) -> jax.Array:
    """The first of the largest, int32 [R]: as two reductions, which XLA's CPU compiler turns into vector code."""
    largest_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
    ids_V = jnp.arange(logits_RV.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(logits_RV == largest_R1, ids_V, logits_RV.shape[-1] - 1), axis=-1)


def _feed(params: Any, config: ModelConfig, state: State) -> State:
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


def _row_keys(key: jax.Array, streams_B: jax.Array, samples: int) -> jax.Array:
    """A random key for each row, from the seed, its prompt's stream and the number of its sample."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys_B = fold(key, streams_B)
    return jax.vmap(fold, in_axes=(0, None))(keys_B, jnp.arange(samples, dtype=jnp.uint32)).reshape(-1)


def _stop_array(stop_ids: Sequence[int]) -> jax.Array:
    """The stop ids, int32, filled up to a power of two with what no token is."""
    no_ids = [-1] * (round_up(max(4, len(stop_ids))) - len(stop_ids))
    return jnp.asarray(np.array([*stop_ids, *no_ids], np.int32))


def shape_for(sampling: SamplingConfig, longest: int, for_update: bool = False) -> tuple[Shape, int]:
    """What to compile for, and in how many chunks prompts of at most `longest` tokens are read."""
    width = bucket(longest)
    chunk = min(width, bucket(sampling.prefill_chunk))
    new_tokens = bucket(sampling.max_new_tokens)
    return Shape(sampling.num_samples, new_tokens, chunk, sampling.cache_dtype, for_update), width // chunk


def programs() -> tuple[int, ...]:
    """How many programs have been compiled."""
    functions: tuple[Any, ...] = (prefill, decode, refill, compact)
    return tuple(function._cache_size() for function in functions)


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids, int32 [rows, width]; rows beyond the prompts are all padding."""
    tokens = np.full((rows, width), pad_id, np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segment_ids[row, width - len(prompt) :] = 1
    return tokens, segment_ids


def bucket(length: int) -> int:
    """The length to compile for."""
    return round_up(max(SMALLEST_LENGTH, length))


def round_up(number: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (number - 1).bit_length()
