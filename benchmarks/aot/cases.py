"""The attention of the models that this project rebuilds, at their own sizes: what is compiled and timed.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.mask import AttentionMask
from llm_jax.models.positions import alibi_slopes


class Case(NamedTuple):
    """One model's attention. Rotary positions are applied before, so they do not appear here."""

    name: str
    length: int  # of queries and of keys; when decoding, of the cache
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    alibi: bool = False
    window: int | None = None
    causal: bool = True
    batch: int = 1
    decode_batch: int = 16

    def mask(self) -> AttentionMask:
        """What each query sees in training."""
        slopes = jnp.asarray(alibi_slopes(self.num_heads)) if self.alibi else None
        return AttentionMask(causal=self.causal, window=self.window, slopes=slopes)

    def decode_mask(self, lengths_B: jax.Array) -> AttentionMask:
        """What the one new query of each row sees of a cache filled up to `lengths_B`."""
        return dataclasses.replace(self.mask(), query_offset=lengths_B - 1, key_lengths=lengths_B)

    def one_group(self) -> "Case":
        """One key/value head and its queries in one row: in training the whole is so many times as much work."""
        return self._replace(num_heads=self.num_heads // self.num_kv_heads, num_kv_heads=1, batch=1)

    def everything_visible(self) -> "Case":
        """The same without its mask, whose tiles are all the tiles."""
        return self._replace(causal=False, window=None)


CASES = {
    case.name: case
    for case in (
        Case("baichuan2_7b", 4096, 32, 32),
        Case("baichuan2_13b", 4096, 40, 40, alibi=True),
        Case("qwen_7b", 8192, 32, 32, window=2048),
        Case("llama2_70b", 4096, 64, 8),
    )
}
DECODING = ("decode", "decode_int8")  # over a cache of the queries' dtype, or of codes with a scale for each vector
PASSES = ("forward", "backward", *DECODING)


def inputs(case: Case, dtype: str = "bfloat16") -> tuple[jax.ShapeDtypeStruct, ...]:
    """Queries [B,T,N,H], keys and values [B,S,K,H] of training."""
    queries = jax.ShapeDtypeStruct((case.batch, case.length, case.num_heads, case.head_dim), dtype)
    keys = jax.ShapeDtypeStruct((case.batch, case.length, case.num_kv_heads, case.head_dim), dtype)
    return queries, keys, keys


def decode_inputs(case: Case, which: str, dtype: str = "bfloat16") -> tuple[jax.ShapeDtypeStruct, ...]:
    """Queries [B,1,N,H], keys and values [B,K,S,H] as a cache holds them, and how many of each row are written [B].

    For "decode_int8" keys and values are codes, and their scales follow, float32 [B,K,S,1] each.
    """
    queries = jax.ShapeDtypeStruct((case.decode_batch, 1, case.num_heads, case.head_dim), dtype)
    shape = (case.decode_batch, case.num_kv_heads, case.length)
    slots = jax.ShapeDtypeStruct((*shape, case.head_dim), "int8" if which == "decode_int8" else dtype)
    scales = (jax.ShapeDtypeStruct((*shape, 1), "float32"),) * 2 if which == "decode_int8" else ()
    return queries, slots, slots, jax.ShapeDtypeStruct((case.decode_batch,), "int32"), *scales


def visible_pairs(case: Case) -> int:
    """Pairs of a query and a key that it sees, in one head of one row."""
    index = np.arange(case.length)
    last = index if case.causal or case.window else np.full_like(index, case.length - 1)
    first = np.maximum(index - case.window + 1, 0) if case.window else np.zeros_like(index)
    return int(np.sum(last - first + 1))


def least_bytes(case: Case, which: str, itemsize: int = 2) -> int:
    """What a pass cannot do without: every input read once, every result written once."""
    if which in DECODING:  # queries and outputs, and the slots that are seen
        slot = case.head_dim + 4 if which == "decode_int8" else case.head_dim * itemsize
        seen = min(case.length, case.window or case.length)
        vectors = case.num_heads * case.head_dim * itemsize
        return case.decode_batch * (2 * vectors + 2 * case.num_kv_heads * seen * slot)
    queries = case.batch * case.length * case.num_heads
    keys = case.batch * case.length * case.num_kv_heads
    statistics = 4 * queries  # the log-sum-exp, float32
    if which == "forward":  # q, out and k, v; the statistics are written
        return (2 * queries + 2 * keys) * case.head_dim * itemsize + statistics
    # q, out, dout, dq and k, v, dk, dv; the statistics are read
    return (4 * queries + 4 * keys) * case.head_dim * itemsize + statistics


def least_flops(case: Case, which: str) -> int:
    """Of the products, over visible pairs alone: two of them forward, five backward (Dao, FlashAttention-2)."""
    if which in DECODING:
        pairs, products = case.decode_batch * min(case.length, case.window or case.length), 2
    else:
        pairs, products = case.batch * visible_pairs(case), 2 if which == "forward" else 5
    return 2 * products * pairs * case.num_heads * case.head_dim
