"""JAX's own splash attention for TPUs behind this project's mask, for the masks that it covers.

Splash scales nothing, takes padding for a segment like any other and leaves a query that sees nothing undefined: all
three are put right around it. Queries that are scaled before are rounded once more, unless the square root of the head
dim is a power of 2.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    FullMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

from llm_jax.errors import require
from llm_jax.kernels.choice import Problem, check_supported, unsupported, used_features
from llm_jax.kernels.mask import AttentionMask

LANES = 128
LARGEST_BLOCK = 512
DTYPES = ("bfloat16", "float32")
FEATURES = {"causal", "window", "query_segment_ids", "key_segment_ids", "query_scale"}


def refuses(problem: Problem) -> str | None:
    """Why splash attention cannot serve a problem, or None."""
    if problem.platform != "tpu":
        return f"it runs on TPUs, not on {problem.platform}"
    static_window = "window" not in problem.features or problem.static_window is not None
    refusal = unsupported(problem.dtype, problem.head_dim, DTYPES, (problem.head_dim,))  # any head dim will do
    return refusal or _unknown(problem.features, static_window, problem.num_queries, problem.num_keys)


def _unknown(features: Iterable[str], static_window: bool, num_queries: int, num_keys: int) -> str | None:
    if others := [name for name in features if name not in FEATURES]:
        return f"it knows nothing like mask.{others[0]}: take implementation='pallas_tpu'"
    if not static_window:
        return "its window must be a number when it is compiled, not an array: take implementation='pallas_tpu'"
    if num_queries % LANES or num_keys % LANES:
        return f"lengths must be multiples of {LANES}, not {num_queries} queries and {num_keys} keys"
    return None


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    blocks: BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attention` by splash attention, [B,T,N,H] in q's dtype, for problems that it does not refuse.

    Output and log-sum-exp both carry the checkpoint name "attention_out", as splash has one name for the two.

    Args:
      q_BTNH: bfloat16 or float32, as are keys and values; T and S are multiples of 128.
      k_BSKH: N is a multiple of K.
      v_BSKH: of the keys' shape.
      mask: causal or not, a window that is a number, segment ids, the queries' scale.
      blocks: splash's own block sizes; None takes the largest up to 512 that divide the lengths.
      interpret: run on any platform, slowly.

    Raises `UserError` for a dtype, a rule or a length that splash does not know.
    """
    static_window = mask.window is None or isinstance(mask.window, int | np.integer)
    check_supported("'splash'", (q_BTNH, k_BSKH, v_BSKH), DTYPES, q_BTNH.shape[3:])
    refusal = _unknown(used_features(mask), static_window, q_BTNH.shape[1], k_BSKH.shape[1])
    require(refusal is None, f"attention: 'splash' cannot serve this call: {refusal}")
    scale_BT11: jax.Array | float = q_BTNH.shape[3] ** -0.5
    if mask.query_scale is not None:
        scale_BT11 = scale_BT11 * jax.lax.stop_gradient(mask.query_scale)[:, :, None, None]
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale_BT11).astype(q_BTNH.dtype)
    shape = q_BTNH.shape[1], k_BSKH.shape[1]
    kernel = make_splash_mha_single_device(
        MultiHeadMask([_mask(mask, shape)] * q_BTNH.shape[2]),
        block_sizes=blocks or _blocks(*shape),
        residual_checkpoint_name="attention_out",
        interpret=interpret,
    )
    segments = None
    if mask.query_segment_ids is not None and mask.key_segment_ids is not None:
        segments = SegmentIds(mask.query_segment_ids, mask.key_segment_ids)
    k_BSKH, v_BSKH = mask.clean_keys(shape[0], k_BSKH, v_BSKH)
    sees_BT11 = _sees(mask, *shape)
    if sees_BT11 is not None:
        q_BTNH = jnp.where(sees_BT11, q_BTNH, 0)
    out_BNTH = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH)), segments)
    out_BTNH = out_BNTH.swapaxes(1, 2)
    return out_BTNH if sees_BT11 is None else jnp.where(sees_BT11, out_BTNH, 0)


def _mask(mask: AttentionMask, shape: tuple[int, int]) -> CausalMask | FullMask | LocalMask:
    if isinstance(mask.window, int | np.integer) and mask.window > 0:
        return LocalMask(shape, (int(mask.window) - 1, 0), 0)
    return CausalMask(shape) if mask.causal or mask.window is not None else FullMask(shape)


def _blocks(num_queries: int, num_keys: int) -> BlockSizes:
    queries, keys = math.gcd(num_queries, LARGEST_BLOCK), math.gcd(num_keys, LARGEST_BLOCK)
    return BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )


def _sees(mask: AttentionMask, num_queries: int, num_keys: int) -> jax.Array | None:
    """Bool [B or 1,T,1,1], whether a query sees any key; None where each one does.

    The comparison of all pairs is fused with the reduction: it is never an array.
    """
    if mask.query_segment_ids is None and (mask.window is None or num_queries <= num_keys):
        return None
    visible_B1TS = mask.visible(num_queries, num_keys)
    assert visible_B1TS is not None
    return jnp.any(visible_B1TS, axis=3).swapaxes(1, 2)[..., None]
