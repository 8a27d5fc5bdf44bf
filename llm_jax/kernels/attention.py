"""The one entry to attention: checks the inputs, chooses an implementation and says once which and why.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import dataclasses
import difflib
import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError, require
from llm_jax.kernels.chunked import KEY_BLOCK, QUERY_BLOCK, chunked_attention
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import reference_attention

logger = logging.getLogger(__name__)

# Up to so many scores per head "auto" takes the plain form. On a CPU the tiles of the chunked form stay in the cache
# and skip the upper triangle, so they win as soon as there is more than one. Elsewhere memory decides.
REFERENCE_SCORES = {"cpu": QUERY_BLOCK * KEY_BLOCK}
REFERENCE_SCORES_ELSEWHERE = 1024 * 1024


class Problem(NamedTuple):
    """What an implementation may look at to say whether it can serve: everything static."""

    platform: str
    dtype: str
    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    features: tuple[str, ...]  # names of the mask's fields that are in use


class Implementation(NamedTuple):
    """A kernel: `run(q, k, v, mask)`, and `refuses(problem)`, the reason why it cannot serve or None."""

    run: Callable[[jax.Array, jax.Array, jax.Array, AttentionMask], jax.Array]
    refuses: Callable[[Problem], str | None]


def _never(problem: Problem) -> str | None:
    return None


# Kernels for one platform are added here; `_choose` decides when "auto" takes them.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(reference_attention, _never),
    "chunked": Implementation(chunked_attention, _never),
}


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Scaled dot-product attention over the visible keys, [B,T,N,H] in q's dtype.

    Query head n reads key/value head n // (N / K), without repeating keys or values in memory. Scores are divided by
    sqrt(H); softmax is float32. A query that sees nothing gives exactly 0 and zero gradients. What keys and values
    hold beyond `mask.key_lengths`, in padding or after the last query never matters, be it NaN. The output carries the
    checkpoint name "attention_out" (and the chunked form's log-sum-exp "attention_lse") for remat policies.

    Raises `UserError` if shapes do not fit, or if the named implementation does not exist or cannot serve.
    """
    _check_shapes(q_BTNH, k_BSKH, v_BSKH)
    _check_mask(q_BTNH, k_BSKH, mask)
    name, reason = _choose(_problem(q_BTNH, k_BSKH, mask), implementation)
    _announce(name, reason)
    k_BSKH, v_BSKH = _clean_keys(q_BTNH, k_BSKH, v_BSKH, mask)
    if mask.query_scale is not None:
        scale_BT = jax.lax.stop_gradient(mask.query_scale)
        q_BTNH = (q_BTNH.astype(jnp.float32) * scale_BT[:, :, None, None]).astype(q_BTNH.dtype)
        mask = dataclasses.replace(mask, query_scale=None)
    with jax.named_scope(f"attention_{name}"):
        return IMPLEMENTATIONS[name].run(q_BTNH, k_BSKH, v_BSKH, mask)


def _clean_keys(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, jax.Array]:
    """Keys and values in q's dtype, zero where no query may look: 0 * NaN would otherwise reach the output."""
    k_BSKH, v_BSKH = k_BSKH.astype(q_BTNH.dtype), v_BSKH.astype(q_BTNH.dtype)
    visible_BS = mask.visible_keys(q_BTNH.shape[1], k_BSKH.shape[1])
    if visible_BS is None:
        return k_BSKH, v_BSKH
    visible_BS11 = visible_BS[:, :, None, None]
    return jnp.where(visible_BS11, k_BSKH, 0), jnp.where(visible_BS11, v_BSKH, 0)


def _problem(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask) -> Problem:
    B, T, N, H = q_BTNH.shape
    fields = (f.name for f in dataclasses.fields(mask))
    return Problem(
        platform=jax.default_backend(),
        dtype=str(q_BTNH.dtype),
        batch=B,
        num_queries=T,
        num_keys=k_BSKH.shape[1],
        num_heads=N,
        num_kv_heads=k_BSKH.shape[2],
        head_dim=H,
        features=tuple(name for name in fields if getattr(mask, name) is not None and getattr(mask, name) is not False),
    )


def _choose(problem: Problem, implementation: str) -> tuple[str, str]:
    """The implementation to run, and why."""
    if implementation != "auto":
        _check_name(implementation)
        reason = IMPLEMENTATIONS[implementation].refuses(problem)
        require(reason is None, f"attention implementation {implementation!r} cannot serve: {reason}")
        return implementation, "asked for by name"
    size = f"{problem.num_queries} queries x {problem.num_keys} keys on {problem.platform}"
    limit = REFERENCE_SCORES.get(problem.platform, REFERENCE_SCORES_ELSEWHERE)
    if problem.num_queries == 1 or problem.num_queries * problem.num_keys <= limit:
        return "reference", f"{size}: the score matrix is small"
    return "chunked", f"{size}: memory linear in the length"


def _check_name(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        known = ("auto", *IMPLEMENTATIONS)
        near = difflib.get_close_matches(implementation, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"attention implementation {implementation!r} is not one of {', '.join(known)}{hint}")


@functools.cache
def _announce(name: str, reason: str) -> None:
    """Log a choice; the cache makes it once per distinct choice."""
    logger.info("attention: %s (%s)", name, reason)


def _check_shapes(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> None:
    q, k, v = q_BTNH.shape, k_BSKH.shape, v_BSKH.shape
    require(len(q) == len(k) == 4, f"attention: queries {q} and keys {k} must be [batch, length, heads, head dim]")
    require(k == v, f"attention: keys {k} and values {v} differ in shape")
    require(q[0] == k[0] and q[3] == k[3], f"attention: queries {q} and keys {k} differ in batch or head dim")
    require(q[2] % k[2] == 0, f"attention: {q[2]} query heads are not a multiple of {k[2]} key/value heads")
    require(
        jnp.issubdtype(q_BTNH.dtype, jnp.floating), f"attention: queries must be floating point, got {q_BTNH.dtype}"
    )


def _check_mask(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask) -> None:
    B, T, N, _ = q_BTNH.shape
    S = k_BSKH.shape[1]
    require(
        (mask.query_segment_ids is None) == (mask.key_segment_ids is None),
        "attention: query_segment_ids and key_segment_ids must be given together",
    )
    expected = {
        "window": ((),),
        "query_segment_ids": ((B, T),),
        "key_segment_ids": ((B, S),),
        "query_offset": ((), (B,)),
        "key_lengths": ((B,),),
        "slopes": ((N,),),
        "query_scale": ((B, T),),
    }
    for field, shapes in expected.items():
        value = getattr(mask, field)
        if value is not None:
            shape = jnp.shape(value)
            wanted = " or ".join(map(str, shapes))
            require(shape in shapes, f"attention: mask.{field} has shape {shape}, expected {wanted}")
    if isinstance(mask.window, int):
        require(mask.window >= 0, f"attention: mask.window={mask.window} must be positive, or 0 for unlimited")
