"""Where a model looks in a dialogue: its attention probabilities, binned by the parts of the text (LLaMA-2, figure 10).

The kernels that models run with never hold these probabilities. Here they are computed anew from the queries and keys
of every layer, one layer at a time, and reduced to the parts before the next.

B batch, T length, S keys, D model, N heads, K kv heads, H head dim, L layers, P parts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.errors import require
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import fold_queries, masked_scores
from llm_jax.models import decoder, positions
from llm_jax.models.layers import Block, Embedding
from llm_jax.tokenization.chat import ChatTemplate, Message, Segment

BEFORE, INSTRUCTION = 0, 1  # parts: what comes before the instruction, and it; then a question and a reply by turns
SHORTEST = 64  # tokens; lengths are rounded up to powers of two, so that few programs are compiled


class Attention(NamedTuple):
    """How much the tokens of one part look at those of another: [L, N, P, P], the looking part first."""

    mass: np.ndarray  # float32: what a token's probabilities add up to over the other part, on average
    largest: np.ndarray  # float32: the largest probability


def attention_probabilities(
    q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask, rotary: positions.RotaryTables | None
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + bias), float32 [B,N,T,S], of queries and keys that are not rotated yet."""
    if rotary is not None:
        q_BTNH, k_BSKH = positions.rotate(q_BTNH, rotary), positions.rotate(k_BSKH, rotary)
    (B, T, N, _), S = q_BTNH.shape, k_BSKH.shape[1]
    q_BKRH = fold_queries(mask.scale_queries(q_BTNH), k_BSKH.shape[2])
    scores_BKRS = masked_scores(q_BKRH, k_BSKH.transpose(0, 2, 1, 3), mask.visible(T, S), mask.bias(T, S))
    return jax.nn.softmax(scores_BKRS, axis=-1).reshape(B, N, T, S)


def by_part(params: Any, config: ModelConfig, tokens: Sequence[int], parts: Sequence[int]) -> Attention:
    """The attention of one text between its parts.

    Args:
      params: as from `models.init`, one layer's beside the other (not those of `for_decoding`).
      config: the model.
      tokens: ids [T].
      parts: the part of every token, from 0 on.

    Raises:
      UserError: the text is longer than the model's max_length.
    """
    length, count = len(tokens), max(parts) + 1
    require(
        length <= config.max_length,
        f"the dialogue has {length} tokens, and the model reads {config.max_length}: ask for fewer turns",
    )
    padded = max(SHORTEST, 1 << (length - 1).bit_length())
    room = (0, padded - length)
    tokens_1T = np.pad(np.asarray(tokens, np.int32), room)[None]
    segments_1T = np.pad(np.ones(length, np.int32), room)[None]
    members_PT = np.pad(np.equal.outer(np.arange(count), parts).astype(np.float32), ((0, 0), room))
    found = _by_part(params, config, tokens_1T, segments_1T, members_PT)
    return Attention(*jax.device_get(found))


@functools.partial(jax.jit, static_argnames="config")
def _by_part(
    params: Any, config: ModelConfig, tokens_1T: jax.Array, segments_1T: jax.Array, members_PT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mass and largest probability, [L,N,P,P]; padding is a member of no part."""
    positions_1T = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
    mask = decoder.attention_mask(config, positions_1T, segments_1T, None)
    rotary = decoder.position_tables(config, positions_1T, segments_1T, None)
    sizes_P = jnp.maximum(jnp.sum(members_PT, axis=1), 1.0)
    windows_L = jnp.asarray(config.window_sizes or (0,) * config.num_layers, jnp.int32)

    def body(x_1TD: jax.Array, layer: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        layer_params, window = layer
        layer_mask = dataclasses.replace(mask, window=window)
        x_1TD, q_1TNH, k_1TKH = _block(config, layer_params, x_1TD, layer_mask, rotary)
        probabilities_NTS = attention_probabilities(q_1TNH, k_1TKH, layer_mask, rotary)[0]
        sums_NPP = jnp.einsum("nts,qt,ks->nqk", probabilities_NTS, members_PT, members_PT)
        return x_1TD, (sums_NPP / sizes_P[:, None], _largest(probabilities_NTS, members_PT))

    x_1TD: Any = Embedding(config).apply({"params": params["embedding"]}, tokens_1T)
    return jax.lax.scan(body, x_1TD, (params["layers"], windows_L))[1]


def _block(
    config: ModelConfig,
    layer_params: Any,
    x_BTD: jax.Array,
    mask: AttentionMask,
    rotary: positions.RotaryTables | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A layer's result, and its queries and keys as they were projected."""

    def is_wanted(module: nn.Module, method: str) -> bool:
        return method == "__call__" and module.name in ("query", "key")

    (x_BTD, _), captured = Block(config).apply(
        {"params": layer_params}, x_BTD, mask, rotary, capture_intermediates=is_wanted, mutable=["intermediates"]
    )
    found = captured["intermediates"]["attention"]
    return x_BTD, found["query"]["__call__"][0], found["key"]["__call__"][0]


def _largest(probabilities_NTS: jax.Array, members_PT: jax.Array) -> jax.Array:
    """The largest probability between two parts, [N,P,P]: part by part, as [N,T,S] for every one would not fit."""

    def of_queries(members_T: jax.Array) -> jax.Array:
        rows_NS = jnp.max(jnp.where(members_T[None, :, None] > 0, probabilities_NTS, 0.0), axis=1)
        return jnp.max(jnp.where(members_PT[None] > 0, rows_NS[:, None], 0.0), axis=2)

    return jax.lax.map(of_queries, members_PT).transpose(1, 0, 2)


def parts_of(template: ChatTemplate, told: Sequence[Message], untold: Sequence[Message]) -> tuple[list[int], list[int]]:
    """The ids of a dialogue with its instruction, and the part that each belongs to.

    Args:
      template: the model's.
      told: user and assistant in turn, the instruction in the first message.
      untold: the same without the instruction: it is where the two differ.

    Returns:
      Ids, and parts as they are numbered at the top of this module. Marks belong to the message they stand at.
    """
    segments, others = (template.segments(each, add_generation_prompt=False) for each in (told, untold))
    ids, written = _spread(segments)
    other_ids, other_written = _spread(others)
    start, stop = _difference(ids[: written.index(True)], other_ids[: other_written.index(True)])
    require(start < stop, "the chat template shows no instruction in the first message: nothing to look at")
    changes = (before != after for before, after in itertools.pairwise([False, *written]))
    parts = [
        INSTRUCTION + 1 + number for number in itertools.accumulate(changes)
    ]  # one more at every change of speaker
    end = len(written) - written[::-1].index(True)  # marks after the last reply belong to no message
    return ids[:end], [BEFORE] * start + [INSTRUCTION] * (stop - start) + parts[stop:end]


def _spread(segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
    """All ids, and of each whether the assistant wrote it."""
    ids = [token for segment in segments for token in segment.ids]
    return ids, [s.supervised and s.role == "assistant" for s in segments for _ in s.ids]


def _difference(longer: Sequence[int], shorter: Sequence[int]) -> tuple[int, int]:
    """Where `longer` has what `shorter` has not: after their common beginning, before their common end."""
    start = next((i for i, (a, b) in enumerate(zip(longer, shorter)) if a != b), min(len(longer), len(shorter)))
    room = min(len(longer), len(shorter)) - start
    same = next((i for i in range(room) if longer[-1 - i] != shorter[-1 - i]), room)
    return start, len(longer) - same
