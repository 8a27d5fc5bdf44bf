"""Cross-entropy over a large vocabulary without ever holding the logits of a whole batch.

The loss is one scalar, so its gradient is known up to a factor as soon as a chunk's logits are: the forward rule of
the derivative computes loss and gradients chunk by chunk (three matmuls in all, nothing recomputed), the backward
rule only scales them. Without differentiation only the loss is computed.

On a mesh the same code runs on every device's part under `jax.shard_map`: the batch over `replica` and `data`, the
vocabulary over `tensor`.

Legend: B batch, T length, D model, V vocabulary (a device's part of it inside `shard_map`), C chunk, R = B * C rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax.config import LossConfig
from llm_jax.errors import require
from llm_jax.losses import chunks
from llm_jax.losses.weighted import LossOutput, WeightedSum

SMALLEST_CHUNK = 256  # rows, of tokens that have a weight: smaller products waste a processor

Gradients = tuple[jax.Array, jax.Array]


class Sums(NamedTuple):
    """Sums over tokens, each times the token's weight: float32 scalars."""

    weight: jax.Array
    cross_entropy: jax.Array
    correct: jax.Array
    lse_squared: jax.Array
    max_squared: jax.Array


Carry = tuple[Sums, Gradients | None]


def chunked_cross_entropy(
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    config: LossConfig,
) -> LossOutput:
    """The sum over tokens of weight * (cross-entropy + z_loss * lse^2 + max_z_loss * max^2), and the sum of weights.

    `lse` is the log-sum-exp of a token's logits hidden @ unembedding^T and `max` the highest of them (max-z loss:
    Baichuan-2, equation 1). hidden [B,T,D] and unembedding [V,D] share a dtype, in which the matmuls run with float32
    accumulation; everything after them is float32. Gradients flow to hidden and unembedding only, and through the
    highest logit in equal parts where several are highest. At most B * `config.chunk_size` rows of logits exist at
    once; with `config.only_weighted`, none of tokens of weight 0. A token whose target is outside the vocabulary must
    have weight 0.

    Metrics: "cross_entropy", "accuracy" (a target that ties for the highest logit counts as right) and, where their
    coefficients are positive, "z_loss" and "max_z_loss".

    With a mesh set (`jax.set_mesh`), the batch is split over its axes `replica` and `data` and the vocabulary over
    `tensor`. Raises `UserError` where they do not divide, or if the shapes do not fit together.
    """
    _check_shapes(hidden_BTD, unembedding_VD, targets_BT, weights_BT)
    unembedding_VD = unembedding_VD.astype(hidden_BTD.dtype)
    total, sums = _loss(config, hidden_BTD, unembedding_VD, targets_BT, weights_BT.astype(jnp.float32))
    metrics = {"cross_entropy": sums.cross_entropy, "accuracy": sums.correct}
    if config.z_loss:
        metrics["z_loss"] = config.z_loss * sums.lse_squared
    if config.max_z_loss:
        metrics["max_z_loss"] = config.max_z_loss * sums.max_squared
    return LossOutput(total, sums.weight, {name: WeightedSum(value, sums.weight) for name, value in metrics.items()})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    config: LossConfig, hidden_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, Sums]:
    sums, _ = _on_mesh(config, False, (hidden_BTD, unembedding_VD, targets_BT, weights_BT))
    return _total(config, sums), sums


def _forward(
    config: LossConfig, hidden_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[tuple[jax.Array, Sums], Gradients | None]:
    sums, gradients = _on_mesh(config, True, (hidden_BTD, unembedding_VD, targets_BT, weights_BT))
    return (_total(config, sums), sums), gradients


def _backward(
    config: LossConfig, gradients: Gradients, cotangents: tuple[jax.Array, Sums]
) -> tuple[jax.Array, jax.Array, None, None]:
    dhidden_BTD, dunembedding_VD = (g * cotangents[0].astype(g.dtype) for g in gradients)
    return dhidden_BTD, dunembedding_VD, None, None


_loss.defvjp(_forward, _backward)


def _total(config: LossConfig, sums: Sums) -> jax.Array:
    return sums.cross_entropy + config.z_loss * sums.lse_squared + config.max_z_loss * sums.max_squared


def _on_mesh(config: LossConfig, differentiate: bool, arrays: tuple[jax.Array, ...]) -> tuple[Sums, Gradients | None]:
    """The sums of all chunks on the mesh in context: mapped over its devices' parts where there are several."""
    parts = chunks.mesh_parts(*arrays[:2])
    sum_chunks = _loop_over_weighted if config.only_weighted else _scan_chunks
    if not parts.batch:
        return sum_chunks(config, differentiate, parts, *arrays)
    batch, vocabulary = P(parts.batch), P(parts.vocabulary)
    mapped = jax.shard_map(
        functools.partial(sum_chunks, config, differentiate, parts),
        in_specs=(batch, vocabulary, batch, batch),
        out_specs=(P(), parts.gradients if differentiate else None),
        check_vma=False,  # both rules of the derivative are written out: nothing is transposed through the map
    )
    return mapped(*arrays)


def _scan_chunks(
    config: LossConfig,
    differentiate: bool,
    parts: chunks.Parts,
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[Sums, Gradients | None]:
    """The sums over the whole mesh, and the gradients of `_total` for this device's part of the two inputs."""
    B, T, _ = hidden_BTD.shape
    C = min(config.chunk_size, T)

    def one(carry: tuple[Sums, jax.Array | None], rows: tuple[jax.Array, ...]):  # type: ignore[no-untyped-def]
        sums, dunembedding_DV = carry
        chunk_sums, gradients = _chunk(config, differentiate, parts, unembedding_VD, *rows)
        sums = jax.tree.map(jnp.add, sums, chunk_sums)
        if gradients is None or dunembedding_DV is None:
            return (sums, None), None
        return (sums, dunembedding_DV + gradients[1]), gradients[0].astype(hidden_BTD.dtype)

    zero = jnp.zeros((), jnp.float32)
    zeros_DV = jnp.zeros(unembedding_VD.shape[::-1], jnp.float32) if differentiate else None
    rows = tuple(chunks.split(x, C) for x in (hidden_BTD, targets_BT, weights_BT))
    (sums, dunembedding_DV), dhidden_XRD = jax.lax.scan(one, (Sums(*[zero] * len(Sums._fields)), zeros_DV), rows)
    sums = jax.lax.psum(sums, parts.batch)
    if dunembedding_DV is None:
        return sums, None
    dhidden_BTD = chunks.join(dhidden_XRD, B, T)
    # Without the barrier XLA turns the product into one that comes out as [V,D], for which its CPU compiler transposes
    # a whole chunk of logits.
    dunembedding_VD = jax.lax.optimization_barrier(dunembedding_DV).T
    return sums, (dhidden_BTD, chunks.sum_gradient(dunembedding_VD, parts).astype(unembedding_VD.dtype))


def _loop_over_weighted(
    config: LossConfig,
    differentiate: bool,
    parts: chunks.Parts,
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[Sums, Gradients | None]:
    """`_scan_chunks` of the tokens with a weight alone: as many chunks as they fill, so the loop's length is data.

    Chunks are smaller than there, as half of the last one is wasted on average.
    """
    (B, T, D), N = hidden_BTD.shape, weights_BT.size
    most = B * min(config.chunk_size, T)
    R = min(most, max(SMALLEST_CHUNK, most // 8))
    (places_N,) = jnp.nonzero(weights_BT.reshape(N), size=-(-N // R) * R, fill_value=N)  # N is none: reads as 0
    arrays = hidden_BTD.reshape(N, D), targets_BT.reshape(N), weights_BT.reshape(N)

    def one(index: jax.Array, carry: Carry) -> Carry:
        sums, gradients = carry
        places_R = jax.lax.dynamic_slice(places_N, (index * R,), (R,))
        rows = (jnp.take(x_N, places_R, axis=0, mode="fill", fill_value=0) for x_N in arrays)
        chunk_sums, chunk_gradients = _chunk(config, differentiate, parts, unembedding_VD, *rows)
        sums = jax.tree.map(jnp.add, sums, chunk_sums)
        if gradients is None or chunk_gradients is None:
            return sums, None
        dhidden_ND = gradients[0].at[places_R].set(chunk_gradients[0].astype(hidden_BTD.dtype), mode="drop")
        return sums, (dhidden_ND, gradients[1] + chunk_gradients[1])

    zero = jnp.zeros((), jnp.float32)
    zeros = (jnp.zeros((N, D), hidden_BTD.dtype), jnp.zeros(unembedding_VD.shape[::-1], jnp.float32))
    # All devices take as many turns, whatever their own part has: the products have a collective inside.
    turns = jax.lax.pmax(-(-jnp.count_nonzero(weights_BT) // R), parts.batch)
    start = Sums(*[zero] * len(Sums._fields)), zeros if differentiate else None
    sums, gradients = jax.lax.fori_loop(0, turns, one, start)
    sums = jax.lax.psum(sums, parts.batch)
    if gradients is None:
        return sums, None
    dunembedding_VD = chunks.sum_gradient(gradients[1].T, parts).astype(unembedding_VD.dtype)
    return sums, (gradients[0].reshape(B, T, D), dunembedding_VD)


def _chunk(
    config: LossConfig,
    differentiate: bool,
    parts: chunks.Parts,
    unembedding_VD: jax.Array,
    hidden_RD: jax.Array,
    targets_R: jax.Array,
    weights_R: jax.Array,
) -> tuple[Sums, Gradients | None]:
    """One chunk's sums, and its float32 gradients for hidden [R,D] and unembedding [D,V]."""
    logits_RV = chunks.matmul("rd,vd->rv", hidden_RD, unembedding_VD)
    targets_R = targets_R - chunks.first_entry(logits_RV.shape[1], parts)
    highest_R = jax.lax.pmax(jnp.max(logits_RV, axis=1), parts.vocabulary)
    # The barriers keep XLA from computing the exponentials, and then the gradient, again for each of their uses.
    exps_RV = jax.lax.optimization_barrier(jnp.exp(logits_RV - highest_R[:, None]))
    sums_R = jax.lax.psum(jnp.sum(exps_RV, axis=1), parts.vocabulary)
    lse_R = highest_R + jnp.log(sums_R)
    target_R = jax.lax.psum(chunks.pick(logits_RV, targets_R), parts.vocabulary)
    sums = Sums(
        weight=jnp.sum(weights_R),
        cross_entropy=jnp.sum(weights_R * (lse_R - target_R)),
        correct=jnp.sum(weights_R * (target_R >= highest_R)),
        lse_squared=jnp.sum(weights_R * lse_R**2),
        max_squared=jnp.sum(weights_R * highest_R**2),
    )
    if not differentiate:
        return sums, None
    softmax_factor_R = weights_R * (1.0 + 2.0 * config.z_loss * lse_R) / sums_R
    dlogits_RV = softmax_factor_R[:, None] * exps_RV
    is_target_RV = jax.lax.broadcasted_iota(jnp.int32, logits_RV.shape, 1) == targets_R[:, None]
    dlogits_RV -= jnp.where(is_target_RV, weights_R[:, None], 0.0)
    if config.max_z_loss:
        is_highest_RV = logits_RV == highest_R[:, None]
        ties_R = jax.lax.psum(jnp.sum(is_highest_RV, axis=1), parts.vocabulary)
        share_R = weights_R * (2.0 * config.max_z_loss) * highest_R / ties_R
        dlogits_RV += jnp.where(is_highest_RV, share_R[:, None], 0.0)
    dlogits_RV = jax.lax.optimization_barrier(dlogits_RV.astype(hidden_RD.dtype))
    dhidden_RD = jax.lax.psum(chunks.matmul("rv,vd->rd", dlogits_RV, unembedding_VD), parts.vocabulary)
    return sums, (dhidden_RD, chunks.matmul("rd,rv->dv", hidden_RD, dlogits_RV))


def _check_shapes(
    hidden_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> None:
    hidden, unembedding = hidden_BTD.shape, unembedding_VD.shape
    require(
        len(hidden) == 3 and len(unembedding) == 2 and hidden[2] == unembedding[1],
        f"loss: hidden states {hidden} and unembedding {unembedding} must be [batch, length, D] and [vocabulary, D]",
    )
    require(
        targets_BT.shape == weights_BT.shape == hidden[:2],
        f"loss: targets {targets_BT.shape} and weights {weights_BT.shape} must have the shape {hidden[:2]}",
    )
