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
        fields["window"] = jnp.int32(draw(st.integers(-1, max(T, S) // 2)))
    if draw(st.booleans()):
        fields |= segments(random, B, T, S, in_order=draw(st.booleans()))
    if draw(st.booleans()):
        fields["query_offset"] = jnp.asarray(random.integers(-12, S, draw(st.sampled_from([(), (B,)]))), jnp.int32)
    if draw(st.booleans()):
        fields["key_lengths"] = jnp.asarray(random.integers(0, S + 1, B), jnp.int32)
    if draw(st.booleans()):
        fields["slopes"] = jnp.asarray(random.uniform(0, 0.5, N), jnp.float32)
    if draw(st.booleans()):
        fields["query_scale"] = jnp.asarray(random.uniform(0.5, 2, (B, T)), jnp.float32)
    return AttentionMask(**fields)


def segments(random, B, T, S, in_order):
    """Ids of a few segments and padding, which may come back later in a row."""
    ids = {"query_segment_ids": random.integers(0, 4, (B, T)), "key_segment_ids": random.integers(0, 4, (B, S))}
    return {name: jnp.asarray(np.sort(x, axis=1) if in_order else x, jnp.int32) for name, x in ids.items()}


@st.composite
def full_masks(draw, B, T, S, N):
    """Every rule in use, some of them drawn so that they change nothing: one program serves all of these masks."""
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    one_segment = {"query_segment_ids": jnp.ones((B, T), jnp.int32), "key_segment_ids": jnp.ones((B, S), jnp.int32)}
    kind = draw(st.sampled_from(["one", "in order", "mixed"]))
    lengths = draw(st.sampled_from([random.integers(0, S + 1, B), np.full(B, S)]))
    return AttentionMask(
        window=jnp.int32(draw(st.integers(-1, max(T, S)))),
        **(one_segment if kind == "one" else segments(random, B, T, S, kind == "in order")),
        query_offset=jnp.asarray(random.integers(-12, S, B), jnp.int32),
        key_lengths=jnp.asarray(lengths, jnp.int32),
        slopes=jnp.asarray(random.uniform(0, draw(st.sampled_from([0, 0.5])), N), jnp.float32),
        query_scale=jnp.asarray(random.uniform(0.5, 2, (B, T)), jnp.float32),
    )


SIZES = st.integers(1, 9)  # uneven on purpose
HEAD_DIMS = st.just(4)


@st.composite
def problems(draw, longest=20, head_dims=HEAD_DIMS, sizes=SIZES):
    """A shape (B, T, S, N, K, H), a mask, and the sizes of a tile, drawn from `sizes`."""
    T, S = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    K = draw(st.integers(1, 2))
    B, N = draw(st.integers(1, 2)), K * draw(st.integers(1, 3))
    mask = drawn_mask(draw, B, T, S, N)
    return (B, T, S, N, K, draw(head_dims)), mask, draw(st.tuples(sizes, sizes))


@st.composite
def decoding_problems(draw, longest=80):
    """A shape (B, S, N, K, H), a mask for one query, and a number of splits."""
    B, S, K = draw(st.integers(1, 2)), draw(st.integers(1, longest)), draw(st.integers(1, 2))
    N, H = K * draw(st.integers(1, 3)), draw(st.sampled_from([8, 64, 80, 128]))
    return (B, S, N, K, H), drawn_mask(draw, B, 1, S, N), draw(st.integers(1, 4))
