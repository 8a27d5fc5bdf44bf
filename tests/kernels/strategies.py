"""What hypothesis draws for the tests of attention: shapes, masks with any set of rules, tile sizes."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.mask import AttentionMask


def drawn_mask(draw, B, T, S, N):
    """Any set of rules, each with values that make it matter."""
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    fields = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        fields["window"] = jnp.int32(draw(st.integers(0, max(T, S) // 2)))
    if draw(st.booleans()):
        fields["query_segment_ids"] = jnp.asarray(np.sort(random.integers(0, 4, (B, T)), axis=1), jnp.int32)
        fields["key_segment_ids"] = jnp.asarray(np.sort(random.integers(0, 4, (B, S)), axis=1), jnp.int32)
    if draw(st.booleans()):
        fields["query_offset"] = jnp.asarray(random.integers(0, 12, draw(st.sampled_from([(), (B,)]))), jnp.int32)
    if draw(st.booleans()):
        fields["key_lengths"] = jnp.asarray(random.integers(0, S + 1, B), jnp.int32)
    if draw(st.booleans()):
        fields["slopes"] = jnp.asarray(random.uniform(0, 0.5, N), jnp.float32)
    if draw(st.booleans()):
        fields["query_scale"] = jnp.asarray(random.uniform(0.5, 2, (B, T)), jnp.float32)
    return AttentionMask(**fields)


SIZES = st.integers(1, 9)  # uneven on purpose


@st.composite
def problems(draw, longest=20, head_dim=4, sizes=SIZES):
    """A shape (B, T, S, N, K, H), a mask, and the sizes of a tile, drawn from `sizes`."""
    T, S = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    K = draw(st.integers(1, 2))
    B, N = draw(st.integers(1, 2)), K * draw(st.integers(1, 3))
    mask = drawn_mask(draw, B, T, S, N)
    return (B, T, S, N, K, head_dim), mask, draw(st.tuples(sizes, sizes))
