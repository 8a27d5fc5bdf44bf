"""The GPU's fused attention, interpreted, against the float64 oracle; and that it lowers for a GPU that is not here."""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.kernels import pallas_gpu, pallas_gpu_decode
from llm_jax.kernels.choice import Problem
from llm_jax.kernels.flash_decoding import Slots
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.pallas_gpu import Blocks, Pass, gpu_attention
from llm_jax.kernels.ranges import key_ranges, query_ranges
from llm_jax.kernels.tile import visible
from tests.kernels import oracle
from tests.kernels.forms import QUANTITIES, SAVED, inputs, relative_error

SMALL = Blocks(Pass(16, 32, 4, 2), Pass(16, 16, 4, 2), Pass(32, 16, 4, 2))


def output_and_gradients(q, k, v, mask, dout):
    attend = functools.partial(gpu_attention, blocks=SMALL, interpret=True)
    out, pullback = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
    return out, *pullback(dout)


compiled = jax.jit(output_and_gradients)  # one compilation for all masks of a structure


def relative_errors(actual, expected):
    """Relative L2 error of the output and of each gradient."""
    return dict(zip(QUANTITIES, map(relative_error, actual, expected), strict=True))


def check(q, k, v, mask, dout, tolerance=4e-6):
    actual = compiled(q, k, v, mask, dout)
    assert all(a.dtype == q.dtype for a in actual)
    errors = relative_errors(actual, oracle.attention(q, k, v, mask, dout))
    assert max(errors.values()) < tolerance, errors
    return actual


# Two sequences of several blocks on either side, none of them whole at the end, every rule in force.
SHAPE = (2, 37, 45, 4, 2, 32)
EVERYTHING = AttentionMask(
    window=jnp.int32(30),
    query_segment_ids=jnp.asarray([[1] * 20 + [2] * 17, [3] * 33 + [0] * 4], jnp.int32),
    key_segment_ids=jnp.asarray([[1] * 22 + [2] * 23, [3] * 42 + [0] * 3], jnp.int32),
    query_offset=jnp.asarray([4, 6], jnp.int32),
    key_lengths=jnp.asarray([45, 38], jnp.int32),
    slopes=jnp.asarray([0.5, 0.1, 0.3, 0.9], jnp.float32),
    query_scale=jnp.linspace(0.5, 1.5, 74).reshape(2, 37),
)


def test_all_rules_at_once():
    q, k, v, dout = inputs(*SHAPE)
    check(q, k, v, EVERYTHING, dout)


@pytest.mark.parametrize("window", [0, 2, 17])
def test_the_window_is_an_argument_of_the_compiled_program(window):
    q, k, v, dout = inputs(*SHAPE)
    check(q, k, v, dataclasses.replace(EVERYTHING, window=jnp.int32(window)), dout)


CASES = {
    "bidirectional, head dim 96": ((1, 33, 18, 1, 1, 96), AttentionMask(causal=False), jnp.float32, 4e-6),
    "causal, head dim 192, bfloat16": ((1, 20, 36, 2, 1, 192), AttentionMask(), jnp.bfloat16, 1.2e-2),
    "more queries than keys, float16": ((1, 40, 5, 2, 2, 32), AttentionMask(), jnp.float16, 2e-3),
}


@pytest.mark.parametrize("case", CASES)
def test_head_dims_and_dtypes(case):
    shape, mask, dtype, tolerance = CASES[case]
    q, k, v, dout = inputs(*shape, dtype=dtype)
    check(q, k, v, mask, dout, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", pallas_gpu.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_head_dim_at_its_own_blocks(head_dim, dtype):
    """The tiles of the table, on lengths of more than one of them."""
    q, k, v, dout = inputs(1, 150, 140, 2, 1, head_dim, dtype=dtype)
    mask = AttentionMask(slopes=jnp.asarray([0.5, 0.1], jnp.float32))
    attend = functools.partial(gpu_attention, interpret=True)
    out, pullback = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
    errors = relative_errors((out, *pullback(dout)), oracle.attention(q, k, v, mask, dout))
    assert max(errors.values()) < (4e-6 if dtype == jnp.float32 else 1.2e-2), errors


def test_rounding_is_that_of_a_dense_computation():
    """Against float64, no more than twice the error of the whole score matrix in float32."""
    q, k, v, dout = inputs(*SHAPE)
    mask = dataclasses.replace(EVERYTHING, window=jnp.int32(0))

    def dense(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        q = q * mask.query_scale[:, :, None, None]
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(32) + mask.bias(37, 45)
        seen = mask.visible(37, 45)
        weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), 0)
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    out, pullback = jax.vjp(dense, q, k, v)
    expected = oracle.attention(q, k, v, mask, dout)
    own = relative_errors(compiled(q, k, v, mask, dout), expected)
    for name, error in relative_errors((out, *pullback(dout)), expected).items():
        assert own[name] < 2 * error, name


WRONG_MASKS = {
    "a window off by one": {"window": EVERYTHING.window + 1},
    "a length off by one": {"key_lengths": EVERYTHING.key_lengths + 1},
    "slopes of the wrong sign": {"slopes": -EVERYTHING.slopes},
    "slopes of other heads": {"slopes": EVERYTHING.slopes[::-1]},
    "an offset off by one": {"query_offset": EVERYTHING.query_offset - 1},
    "a segment's end off by one": {"key_segment_ids": jnp.roll(EVERYTHING.key_segment_ids, 1, axis=1)},
}


@pytest.mark.parametrize("mistake", WRONG_MASKS)
def test_wrong_masks_are_caught(mistake):
    """The comparison with the oracle can fail."""
    q, k, v, dout = inputs(*SHAPE)
    actual = compiled(q, k, v, dataclasses.replace(EVERYTHING, **WRONG_MASKS[mistake]), dout)
    errors = relative_errors(actual, oracle.attention(q, k, v, EVERYTHING, dout))
    assert min(errors.values()) > 1e-3, errors


@contextlib.contextmanager
def changed(module, name, value):
    """Kernels traced with another `module.name`, and traced anew before and after."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, name, value))
        for call in (pallas_gpu._call_by_queries, pallas_gpu._call_by_keys):
            call.clear_cache()
            stack.callback(call.clear_cache)
        yield


def test_wrong_kernels_are_caught():
    """A tail that is not masked, and a backward pass whose weights are not divided by their sums."""
    q, k, v, dout = inputs(1, 18, 18, 1, 1, 32)
    mask = AttentionMask(causal=False)
    expected = oracle.attention(q, k, v, mask, dout)

    def endless(query_index, key_index, num_keys, **rules):
        return visible(query_index, key_index, 2**30, **rules)

    with changed(pallas_gpu, "visible", endless):
        errors = relative_errors(jax.jit(lambda *x: output_and_gradients(*x))(q, k, v, mask, dout), expected)
    assert min(errors.values()) > 1e-2, errors
    with changed(jnp, "log2", jnp.zeros_like):
        errors = relative_errors(jax.jit(lambda *x: output_and_gradients(*x))(q, k, v, mask, dout), expected)
    assert errors["out"] < 4e-6 and min(errors[name] for name in QUANTITIES[1:]) > 1e-2, errors


def with_window(function, difference):
    """Of `ranges`, told of a window that is larger than the one it is given."""
    return lambda mask, *sizes: function(dataclasses.replace(mask, window=mask.window + difference), *sizes)


WRONG_WINDOWS = {
    "in a tile": {"visible": lambda *indices, window, **rules: visible(*indices, window=window + 1, **rules)},
    "in the choice of tiles": {
        "key_ranges": with_window(key_ranges, -1),
        "query_ranges": with_window(query_ranges, -1),
    },
}


@pytest.mark.parametrize("place", WRONG_WINDOWS)
def test_a_window_that_is_off_by_one_inside_the_kernels_is_caught(place):
    q, k, v, dout = inputs(1, 34, 34, 1, 1, 32)
    mask = AttentionMask(window=jnp.int32(2))  # query 32 sees one key of the block before its own
    expected = oracle.attention(q, k, v, mask, dout)
    with contextlib.ExitStack() as stack:
        for name, value in WRONG_WINDOWS[place].items():
            stack.enter_context(changed(pallas_gpu, name, value))
        errors = relative_errors(jax.jit(lambda *x: output_and_gradients(*x))(q, k, v, mask, dout), expected)
    assert min(errors.values()) > 1e-2, errors
    assert max(relative_errors(compiled(q, k, v, mask, dout), expected).values()) < 4e-6


@pytest.mark.parametrize("query_axis", [0, 1])
def test_distances_are_exact_beyond_what_float32_counts(query_axis):
    keys, queries = (
        pallas_gpu._Rows(jnp.int32(first), first + jnp.arange(16), None, None) for first in (2**24 + 1, 2**24 + 33)
    )
    bias = pallas_gpu._add_bias(jnp.zeros((16, 16)), jnp.float32(0.5), queries, keys, query_axis)
    expected_TS = 0.5 * (np.arange(16)[None, :] - np.arange(16)[:, None] - 32)
    np.testing.assert_array_equal(bias, expected_TS if query_axis == 0 else expected_TS.T)


HIDDEN_KEYS = {
    "beyond the length": ({"key_lengths": jnp.asarray([19, 0], jnp.int32)}, {0: slice(19, None), 1: slice(None)}),
    "padding": ({"key_segment_ids": EVERYTHING.key_segment_ids.at[0, :9].set(0)}, {0: slice(9), 1: slice(42, None)}),
    "not yet written": ({"query_offset": jnp.asarray([-5, 2], jnp.int32)}, {0: slice(32, None), 1: slice(39, None)}),
    "behind the window": ({"query_offset": jnp.asarray([40, 44], jnp.int32)}, {0: slice(11), 1: slice(15)}),
}


@pytest.mark.parametrize("case", HIDDEN_KEYS)
def test_nan_where_no_query_looks_does_not_leak(case):
    changes, hidden = HIDDEN_KEYS[case]
    q, k, v, dout = inputs(*SHAPE)
    mask = dataclasses.replace(EVERYTHING, **changes)
    clean = check(q, k, v, mask, dout)
    for b, keys in hidden.items():
        k, v = k.at[b, keys].set(jnp.nan), v.at[b, keys].set(jnp.nan)
    for a, b in zip(clean, compiled(q, k, v, mask, dout), strict=True):
        np.testing.assert_array_equal(a, b)


def test_queries_that_see_nothing_are_zero_and_pass_no_gradient():
    """Padding, and a sequence without keys: whatever such rows hold, NaN included."""
    q, k, v, dout = inputs(*SHAPE)
    mask = dataclasses.replace(EVERYTHING, key_lengths=jnp.asarray([0, 45], jnp.int32))
    clean = check(q, k, v, mask, dout)
    empty = np.array([[True] * 37, [False] * 33 + [True] * 4])
    assert not np.any(np.asarray(clean[0])[empty]) and not np.any(np.asarray(clean[1])[empty])
    assert not np.any(np.asarray(clean[2])[0]) and not np.any(np.asarray(clean[3])[0])
    q, dout = q.at[empty].set(jnp.nan), dout.at[empty].set(jnp.nan)
    for a, b in zip(clean, compiled(q, k, v, mask, dout), strict=True):
        np.testing.assert_array_equal(a, b)


LENGTH = 96


def tiles_in_ranges(mask):
    """Products of two tiles that the ranges allow, for two heads: one per tile forward, two in each backward pass."""

    def tiles(ranges, tile):
        found = ranges(mask, 1, LENGTH, LENGTH, (tile.queries, tile.keys))
        return 2 * int(jnp.sum(found.last - found.first))

    gradients = tiles(key_ranges, SMALL.query_gradients) + tiles(query_ranges, SMALL.key_gradients)
    return tiles(key_ranges, SMALL.forward) + 2 * gradients


def test_work_is_proportional_to_the_tiles_that_hold_a_visible_pair():
    visits = []
    scores = pallas_gpu._scores

    def counted(left, right):
        jax.debug.callback(lambda: visits.append(1))
        return scores(left, right)

    one, thirds = jnp.ones((1, LENGTH), jnp.int32), jnp.repeat(jnp.arange(1, 4), 32)[None]
    # A window is an argument, so one program serves them all.
    rules = {"causal": (0, one), "window": (16, one), "segments": (0, thirds)}
    visited, allowed = {}, {}
    with changed(pallas_gpu, "_scores", counted):
        run = jax.jit(lambda *x: output_and_gradients(*x))
        for name, (window, segments) in rules.items():
            mask = AttentionMask(window=jnp.int32(window), query_segment_ids=segments, key_segment_ids=segments)
            q, k, v, dout = inputs(1, LENGTH, LENGTH, 2, 1, 32)
            jax.block_until_ready(run(q, k, v, mask, dout))
            jax.effects_barrier()
            visited[name], allowed[name] = len(visits), tiles_in_ranges(mask)
            visits.clear()
    assert visited == allowed
    every_tile = 2 * (6 * 3 + 2 * (3 * 6 + 6 * 6))
    assert visited["causal"] < 0.75 * every_tile
    assert visited["window"] < 0.4 * every_tile
    assert visited["segments"] < 0.35 * every_tile


def test_vmap():
    """Over examples with windows and offsets of their own, each as if it were alone."""
    q, k, v, dout = inputs(3, 20, 20, 2, 1, 32)
    windows, offsets = jnp.asarray([3, 0, 5], jnp.int32), jnp.asarray([0, 2, -1], jnp.int32)

    def one(q, k, v, window, offset, dout):
        mask = AttentionMask(window=window, query_offset=offset)
        return output_and_gradients(q[None], k[None], v[None], mask, dout[None])

    together = jax.jit(jax.vmap(one))(q, k, v, windows, offsets, dout)
    alone = jax.jit(one)
    for i in range(3):
        expected = alone(q[i], k[i], v[i], windows[i], offsets[i], dout[i])
        for a, b in zip(together, expected, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


def kernels(function, *args):
    """The names of the kernels that a program calls, for a GPU that need not be here."""
    jaxpr = str(jax.make_jaxpr(function)(*args))
    return [jaxpr.count(f"name={name}") for name in ("attention_forward", "attention_query_gradients")]


def test_remat_that_saves_the_named_values_does_not_repeat_the_forward_pass():
    q, k, v, _ = inputs(1, 16, 16, 1, 1, 32)

    def loss(wrap):
        return jax.grad(lambda q: jnp.sum(wrap(lambda q: gpu_attention(q, k, v, AttentionMask(), blocks=SMALL))(q)))

    assert kernels(loss(jax.checkpoint), q)[0] == 2
    assert kernels(loss(functools.partial(jax.checkpoint, policy=SAVED)), q)[0] == 1


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192])
def test_lowers_for_cuda_without_a_gpu(head_dim):
    q, k, v, dout = inputs(2, 300, 333, 4, 2, head_dim, dtype=jnp.bfloat16)
    segments = {"query_segment_ids": jnp.ones((2, 300), jnp.int32), "key_segment_ids": jnp.ones((2, 333), jnp.int32)}

    @jax.jit
    def run(q, k, v, dout, window):
        mask = AttentionMask(window=window, slopes=jnp.ones(4), key_lengths=jnp.asarray([5, 300]), **segments)
        return jax.vjp(lambda *x: gpu_attention(*x, mask), q, k, v)[1](dout)

    text = run.trace(q, k, v, dout, jnp.int32(5)).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("attention_forward", "attention_query_gradients", "attention_key_gradients"):
        assert text.count(f'name = "{name}"') == 1


SERVED = Problem("gpu", "NVIDIA A100-SXM4-80GB", "bfloat16", 1, 256, 256, 4, 2, 128, ("causal",))
DECODED = SERVED._replace(num_queries=1, cache_dtype="bfloat16")


def test_refusals():
    for served in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090", "NVIDIA RTX A6000"):
        assert pallas_gpu.refuses(SERVED._replace(device_kind=served)) is None
        assert pallas_gpu_decode.refuses(DECODED._replace(device_kind=served)) is None
    for old in ("Tesla T4", "Tesla V100-SXM2-16GB", "NVIDIA GeForce RTX 2080 Ti", "AMD Instinct MI300X"):
        assert "from Ampere on" in pallas_gpu.refuses(SERVED._replace(device_kind=old))
        assert "from Ampere on" in pallas_gpu_decode.refuses(DECODED._replace(device_kind=old))
    assert "NVIDIA GPUs, not on cpu" in pallas_gpu.refuses(SERVED._replace(platform="cpu"))
    assert "not int8" in pallas_gpu.refuses(SERVED._replace(dtype="int8"))
    assert "32, 64, 96, 128, 192, 256, not 80" in pallas_gpu.refuses(SERVED._replace(head_dim=80))


def decoded(batch, length, dtype):
    """Why the kernel refuses a cache of 8 heads of 128 numbers, or None."""
    problem = DECODED._replace(batch=batch, num_keys=length, num_kv_heads=8, cache_dtype=dtype)
    reason = pallas_gpu_decode.refuses(problem)
    keys = jax.ShapeDtypeStruct((batch, 8, length, 128), dtype)
    scales = jax.ShapeDtypeStruct((batch, 8, length, 1), "float32") if dtype == "int8" else None
    slots, q = Slots(keys, keys, scales, scales), jax.ShapeDtypeStruct((batch, 1, 8, 128), "bfloat16")
    try:
        jax.eval_shape(lambda q, slots: pallas_gpu_decode.decode(q, slots, AttentionMask(), interpret=True), q, slots)
    except UserError as error:
        assert reason is not None and reason in str(error) and "\n" not in reason
    else:
        assert reason is None
    return reason


def test_decoding_refuses_a_cache_that_it_cannot_read():
    """By its dtype, or as Triton's addresses would wrap: from 2 GiB of codes on, as long as they have 32 bits."""
    for dtype in ("bfloat16", "float16", "float32", "int8"):
        assert decoded(1, 64, dtype) is None
    assert "float32, int8, got float8_e4m3fn" in decoded(1, 64, "float8_e4m3fn")
    assert decoded(32, 2**16, "int8") is None and decoded(80, 2**16, "int8") is None
    assert "here 3.00" in decoded(48, 2**16, "int8")
    assert decoded(48, 2**16, "bfloat16") is None


def test_mistakes_are_one_line():
    q, k, v, _ = inputs(1, 4, 4, 1, 1, 80)
    with pytest.raises(UserError, match="not 80") as error:
        gpu_attention(q, k, v, AttentionMask())
    assert "\n" not in str(error.value)
    q, k, v, _ = inputs(1, 4, 4, 1, 1, 32)
    with pytest.raises(UserError, match="cast them to one"):
        gpu_attention(q.astype(jnp.bfloat16), k, v, AttentionMask())
