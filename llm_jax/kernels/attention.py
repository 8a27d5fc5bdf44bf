"""The one entry to attention: checks the inputs, chooses an implementation and says once which and why.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import require
from llm_jax.kernels import choice
from llm_jax.kernels.choice import Implementation, Problem
from llm_jax.kernels.chunked import KEY_BLOCK, QUERY_BLOCK, chunked_attention
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import reference_attention
from llm_jax.kernels.sharded import on_shards

Run = Callable[[jax.Array, jax.Array, jax.Array, AttentionMask], jax.Array]

DTYPES = ("bfloat16", "float16", "float32")

# Where no kernel of the platform serves, "auto" takes the reference up to so many scores per head. On a CPU the tiles
# of the chunked form stay in the cache and skip the upper triangle, so they win as soon as there is more than one.
# Elsewhere memory decides.
REFERENCE_SCORES = {"cpu": QUERY_BLOCK * KEY_BLOCK}
REFERENCE_SCORES_ELSEWHERE = 1024 * 1024


def plain(run: Run) -> Run:
    """A form in plain JAX, which knows visibility and bias, given the rest: clean keys and scaled queries.

    Keys and values that no query may look at are zeroed (0 * NaN would otherwise reach the output), and
    `mask.query_scale` is applied. Pallas kernels do both in their loads.
    """

    def cleaned(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask) -> jax.Array:
        k_BSKH, v_BSKH = mask.clean_keys(q_BTNH.shape[1], k_BSKH, v_BSKH)
        return run(mask.scale_queries(q_BTNH), k_BSKH, v_BSKH, dataclasses.replace(mask, query_scale=None))

    return cleaned


def _kernel(platform: str, module: str, run: str) -> Implementation:
    return on_shards(choice.on_platform(platform, f"llm_jax.kernels.{module}", run))


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(plain(reference_attention), choice.never),
    "chunked": Implementation(plain(chunked_attention), choice.never),
    "pallas_gpu": _kernel("gpu", "pallas_gpu", "gpu_attention"),
    "pallas_tpu": _kernel("tpu", "pallas_tpu", "tpu_attention"),
    "splash": _kernel("tpu", "splash", "splash_attention"),
    "mosaic_gpu": _kernel("gpu", "mosaic_gpu", "mosaic_gpu_attention"),
}
# What "auto" tries on each platform, in this order, before it falls back on the plain forms. "splash" is for those who
# ask for it by name: it serves a part of what "pallas_tpu" serves, no better.
PREFERRED: dict[str, tuple[str, ...]] = {"gpu": ("mosaic_gpu", "pallas_gpu"), "tpu": ("pallas_tpu",)}
# What takes the place of one that knows no `query_offset`, where a prompt is read into a cache.
FOR_PROMPTS = {"splash": "pallas_tpu"}


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
    hold beyond `mask.key_lengths`, in padding, after the last query or before the first query's window never matters,
    be it NaN. The output carries the checkpoint name "attention_out" (and the log-sum-exp of all forms but the
    reference "attention_lse", which this project's kernels hold in base 2) for remat policies.

    On a mesh in context (`jax.set_mesh`) the kernels for one platform run per device, see `sharded`.

    Args:
      q_BTNH: bfloat16, float16 or float32, as are keys and values.
      k_BSKH: N is a multiple of K.
      v_BSKH: of the keys' shape.
      mask: what is visible, the ALiBi slopes and the queries' scale.
      implementation: a name in `IMPLEMENTATIONS`, or "auto": the first in `PREFERRED` that serves, else the reference
        where the score matrix is small, else the chunked form.

    Raises `UserError` if shapes, dtypes or the mask do not fit, or if the named implementation does not exist or cannot
    serve.
    """
    _check_shapes(q_BTNH, k_BSKH, v_BSKH)
    _check_dtypes(q_BTNH, k_BSKH, v_BSKH)
    check_mask(q_BTNH, k_BSKH.shape[1], mask)
    name = _choose(describe(q_BTNH, k_BSKH.shape[1], k_BSKH.shape[2], mask), implementation)
    with jax.named_scope(f"attention_{name}"):
        return IMPLEMENTATIONS[name].run(q_BTNH, k_BSKH, v_BSKH, mask)


def describe(q_BTNH: jax.Array, num_keys: int, num_kv_heads: int, mask: AttentionMask) -> Problem:
    """What an implementation may look at, of queries and mask on the devices in context."""
    B, T, N, H = q_BTNH.shape
    platform, device_kind = choice.device()
    return Problem(
        platform=platform,
        device_kind=device_kind,
        dtype=str(q_BTNH.dtype),
        batch=B,
        num_queries=T,
        num_keys=num_keys,
        num_heads=N,
        num_kv_heads=num_kv_heads,
        head_dim=H,
        features=choice.used_features(mask),
        static_window=int(mask.window) if isinstance(mask.window, int | np.integer) else None,
    )


def _choose(problem: Problem, implementation: str) -> str:
    """The implementation to run: a kernel of the platform if one serves, else the plain form that fits in memory."""
    size = f"{problem.num_queries} queries x {problem.num_keys} keys on {problem.platform}"
    limit = REFERENCE_SCORES.get(problem.platform, REFERENCE_SCORES_ELSEWHERE)
    single = problem.num_queries == 1
    if single or problem.num_queries * problem.num_keys <= limit:
        otherwise = "reference", f"{size}: the score matrix is small"
    else:
        otherwise = "chunked", f"{size}: memory linear in the length"
    preferred = () if single else PREFERRED.get(problem.platform, ())
    return choice.choose("attention", IMPLEMENTATIONS, problem, implementation, preferred, otherwise)[0]


def _check_shapes(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> None:
    q, k, v = q_BTNH.shape, k_BSKH.shape, v_BSKH.shape
    require(len(q) == len(k) == 4, f"attention: queries {q} and keys {k} must be [batch, length, heads, head dim]")
    require(k == v, f"attention: keys {k} and values {v} differ in shape")
    require(q[0] == k[0] and q[3] == k[3], f"attention: queries {q} and keys {k} differ in batch or head dim")
    require(0 not in q + k, f"attention: queries {q} and keys {k} must be at least 1 in every dimension")
    require(q[2] % k[2] == 0, f"attention: {q[2]} query heads are not a multiple of {k[2]} key/value heads")


def _check_dtypes(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> None:
    dtypes = [str(array.dtype) for array in (q_BTNH, k_BSKH, v_BSKH)]
    require(len(set(dtypes)) == 1, f"attention: queries, keys and values must have one dtype, got {', '.join(dtypes)}")
    require(dtypes[0] in DTYPES, f"attention: dtype {dtypes[0]} is not one of {', '.join(DTYPES)}")


def check_mask(q_BTNH: jax.Array, num_keys: int, mask: AttentionMask) -> None:
    """Raise `UserError` if a field of the mask does not fit the queries and the number of keys."""
    B, T, N, _ = q_BTNH.shape
    require(
        (mask.query_segment_ids is None) == (mask.key_segment_ids is None),
        "attention: query_segment_ids and key_segment_ids must be given together",
    )
    expected = {
        "window": ((),),
        "query_segment_ids": ((B, T),),
        "key_segment_ids": ((B, num_keys),),
        "query_offset": ((), (B,)),
        "key_lengths": ((B,),),
        "slopes": ((N,),),
        "query_scale": ((B, T),),
    }
    for field, shapes in expected.items():
        if getattr(mask, field) is not None:
            _check_field(field, getattr(mask, field), shapes)
    if mask.window is not None and not isinstance(mask.window, jax.core.Tracer):
        window = int(jax.device_get(mask.window))
        require(window >= 0, f"attention: mask.window={window} must be positive, or 0 for unlimited")


def _check_field(field: str, value: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    listed = isinstance(value, list | tuple)
    require(not listed, f"attention: mask.{field} is a {type(value).__name__}, expected an array")
    shape, wanted = jnp.shape(value), " or ".join(map(str, shapes))
    require(shape in shapes, f"attention: mask.{field} has shape {shape}, expected {wanted}")
    whole = field not in ("slopes", "query_scale")
    kind, called = (jnp.integer, "integers") if whole else (jnp.floating, "floating point")
    dtype = jnp.result_type(value)
    require(jnp.issubdtype(dtype, kind), f"attention: mask.{field} has dtype {dtype}, expected {called}")
