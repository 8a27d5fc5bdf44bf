"""What is the GPU's own in fused attention, interpreted; `test_pallas` has what all platforms' kernels must do."""

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
from llm_jax.kernels.pallas_gpu import gpu_attention
from llm_jax.kernels.ranges import key_ranges, query_ranges
from llm_jax.kernels.tile import visible
from tests.kernels import oracle
from tests.kernels.forms import QUANTITIES, inputs
from tests.kernels.fused import ATTEND, GPU_BLOCKS, compiled, output_and_gradients, relative_errors


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


def run_anew():
    """Not what another test has compiled."""
    return jax.jit(functools.partial(output_and_gradients, ATTEND["pallas_gpu"]))


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
        errors = relative_errors(run_anew()(q, k, v, mask, dout), expected)
    assert min(errors.values()) > 1e-2, errors
    with changed(jnp, "log2", jnp.zeros_like):
        errors = relative_errors(run_anew()(q, k, v, mask, dout), expected)
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
        errors = relative_errors(run_anew()(q, k, v, mask, dout), expected)
    assert min(errors.values()) > 1e-2, errors
    assert max(relative_errors(compiled("pallas_gpu")(q, k, v, mask, dout), expected).values()) < 4e-6


@pytest.mark.parametrize("query_axis", [0, 1])
def test_distances_are_exact_beyond_what_float32_counts(query_axis):
    keys, queries = (
        pallas_gpu._Rows(jnp.int32(first), first + jnp.arange(16), None, None) for first in (2**24 + 1, 2**24 + 33)
    )
    bias = pallas_gpu._add_bias(jnp.zeros((16, 16)), jnp.float32(0.5), queries, keys, query_axis)
    expected_TS = 0.5 * (np.arange(16)[None, :] - np.arange(16)[:, None] - 32)
    np.testing.assert_array_equal(bias, expected_TS if query_axis == 0 else expected_TS.T)


LENGTH = 96


def tiles_in_ranges(mask):
    """Products of two tiles that the ranges allow, for two heads: one per tile forward, two in each backward pass."""

    def tiles(ranges, tile):
        found = ranges(mask, 1, LENGTH, LENGTH, (tile.queries, tile.keys))
        return 2 * int(jnp.sum(found.last - found.first))

    gradients = tiles(key_ranges, GPU_BLOCKS.query_gradients) + tiles(query_ranges, GPU_BLOCKS.key_gradients)
    return tiles(key_ranges, GPU_BLOCKS.forward) + 2 * gradients


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
        run = run_anew()
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
