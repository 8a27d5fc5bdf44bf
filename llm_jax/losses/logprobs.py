"""Log-probabilities of given tokens, and entropies, without ever holding the logits of a whole batch.

What PPO, DPO and their kin need of a model's logits. Unlike the cross-entropy's, these gradients come with a factor
per token that is known only in the backward pass, so each chunk's logits are computed once more there. On a mesh the
same code runs on every device's part under `jax.shard_map`: the batch over `replica` and `data`, the vocabulary over
`tensor`.

Legend: B batch, T length, D model, V vocabulary (a device's part of it inside `shard_map`), C chunk, R = B * C rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax.errors import require
from llm_jax.losses import chunks


class TokenLogprobs(NamedTuple):
    """Of every target, float32 [B,T]: its log-probability, and the entropy of the distribution that it is one of."""

    logprobs_BT: jax.Array
    entropies_BT: jax.Array | None  # nats; None where they were not asked for


class _Settings(NamedTuple):
    temperature: float
    chunk_size: int
    entropies: bool


class _Rows(NamedTuple):
    """What the forward pass finds per token, float32: [B,T] or one chunk's [R]."""

    logprobs: jax.Array
    entropies: jax.Array | None
    lse: jax.Array  # log-sum-exp of logits / temperature, which spares the backward pass a reduction


def token_logprobs(
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    temperature: float = 1.0,
    chunk_size: int,
    entropies: bool = False,
) -> TokenLogprobs:
    """log softmax(hidden @ unembedding^T / temperature) at the targets, float32 [B,T], and the entropies if asked for.

    hidden [B,T,D] and unembedding [V,D] are used in hidden's dtype, with float32 accumulation; everything after the
    matmul is float32. Both outputs are differentiable in hidden and unembedding. At most B * `chunk_size` rows of
    logits exist at once, forward and backward. Where a target (int32 [B,T]) is outside the vocabulary the result
    means nothing: mask it.

    With a mesh set (`jax.set_mesh`), the batch is split over its axes `replica` and `data` and the vocabulary over
    `tensor`. Raises `UserError` where they do not divide, or if shapes or settings do not fit.
    """
    hidden, unembedding, targets = hidden_BTD.shape, unembedding_VD.shape, targets_BT.shape
    require(
        len(hidden) == 3 and len(unembedding) == 2 and hidden[2] == unembedding[1] and targets == hidden[:2],
        f"logprobs: hidden states {hidden}, unembedding {unembedding} and targets {targets} must be "
        "[batch, length, D], [vocabulary, D] and [batch, length]",
    )
    require(temperature > 0, f"logprobs: temperature={temperature} must be positive; greedy choices have none")
    require(chunk_size > 0, f"logprobs: chunk_size={chunk_size} must be positive")
    settings = _Settings(temperature, min(chunk_size, hidden[1]), entropies)
    return _logprobs(settings, hidden_BTD, unembedding_VD.astype(hidden_BTD.dtype), targets_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(
    settings: _Settings, hidden_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array
) -> TokenLogprobs:
    return _forward(settings, hidden_BTD, unembedding_VD, targets_BT)[0]


def _forward(
    settings: _Settings, hidden_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array
) -> tuple[TokenLogprobs, tuple]:
    parts = chunks.mesh_parts(hidden_BTD, unembedding_VD)
    run = functools.partial(_scan_forward, settings, parts)
    if parts.batch:
        batch, vocabulary = P(parts.batch), P(parts.vocabulary)
        run = jax.shard_map(run, in_specs=(batch, vocabulary, batch), out_specs=batch, check_vma=False)
    rows = run(hidden_BTD, unembedding_VD, targets_BT)
    return TokenLogprobs(rows.logprobs, rows.entropies), (hidden_BTD, unembedding_VD, targets_BT, rows)


def _backward(settings: _Settings, residuals: tuple, cotangents: TokenLogprobs) -> tuple[jax.Array, jax.Array, None]:
    hidden_BTD, unembedding_VD, targets_BT, rows = residuals
    parts = chunks.mesh_parts(hidden_BTD, unembedding_VD)
    run = functools.partial(_scan_backward, settings, parts)
    if parts.batch:
        batch, vocabulary = P(parts.batch), P(parts.vocabulary)
        specs = (batch, vocabulary, batch, batch, batch)
        # Every device of the vocabulary has the whole cotangent of its tokens: both rules are written out for that.
        run = jax.shard_map(run, in_specs=specs, out_specs=parts.gradients, check_vma=False)
    return *run(hidden_BTD, unembedding_VD, targets_BT, rows, cotangents), None


_logprobs.defvjp(_forward, _backward)


def _scan_forward(
    settings: _Settings,
    parts: chunks.Parts,
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
) -> _Rows:
    """Every token's numbers, [B,T], of this device's part of the batch."""
    B, T, _ = hidden_BTD.shape

    def one(rows: tuple[jax.Array, jax.Array]) -> _Rows:
        return _chunk(settings, parts, unembedding_VD, *rows)

    split = chunks.split(hidden_BTD, settings.chunk_size), chunks.split(targets_BT, settings.chunk_size)
    return jax.tree.map(lambda x_XR: chunks.join(x_XR, B, T), jax.lax.map(one, split))


def _scan_backward(
    settings: _Settings,
    parts: chunks.Parts,
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    rows: _Rows,
    cotangents: TokenLogprobs,
) -> tuple[jax.Array, jax.Array]:
    """The gradients for this device's part of the hidden states and of the unembedding, in their dtypes."""
    B, T, _ = hidden_BTD.shape

    def one(dunembedding_DV: jax.Array, chunk: tuple) -> tuple[jax.Array, jax.Array]:
        dhidden_RD, chunk_DV = _chunk_gradients(settings, parts, unembedding_VD, *chunk)
        return dunembedding_DV + chunk_DV, dhidden_RD.astype(hidden_BTD.dtype)

    arrays = (hidden_BTD, targets_BT, rows, cotangents)
    split = jax.tree.map(lambda x: chunks.split(x, settings.chunk_size), arrays)
    dunembedding_DV, dhidden_XRD = jax.lax.scan(one, jnp.zeros(unembedding_VD.shape[::-1], jnp.float32), split)
    # Keeps XLA's CPU compiler from transposing a whole chunk of logits, as in the cross-entropy.
    dunembedding_VD = chunks.sum_gradient(jax.lax.optimization_barrier(dunembedding_DV).T, parts)
    return chunks.join(dhidden_XRD, B, T), dunembedding_VD.astype(unembedding_VD.dtype)


def _chunk(
    settings: _Settings,
    parts: chunks.Parts,
    unembedding_VD: jax.Array,
    hidden_RD: jax.Array,
    targets_R: jax.Array,
) -> _Rows:
    """One chunk's numbers, over the whole vocabulary."""
    logits_RV = chunks.matmul("rd,vd->rv", hidden_RD, unembedding_VD) / settings.temperature
    targets_R = targets_R - chunks.first_entry(logits_RV.shape[1], parts)
    highest_R = jax.lax.pmax(jnp.max(logits_RV, axis=1), parts.vocabulary)
    shifted_RV = logits_RV - highest_R[:, None]
    sums_R = jax.lax.psum(jnp.sum(jnp.exp(shifted_RV), axis=1), parts.vocabulary)
    target_R = jax.lax.psum(chunks.pick(logits_RV, targets_R), parts.vocabulary)
    # The difference to the highest logit first: it is small where the logprob is, and exact there.
    logprobs_R = (target_R - highest_R) - jnp.log(sums_R)
    entropies_R = None
    if settings.entropies:
        moments_R = jax.lax.psum(jnp.sum(jnp.exp(shifted_RV) * shifted_RV, axis=1), parts.vocabulary)
        entropies_R = jnp.log(sums_R) - moments_R / sums_R
    return _Rows(logprobs_R, entropies_R, highest_R + jnp.log(sums_R))


def _chunk_gradients(
    settings: _Settings,
    parts: chunks.Parts,
    unembedding_VD: jax.Array,
    hidden_RD: jax.Array,
    targets_R: jax.Array,
    rows: _Rows,
    cotangents: TokenLogprobs,
) -> tuple[jax.Array, jax.Array]:
    """One chunk's float32 gradients for hidden [R,D] and unembedding [D,V]; its logits are computed anew.

    With p = softmax(logits): d logprob = onehot - p and d entropy = -p (log p + entropy), both over the temperature.
    """
    logits_RV = chunks.matmul("rd,vd->rv", hidden_RD, unembedding_VD) / settings.temperature
    targets_R = targets_R - chunks.first_entry(logits_RV.shape[1], parts)
    logprobs_RV = logits_RV - rows.lse[:, None]
    factor_RV = cotangents.logprobs_BT[:, None]
    if rows.entropies is not None and cotangents.entropies_BT is not None:
        factor_RV = factor_RV + cotangents.entropies_BT[:, None] * (logprobs_RV + rows.entropies[:, None])
    is_target_RV = jax.lax.broadcasted_iota(jnp.int32, logits_RV.shape, 1) == targets_R[:, None]
    at_target_RV = jnp.where(is_target_RV, cotangents.logprobs_BT[:, None], 0.0)
    dlogits_RV = (at_target_RV - jnp.exp(logprobs_RV) * factor_RV) / settings.temperature
    dlogits_RV = jax.lax.optimization_barrier(dlogits_RV.astype(hidden_RD.dtype))
    dhidden_RD = jax.lax.psum(chunks.matmul("rv,vd->rd", dlogits_RV, unembedding_VD), parts.vocabulary)
    return dhidden_RD, chunks.matmul("rd,rv->dv", hidden_RD, dlogits_RV)
