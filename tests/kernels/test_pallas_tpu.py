"""What is the TPU's own in fused attention, interpreted; `test_pallas` has what all platforms' kernels must do."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from llm_jax.errors import UserError
from llm_jax.kernels import pallas_tpu, pallas_tpu_decode, splash
from llm_jax.kernels.choice import Problem
from llm_jax.kernels.chunked import Tile
from llm_jax.kernels.flash_decoding import Slots
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.pallas_tpu import Blocks, tpu_attention
from llm_jax.kernels.ranges import key_ranges, query_ranges
from tests.kernels import oracle
from tests.kernels.forms import QUANTITIES, inputs
from tests.kernels.fused import ATTEND, TPU_BLOCKS, output_and_gradients, relative_errors


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", pallas_tpu.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_head_dim_at_whole_registers(head_dim, dtype):
    """Tiles that a TPU can have, on lengths of more than one of them."""
    q, k, v, dout = inputs(1, 300, 260, 2, 1, head_dim, dtype=dtype)
    mask = AttentionMask(slopes=jnp.asarray([0.5, 0.1], jnp.float32))
    blocks = Blocks(Tile(128, 256), Tile(256, 128), Tile(128, 128))
    attend = functools.partial(tpu_attention, blocks=blocks, interpret=True)
    actual = jax.jit(functools.partial(output_and_gradients, attend))(q, k, v, mask, dout)
    errors = relative_errors(actual, oracle.attention(q, k, v, mask, dout))
    assert max(errors.values()) < (4e-6 if dtype == jnp.float32 else 1.2e-2), errors


def wrong_kernels():
    """Name, what to patch, the mask that shows it, and the results that go wrong."""
    rows, visible, tiles = pallas_tpu._rows, pallas_tpu.tile.visible, pallas_tpu.ranges._tiles
    everything, window = AttentionMask(causal=False), AttentionMask(window=jnp.int32(2))

    def dirty(ref, block, size, length, masked):
        return rows(ref, block, size, length, False)

    def endless(query, key, num_keys, **rules):
        return visible(query, key, 2**30, **rules)

    def wider(query, key, num_keys, *, window, **rules):
        return visible(query, key, num_keys, window=None if window is None else window + 1, **rules)

    def narrower(mask, *sizes):
        return tiles(mask if mask.window is None else dataclasses.replace(mask, window=mask.window - 1), *sizes)

    return {
        "rows beyond the end enter a product": (pallas_tpu, "_rows", dirty, everything, QUANTITIES),
        "the tail of the keys is not masked": (pallas_tpu.tile, "visible", endless, everything, QUANTITIES),
        "weights are not divided by their sums": (jnp, "log2", jnp.zeros_like, everything, QUANTITIES[1:]),
        "inside a tile the window is off by one": (pallas_tpu.tile, "visible", wider, window, QUANTITIES),
        "a tile with one visible pair is skipped": (pallas_tpu.ranges, "_tiles", narrower, window, QUANTITIES),
    }


@pytest.mark.parametrize("mistake", wrong_kernels())
def test_wrong_kernels_are_caught(mistake):
    module, name, wrong, mask, caught = wrong_kernels()[mistake]
    length = 18 if mask.window is None else 34  # query 32 sees one key of the block before its own, in every pass
    q, k, v, dout = inputs(1, length, length, 1, 1, 32)
    with mock.patch.object(module, name, wrong):
        actual = jax.jit(functools.partial(output_and_gradients, ATTEND["pallas_tpu"]))(q, k, v, mask, dout)
    errors = relative_errors(actual, oracle.attention(q, k, v, mask, dout))
    assert all(not errors[result] < 1e-2 for result in caught), errors


def listed(mask, by_keys, length=64, tile=(16, 8)):
    """The steps of a kernel's grid: (outer, inner, flags) of each."""
    side = query_ranges if by_keys else key_ranges
    inner_blocks = length // tile[0 if by_keys else 1]
    steps, count = jax.jit(lambda: pallas_tpu._steps(side(mask, 1, length, length, tile), inner_blocks))()
    steps = np.asarray(steps)[: int(count)]
    return np.stack([steps >> 17, (steps >> 4) % 2**13, steps % 2**4], axis=1)


@pytest.mark.parametrize("by_keys", [False, True])
def test_the_grid_is_as_long_as_there_are_visible_tiles(by_keys):
    segments = jnp.repeat(jnp.arange(1, 5), 16)[None]
    packed = AttentionMask(causal=False, query_segment_ids=segments, key_segment_ids=segments)
    lengths = {"everything": AttentionMask(causal=False), "causal": AttentionMask(), "segments": packed}
    counts = {name: len(listed(mask, by_keys)) for name, mask in lengths.items()}
    assert counts == {"everything": 32, "causal": 20, "segments": 8}


def test_steps_begin_and_end_each_block_once_and_say_which_tiles_are_full():
    steps = listed(AttentionMask(window=16), False)
    begins, ends, visits, full = ((steps[:, 2] & flag) != 0 for flag in (1, 2, 4, 8))
    assert begins.sum() == ends.sum() == 4 and visits.all()
    np.testing.assert_array_equal(steps[begins, 0], range(4))
    assert [tuple(step) for step in steps[:6, :2]] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert not full.any()
    full = (listed(AttentionMask(), False)[:, 2] & 8) != 0
    assert full.sum() == 12


def test_a_block_that_sees_nothing_still_has_a_step_to_write_zeros():
    steps = listed(AttentionMask(causal=False, key_lengths=jnp.asarray([0])), False)
    assert [tuple(step) for step in steps] == [(x, 0, 3) for x in range(4)]


def test_key_gradients_fetch_no_queries_where_they_visit_none():
    """The pipeline fetches a block when its place is another than a step before, be it only another head."""
    q, k, _, _ = inputs(2, 64, 64, 8, 2, 32)
    mask = AttentionMask(key_lengths=jnp.asarray([64, 20]))
    plan = pallas_tpu._plan(q, k, mask, Blocks(*[Tile(16, 16)] * 3), interpret=True)
    size = plan.blocks.key_gradients
    steps, count = pallas_tpu._steps(query_ranges(mask, 2, 64, 64, size), 4)
    scalars = pallas_tpu._scalars(plan, mask, steps)
    locate = functools.partial(pallas_tpu._locate, plan, size, True)
    queries = pallas_tpu._specs(plan, size, locate)["q"]

    @jax.jit
    @jax.vmap
    def places(grid):
        at = locate(*grid, scalars)
        return jnp.stack(queries.index_map(*grid, scalars)[:3]), at.masked | at.full

    place, visits = map(np.asarray, places(np.indices((2, 2, int(count), 4)).reshape(4, -1).T))
    fetches = np.concatenate([[True], np.any(place[1:] != place[:-1], axis=1)])
    # A head's visits: 4 + 3 + 2 + 1 in the first row, 4 + 3 in the second, whose last two blocks of keys have none.
    assert visits.sum() == fetches[visits].sum() == 8 * (10 + 7) and (~visits).sum() == 8 * 3
    assert fetches[~visits].sum() == 2, "one for each key/value head of the second row, and none in the steps after"


def test_distances_are_exact_beyond_the_integers_that_float32_holds():
    size = Tile(16, 16)
    mask = AttentionMask(query_offset=jnp.int32(2**24 + 1), slopes=jnp.ones(1))
    q, k, _, _ = inputs(1, 16, 16, 1, 1, 32)
    plan = pallas_tpu._plan(q, k, mask, Blocks(size, size, size), interpret=True)
    scalars = pallas_tpu._scalars(plan, mask, jnp.zeros(1, jnp.int32))
    nowhere = dict.fromkeys(("begins", "ends", "masked", "full"))
    at = pallas_tpu._Place(b=0, n=0, k=0, x=0, y=2**20, **nowhere)
    inputs_ = {"q": jnp.zeros((16, 32)), "k": jnp.zeros((16, 32))}
    scores_TS = pallas_tpu._scores(plan, size, at, scalars, inputs_, query_axis=0)
    distance_TS = np.arange(16) - np.arange(16)[:, None] - 1
    np.testing.assert_array_equal(scores_TS, np.float32(pallas_tpu.LOG2E) * distance_TS.astype(np.float32))


SPLASH_SEGMENTS = jnp.asarray([[1] * 100 + [2] * 100 + [0] * 56], jnp.int32)
SPLASH_MASKS = {
    "causal": ((1, 128, 256), AttentionMask()),
    "window": ((1, 256, 256), AttentionMask(window=70)),
    "segments": (
        (1, 256, 256),
        AttentionMask(
            query_segment_ids=SPLASH_SEGMENTS,
            key_segment_ids=SPLASH_SEGMENTS,
            query_scale=jnp.linspace(0.5, 1.5, 256)[None],
        ),
    ),
}


@pytest.mark.parametrize("case", ["causal", pytest.param("window", marks=pytest.mark.slow), "segments"])
def test_splash_agrees_where_it_serves(case):
    """NaN in padding included, which both must not see."""
    (B, T, S), mask = SPLASH_MASKS[case]
    q, k, v, dout = inputs(B, T, S, 4, 2, 32)
    hidden = ~mask.visible_keys(T, S)[0] if mask.visible_keys(T, S) is not None else np.zeros(S, bool)
    k, v = k.at[:, hidden].set(jnp.nan), v.at[:, hidden].set(jnp.nan)

    def run(attend):
        @jax.jit
        def both(q, k, v, dout):
            out, pullback = jax.vjp(lambda *x: attend(*x, mask, interpret=True), q, k, v)
            return out, *pullback(dout)

        return both(q, k, v, dout)

    ours = run(functools.partial(tpu_attention, blocks=Blocks(*[Tile(128, 128)] * 3)))
    for name, a, b in zip(QUANTITIES, run(splash.splash_attention), ours, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=name)


def test_splash_in_bfloat16():
    """Where the root of the head dim is no power of 2 it rounds the queries once more than our own kernel."""
    segments = SPLASH_SEGMENTS[:, 50:178]
    mask = AttentionMask(query_segment_ids=segments, key_segment_ids=segments)
    q, k, v, dout = inputs(1, 128, 128, 2, 1, 32, dtype=jnp.bfloat16)

    @jax.jit
    def run(q, k, v, dout):
        out, pullback = jax.vjp(lambda *x: splash.splash_attention(*x, mask, interpret=True), q, k, v)
        return out, *pullback(dout)

    actual = run(q, k, v, dout)
    assert all(x.dtype == jnp.bfloat16 for x in actual)
    errors = relative_errors(actual, oracle.attention(q, k, v, mask, dout))
    assert max(errors.values()) < 1.2e-2, errors


TPU = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("TPU v5", 2, platform="tpu"))


@pytest.mark.parametrize("head_dim", [80, 256])
def test_splash_lowers_for_any_head_dim(head_dim):
    q, k, v, dout = inputs(1, 256, 128, 2, 1, head_dim, dtype=jnp.bfloat16)

    @jax.jit
    def run(q, k, v, dout):
        return jax.vjp(lambda *x: splash.splash_attention(*x, AttentionMask(causal=False)), q, k, v)[1](dout)

    with jax.sharding.use_abstract_mesh(TPU):
        assert run.trace(q, k, v, dout).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3


PROBLEM = Problem("tpu", "TPU v5p", "bfloat16", 1, 256, 256, 4, 2, 128, ("causal",))


def test_refusals():
    assert pallas_tpu.refuses(PROBLEM) is None
    assert "on TPUs, not on cpu" in pallas_tpu.refuses(PROBLEM._replace(platform="cpu"))
    assert "not float16" in pallas_tpu.refuses(PROBLEM._replace(dtype="float16"))
    assert "32, 64, 96, 128, 192, 256, not 80" in pallas_tpu.refuses(PROBLEM._replace(head_dim=80))
    long = PROBLEM._replace(batch=64, num_queries=2**16, num_keys=2**16)
    assert pallas_tpu.refuses(long) is None
    refusal = pallas_tpu.refuses(long._replace(features=("key_lengths",)))
    assert "16384 tiles for each of 64 masks" in refusal and "implementation='chunked'" in refusal


def test_splash_refusals():
    assert splash.refuses(PROBLEM) is None
    assert splash.refuses(PROBLEM._replace(features=("causal", "window"), static_window=5)) is None
    assert "not on gpu" in splash.refuses(PROBLEM._replace(platform="gpu"))
    assert "an array" in splash.refuses(PROBLEM._replace(features=("causal", "window")))
    assert "mask.slopes" in splash.refuses(PROBLEM._replace(features=("causal", "slopes")))
    prefill = splash.refuses(PROBLEM._replace(features=("causal", "query_offset", "key_lengths")))
    assert "mask.query_offset" in prefill and "implementation='pallas_tpu'" in prefill and "\n" not in prefill
    assert "multiples of 128" in splash.refuses(PROBLEM._replace(num_queries=100))
    assert "not float16" in splash.refuses(PROBLEM._replace(dtype="float16"))


DECODING = PROBLEM._replace(num_queries=1, cache_dtype="bfloat16")


def test_decoding_refuses_a_cache_that_it_cannot_widen():
    for served in pallas_tpu_decode.CACHE_DTYPES:
        assert pallas_tpu_decode.refuses(DECODING._replace(cache_dtype=served)) is None
    for other in ("float16", "float8_e4m3fn"):
        assert f"int8, got {other}" in pallas_tpu_decode.refuses(DECODING._replace(cache_dtype=other))


@pytest.mark.parametrize("cache", pallas_tpu_decode.CACHE_DTYPES)
@pytest.mark.parametrize("dtype", pallas_tpu_decode.DTYPES)
def test_decoding_lowers_for_every_cache(dtype, cache):
    q, slot = (jax.ShapeDtypeStruct(shape, of) for shape, of in (((2, 1, 4, 64), dtype), ((2, 2, 300, 64), cache)))
    scale = jax.ShapeDtypeStruct((2, 2, 300, 1), jnp.float32) if cache == "int8" else None
    mask = AttentionMask(query_offset=jax.ShapeDtypeStruct((2,), jnp.int32))
    with jax.sharding.use_abstract_mesh(TPU):
        traced = jax.jit(pallas_tpu_decode.decode).trace(q, Slots(slot, slot, scale, scale), mask)
        assert "decode_attention" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_mistakes_are_one_line():
    q, k, v, _ = inputs(1, 4, 4, 1, 1, 80)
    with pytest.raises(UserError, match=r"head dims are .* not 80") as error:
        tpu_attention(q, k, v, AttentionMask())
    assert "\n" not in str(error.value)
    q, k, v, _ = inputs(1, 4, 4, 1, 1, 32)
    with pytest.raises(UserError, match="multiples of 128"):
        tpu_attention(q, k, v, AttentionMask(), blocks=TPU_BLOCKS)


@pytest.mark.parametrize(
    "rule", [{"slopes": jnp.ones(2)}, {"key_lengths": jnp.asarray([128])}, {"window": jnp.asarray(5)}], ids=str
)
def test_splash_called_directly_drops_no_rule(rule):
    q = jnp.zeros((1, 128, 2, 64))
    with pytest.raises(UserError, match="'splash' cannot serve this call: "):
        splash.splash_attention(q, q, q, AttentionMask(**rule))


def test_more_blocks_than_a_step_can_name_are_refused():
    """8,200 blocks of keys beside one of queries: their number fits into the list, the highest index into no step."""
    problem = PROBLEM._replace(num_queries=512, num_keys=8200 * 512)
    assert "8200 blocks" in pallas_tpu.refuses(problem)
    assert pallas_tpu.refuses(problem._replace(num_keys=8192 * 512)) is None
