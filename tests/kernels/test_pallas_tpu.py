"""The TPU's fused attention, interpreted, against the float64 oracle; and that it lowers for a TPU that is not here."""

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

NAMES = ("out", "dq", "dk", "dv")
SAVED = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
SMALL = Blocks(Tile(16, 32), Tile(32, 16), Tile(16, 16))


def inputs(B, T, S, N, K, H, dtype=jnp.float32, seed=0):
    """Queries, keys, values and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def output_and_gradients(q, k, v, mask, dout, blocks=SMALL):
    out, pullback = jax.vjp(lambda *x: tpu_attention(*x, mask, blocks=blocks, interpret=True), q, k, v)
    return out, *pullback(dout)


compiled = jax.jit(output_and_gradients)  # one compilation for all masks of a structure


def relative_errors(actual, expected):
    """Relative L2 error of the output and of each gradient."""
    pairs = zip(NAMES, actual, expected, strict=True)
    return {name: np.linalg.norm(np.asarray(a, np.float64) - e) / np.linalg.norm(e) for name, a, e in pairs}


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
    "bidirectional, more queries than keys": ((1, 33, 18, 1, 1, 96), AttentionMask(causal=False), jnp.float32, 4e-6),
    "causal, bfloat16": ((1, 20, 36, 2, 1, 192), AttentionMask(), jnp.bfloat16, 1.2e-2),
}


@pytest.mark.parametrize("case", CASES)
def test_head_dims_and_dtypes(case):
    shape, mask, dtype, tolerance = CASES[case]
    q, k, v, dout = inputs(*shape, dtype=dtype)
    check(q, k, v, mask, dout, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", pallas_tpu.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_head_dim_at_whole_registers(head_dim, dtype):
    """Tiles that a TPU can have, on lengths of more than one of them."""
    q, k, v, dout = inputs(1, 300, 260, 2, 1, head_dim, dtype=dtype)
    mask = AttentionMask(slopes=jnp.asarray([0.5, 0.1], jnp.float32))
    blocks = Blocks(Tile(128, 256), Tile(256, 128), Tile(128, 128))
    actual = jax.jit(functools.partial(output_and_gradients, blocks=blocks))(q, k, v, mask, dout)
    errors = relative_errors(actual, oracle.attention(q, k, v, mask, dout))
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

    @jax.jit
    def dense_gradients(q, k, v, dout):
        out, pullback = jax.vjp(dense, q, k, v)
        return out, *pullback(dout)

    expected = oracle.attention(q, k, v, mask, dout)
    own = relative_errors(compiled(q, k, v, mask, dout), expected)
    for name, error in relative_errors(dense_gradients(q, k, v, dout), expected).items():
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


def wrong_kernels():
    """Name, what to patch, the mask that shows it, and the results that go wrong."""
    rows, visible, tiles = pallas_tpu._rows, pallas_tpu.tile.visible, pallas_tpu.ranges._tiles
    everything, window = AttentionMask(causal=False), AttentionMask(window=jnp.int32(18))

    def dirty(ref, block, size, length, masked):
        return rows(ref, block, size, length, False)

    def endless(query, key, num_keys, **rules):
        return visible(query, key, 2**30, **rules)

    def wider(query, key, num_keys, *, window, **rules):
        return visible(query, key, num_keys, window=None if window is None else window + 1, **rules)

    def narrower(mask, *sizes):
        return tiles(mask if mask.window is None else dataclasses.replace(mask, window=mask.window - 1), *sizes)

    return {
        "rows beyond the end enter a product": (pallas_tpu, "_rows", dirty, everything, NAMES),
        "the tail of the keys is not masked": (pallas_tpu.tile, "visible", endless, everything, NAMES),
        "weights are not divided by their sums": (jnp, "log2", jnp.zeros_like, everything, NAMES[1:]),
        "inside a tile the window is off by one": (pallas_tpu.tile, "visible", wider, window, NAMES),
        "a tile with one visible pair is skipped": (pallas_tpu.ranges, "_tiles", narrower, window, NAMES),
    }


@pytest.mark.parametrize("mistake", wrong_kernels())
def test_wrong_kernels_are_caught(mistake):
    module, name, wrong, mask, caught = wrong_kernels()[mistake]
    # Of a window of 18 the oldest pair of query 32 is alone in its tile, in every pass.
    length = 18 if mask.window is None else 50
    q, k, v, dout = inputs(1, length, length, 1, 1, 32)
    with mock.patch.object(module, name, wrong):
        actual = jax.jit(functools.partial(output_and_gradients))(q, k, v, mask, dout)
    errors = relative_errors(actual, oracle.attention(q, k, v, mask, dout))
    assert all(not errors[result] < 1e-3 for result in caught), errors


HIDDEN_KEYS = {
    "beyond the length": ({"key_lengths": jnp.asarray([19, 0], jnp.int32)}, {0: slice(19, None), 1: slice(None)}),
    "padding": ({"key_segment_ids": EVERYTHING.key_segment_ids.at[0, :9].set(0)}, {0: slice(9), 1: slice(42, None)}),
    "not yet written": ({"query_offset": jnp.asarray([-5, 2], jnp.int32)}, {0: slice(32, None), 1: slice(39, None)}),
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


def test_vmap():
    """Over examples with windows and offsets of their own."""
    q, k, v, dout = inputs(3, 20, 20, 2, 1, 32)
    windows, offsets = jnp.asarray([3, 0, 5], jnp.int32), jnp.asarray([0, 2, -1], jnp.int32)

    def one(q, k, v, dout, window, offset):
        mask = AttentionMask(window=window, query_offset=offset)
        return [x[0] for x in output_and_gradients(q[None], k[None], v[None], mask, dout[None])]

    actual = jax.jit(jax.vmap(one))(q, k, v, dout, windows, offsets)
    for i in range(3):
        mask = AttentionMask(window=windows[i], query_offset=offsets[i])
        expected = oracle.attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask, dout[i : i + 1])
        errors = relative_errors([x[i : i + 1] for x in actual], expected)
        assert max(errors.values()) < 4e-6, errors


def test_remat_that_saves_the_named_values_does_not_repeat_the_forward_pass():
    q, k, v, _ = inputs(1, 16, 16, 1, 1, 32)

    def forwards(wrap):
        attend = wrap(lambda q: tpu_attention(q, k, v, AttentionMask(), blocks=SMALL, interpret=True))
        return str(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(attend(q))))(q)).count("name=forward_kernel")

    assert forwards(jax.checkpoint) == 2
    assert forwards(functools.partial(jax.checkpoint, policy=SAVED)) == 1


@pytest.mark.parametrize("head_dim", [64, 192])
def test_lowers_for_tpu_without_a_tpu(head_dim):
    q, k, v, dout = inputs(2, 300, 333, 4, 2, head_dim, dtype=jnp.bfloat16)
    segments = {"query_segment_ids": jnp.ones((2, 300), jnp.int32), "key_segment_ids": jnp.ones((2, 333), jnp.int32)}

    @jax.jit
    def run(q, k, v, dout, window):
        mask = AttentionMask(window=window, slopes=jnp.ones(4), key_lengths=jnp.asarray([5, 300]), **segments)
        return jax.vjp(lambda *x: tpu_attention(*x, mask), q, k, v)[1](dout)

    text = run.trace(q, k, v, dout, jnp.int32(5)).lower(lowering_platforms=("tpu",)).as_text()
    for name in ("forward_kernel", "key_gradients_kernel", "query_gradients_kernel"):
        assert text.count(f'kernel_name = "{name}"') == 1


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
    for name, a, b in zip(NAMES, run(splash.splash_attention), ours, strict=True):
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
        tpu_attention(q, k, v, AttentionMask(), blocks=SMALL)


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
