"""The chunked attention's temporary memory, forward and backward, as XLA plans it: linear in the length."""

import itertools

import jax
import jax.numpy as jnp

from llm_jax.kernels.chunked import chunked_attention
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.reference import reference_attention

HEAD_DIM = 32
LENGTHS = [1024 * 2**i for i in range(6)]  # 1k to 32k


def temporary_bytes(run, mask: AttentionMask, length: int) -> int:
    """Of one gradient, compiled and not run."""
    x = jax.ShapeDtypeStruct((1, length, 1, HEAD_DIM), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(run(q, k, v, mask))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_chunked_memory_grows_with_the_length():
    sizes = [temporary_bytes(chunked_attention, AttentionMask(), length) for length in LENGTHS]
    for smaller, larger in itertools.pairwise(sizes):  # a line with an offset: each doubling at most doubles it
        assert larger <= 2.05 * smaller
    assert sizes[-1] <= 10 * LENGTHS[-1] * HEAD_DIM * 4  # of arrays like the queries


def test_alibi_and_windows_add_no_array_of_pairs():
    mask = AttentionMask(window=512, slopes=jnp.asarray([0.5]))
    smaller, larger = (temporary_bytes(chunked_attention, mask, length) for length in (8192, 16384))
    assert larger <= 2.05 * smaller


def test_the_plain_form_would_fail():
    smaller, larger = (temporary_bytes(reference_attention, AttentionMask(), length) for length in (1024, 2048))
    assert larger > 3.5 * smaller
