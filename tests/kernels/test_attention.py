"""Both forms of attention against the float64 oracle, and what they owe to their callers."""

import dataclasses
import functools
import types
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.errors import UserError
from llm_jax.kernels import attention as dispatch
from llm_jax.kernels import choice
from llm_jax.kernels.attention import IMPLEMENTATIONS, attention
from llm_jax.kernels.chunked import chunked_attention
from llm_jax.kernels.mask import AttentionMask
from tests.kernels import oracle
from tests.kernels.strategies import problems

FORMS = ("reference", "chunked")
NO_RULES = AttentionMask()
SAVED = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")


def inputs(B, T, S, N, K, H, seed=0, dtype=jnp.float32):
    """Queries, keys, values and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def small_blocks(query_block, key_block):
    """The table of implementations with another tile size, small enough for short sequences."""
    run = dispatch.plain(functools.partial(chunked_attention, query_block=query_block, key_block=key_block))
    return mock.patch.dict(IMPLEMENTATIONS, chunked=IMPLEMENTATIONS["chunked"]._replace(run=run))


def output_and_gradients(q, k, v, mask, dout, form):
    @jax.jit
    def run(q, k, v, dout, mask):
        out, pullback = jax.vjp(lambda *x: attention(*x, mask, implementation=form), q, k, v)
        return out, *pullback(dout)

    return run(q, k, v, dout, mask)


def check(q, k, v, mask, dout, form, tolerance=2e-5):
    """Compare output and gradients with the oracle's."""
    actual = output_and_gradients(q, k, v, mask, dout, form)
    expected = oracle.attention(q, k, v, mask, dout)
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=tolerance, atol=tolerance, err_msg=name)


def check_problem(problem, form):
    shape, mask, blocks = problem
    q, k, v, dout = inputs(*shape)
    with small_blocks(*blocks):
        check(q, k, v, mask, dout, form)


@pytest.mark.parametrize("form", FORMS)
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(problem=problems())
def test_any_mask_agrees_with_the_definition(form, problem):
    check_problem(problem, form)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(problem=problems())
def test_many_more_masks_agree_with_the_definition(form, problem):
    check_problem(problem, form)


EVERYTHING = AttentionMask(
    window=jnp.int32(9),
    query_segment_ids=jnp.asarray([[1] * 5 + [2] * 6, [3] * 9 + [0] * 2], jnp.int32),
    key_segment_ids=jnp.asarray([[1] * 9 + [2] * 8, [3] * 17], jnp.int32),
    query_offset=jnp.asarray([4, 6], jnp.int32),
    key_lengths=jnp.asarray([17, 12], jnp.int32),
    slopes=jnp.asarray([0.5, 0.1, 0.3, 0.9], jnp.float32),
    query_scale=jnp.linspace(0.5, 1.5, 22).reshape(2, 11),
)


@pytest.mark.parametrize("form", FORMS)
def test_all_features_at_once(form):
    q, k, v, dout = inputs(2, 11, 17, 4, 2, 8)
    with small_blocks(4, 5):
        check(q, k, v, EVERYTHING, dout, form)


@pytest.mark.parametrize("form", FORMS)
def test_broken_masks_are_caught(form):
    """The comparison above can fail: a window off by one, a tail left visible, a slope with the wrong sign."""
    q, k, v, dout = inputs(2, 11, 17, 4, 2, 8)
    broken = (
        {"window": EVERYTHING.window + 1},
        {"key_lengths": EVERYTHING.key_lengths + 1},
        {"slopes": -EVERYTHING.slopes},
        {"query_offset": EVERYTHING.query_offset + 1},
    )
    for change in broken:
        actual = output_and_gradients(q, k, v, dataclasses.replace(EVERYTHING, **change), dout, form)
        expected = oracle.attention(q, k, v, EVERYTHING, dout)
        for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
            assert np.max(np.abs(np.asarray(a) - e)) > 1e-3, (change, name)


def test_a_tail_that_is_padded_but_not_masked_is_caught():
    """Without the masking of padded keys, a bidirectional chunked attention is wrong, and the oracle says so."""
    q, k, v, dout = inputs(1, 6, 7, 2, 2, 4)
    unpadded = mock.patch.object(AttentionMask, "padded", lambda self, *sizes: self)
    with small_blocks(4, 4), unpadded, pytest.raises(AssertionError):
        check(q, k, v, AttentionMask(causal=False), dout, "chunked")


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_agrees_within_its_precision(form):
    q, k, v, dout = inputs(2, 40, 40, 4, 2, 16, dtype=jnp.bfloat16)
    with small_blocks(16, 16):
        assert output_and_gradients(q, k, v, AttentionMask(), dout, form)[0].dtype == jnp.bfloat16
        check(q, k, v, AttentionMask(), dout, form, tolerance=4e-2)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_see_nothing_are_zero_and_pass_no_gradient(form):
    q, k, v, dout = inputs(1, 8, 8, 2, 1, 4)
    segments = jnp.asarray([[0, 0, 1, 1, 1, 2, 0, 0]])
    mask = AttentionMask(query_segment_ids=segments, key_segment_ids=segments)
    with small_blocks(2, 3):
        out, dq, dk, dv = output_and_gradients(q, k, v, mask, dout, form)
    for x in (out, dq, dk, dv):
        assert np.all(np.asarray(x)[:, np.asarray(segments[0] == 0)] == 0)
        assert np.any(np.asarray(x)[:, np.asarray(segments[0] != 0)] != 0)


HIDDEN_KEYS = {
    "beyond the length": (AttentionMask(causal=False, key_lengths=jnp.asarray([5, 5])), slice(5, None)),
    "padding": (
        AttentionMask(
            query_segment_ids=jnp.asarray([[1, 1, 1, 0]] * 2),
            key_segment_ids=jnp.asarray([[1, 1, 1, 0, 0, 0, 0, 0]] * 2),
        ),
        slice(3, None),
    ),
    "not yet written": (AttentionMask(query_offset=jnp.int32(2)), slice(6, None)),
    "more keys than queries": (AttentionMask(), slice(4, None)),
    "before every window": (AttentionMask(window=jnp.int32(3), query_offset=jnp.int32(4)), slice(0, 2)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", HIDDEN_KEYS)
def test_nan_where_no_query_looks_does_not_leak(form, case):
    mask, hidden = HIDDEN_KEYS[case]
    q, k, v, dout = inputs(2, 4, 8, 2, 1, 4)
    with small_blocks(2, 3):
        clean = output_and_gradients(q, k, v, mask, dout, form)
        k, v = k.at[:, hidden].set(jnp.nan), v.at[:, hidden].set(jnp.nan)
        poisoned = output_and_gradients(q, k, v, mask, dout, form)
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(a, b)


def count_loops(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("while[")


def test_scan_vmap_and_remat():
    """A stack of layers with traced windows, vmapped over examples, under every kind of remat: the same gradients."""
    q, k, v, _ = inputs(3, 9, 9, 2, 1, 4)
    windows = jnp.asarray([3, 0, 5], jnp.int32)

    def loss(q, form, wrap):
        def layer(x, window):
            return x + attention(x, k, v, AttentionMask(window=window), implementation=form), None

        return jnp.sum(jax.lax.scan(wrap(layer), q, windows)[0] ** 2)

    def loss_by_vmap(q, offsets, form):
        def one(q, k, v, offset):
            mask = AttentionMask(window=jnp.int32(4), query_offset=offset)
            return attention(q[None], k[None], v[None], mask, implementation=form)

        return jnp.sum(jax.vmap(one)(q, k, v, offsets) ** 2)

    offsets = jnp.asarray([0, 2, -1], jnp.int32)
    with small_blocks(4, 4):
        expected = jax.grad(loss)(q, "reference", lambda f: f)
        for wrap in (jax.checkpoint, functools.partial(jax.checkpoint, policy=SAVED)):
            np.testing.assert_allclose(
                jax.jit(jax.grad(loss), static_argnums=(1, 2))(q, "chunked", wrap), expected, rtol=1e-4, atol=1e-5
            )
        np.testing.assert_allclose(
            jax.grad(loss_by_vmap)(q, offsets, "chunked"),
            jax.grad(loss_by_vmap)(q, offsets, "reference"),
            rtol=1e-4,
            atol=1e-5,
        )
        saved = count_loops(jax.grad(lambda q: loss(q, "chunked", functools.partial(jax.checkpoint, policy=SAVED))), q)
        everything = count_loops(jax.grad(lambda q: loss(q, "chunked", jax.checkpoint)), q)
    assert saved == everything - 1, "saving the output and the log-sum-exp spares the second forward pass"


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_window_hides_nothing(form):
    """Its sums with an offset below 0 are not 32-bit integers."""
    q, k, v, dout = inputs(1, 9, 7, 1, 1, 4)
    mask = AttentionMask(window=jnp.int32(2**31 - 1), query_offset=jnp.int32(-4))
    with small_blocks(8, 3):
        check(q, k, v, mask, dout, form)


@pytest.mark.parametrize("form", FORMS)
def test_split_over_batch_and_heads_by_the_compiler(form):
    """On a mesh each device attends to its own sequences and heads: the same numbers, and no array is gathered."""
    mesh = jax.make_mesh((1, 4, 2), ("replica", "data", "tensor"), axis_types=(AxisType.Auto,) * 3)
    arrays = inputs(4, 24, 24, 4, 2, 8)
    split = NamedSharding(mesh, P(("replica", "data"), None, "tensor"))

    def run(q, k, v, dout):
        out, pullback = jax.vjp(lambda *x: attention(*x, AttentionMask(), implementation=form), q, k, v)
        return out, *pullback(dout)

    with small_blocks(8, 8):
        expected = jax.jit(run)(*arrays)
        compiled = jax.jit(run, in_shardings=split, out_shardings=split).lower(*arrays).compile()
    for a, b in zip(compiled(*jax.device_put(arrays, split)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()


def test_slopes_and_query_scale_are_constants():
    q, k, v, _ = inputs(2, 11, 17, 4, 2, 8)

    def loss(slopes, query_scale, form):
        mask = dataclasses.replace(EVERYTHING, slopes=slopes, query_scale=query_scale)
        return jnp.sum(attention(q, k, v, mask, implementation=form))

    for form in FORMS:
        for gradient in jax.grad(loss, argnums=(0, 1))(EVERYTHING.slopes, EVERYTHING.query_scale, form):
            assert not np.any(gradient)


def test_the_materialised_mask_and_bias_agree_with_the_definition():
    visible, bias = EVERYTHING.visible(11, 17), EVERYTHING.bias(11, 17)
    assert visible.shape == (2, 1, 11, 17) and bias.shape == (2, 4, 11, 17) and bias.dtype == jnp.float32
    for b, t, s in np.ndindex(2, 11, 17):
        assert bool(visible[b, 0, t, s]) == oracle.sees(EVERYTHING, b, t, s)
        np.testing.assert_allclose(
            bias[b, :, t, s], EVERYTHING.slopes * (s - t - oracle.offset(EVERYTHING, b)), rtol=1e-6
        )
    assert AttentionMask(causal=False).visible(3, 3) is None and AttentionMask().bias(3, 3) is None


def chosen(q, k, v, mask=NO_RULES):
    """What "auto" says, tracing only."""
    with mock.patch.object(choice, "_announced", set()), mock.patch.object(choice.logger, "info") as info:
        for _ in range(2):
            jax.eval_shape(lambda *x: attention(*x, mask), q, k, v)
    (said,) = [call.args[0] % call.args[1:] for call in info.call_args_list]  # once, however often it is called
    return said


def test_a_choice_is_printed_once_whatever_the_lengths(capsys):
    """Without logging being set up, as in a notebook; a choice of another kind is printed, too."""
    with mock.patch.object(choice, "_announced", set()):
        for length in (8, 16, 2048):
            jax.eval_shape(lambda *x: attention(*x, NO_RULES), *inputs(1, length, length, 1, 1, 4)[:3])
    assert capsys.readouterr().err.splitlines() == [
        "attention: reference (8 queries x 8 keys on cpu: the score matrix is small)",
        "attention: chunked (2048 queries x 2048 keys on cpu: memory linear in the length)",
    ]


def test_the_device_is_the_default_one():
    """As where a machine has a GPU and a computation is put on its CPU."""
    gpu, cpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100"), jax.devices()[0]
    with mock.patch.object(jax, "local_devices", lambda backend: [cpu if backend == "cpu" else gpu]):
        assert choice.device() == ("gpu", "NVIDIA A100")
        for default in (cpu, "cpu"):
            with jax.default_device(default):
                assert choice.device() == ("cpu", cpu.device_kind)


def test_auto_chooses_by_length_and_says_so_once():
    short, long = chosen(*inputs(1, 16, 16, 1, 1, 4)[:3]), chosen(*inputs(1, 2048, 2048, 1, 1, 4)[:3])
    assert "reference" in short and "16 queries" in short
    assert "chunked" in long and "memory linear" in long


DEVICES = {
    "gpu": "NVIDIA A100-SXM4-80GB",
    "hopper gpu": "NVIDIA H100 80GB HBM3",
    "old gpu": "Tesla T4",
    "tpu": "TPU v5p",
    "cpu": "cpu",
}
WANTED = {
    "the GPU's kernel": ("gpu", 64, jnp.bfloat16, "pallas_gpu (the first on gpu that serves"),
    "a Hopper GPU's kernel": ("hopper gpu", 64, jnp.bfloat16, "mosaic_gpu (the first on gpu that serves)"),
    "one that any GPU's kernel serves": ("hopper gpu", 64, jnp.float32, "pallas_gpu (the first on gpu that serves"),
    "the TPU's kernel": ("tpu", 64, jnp.bfloat16, "pallas_tpu (the first on tpu that serves)"),
    "no kernel for this head dim": ("gpu", 80, jnp.bfloat16, "not pallas_gpu: its head dims are 32,"),
    "no kernel for this dtype": ("tpu", 64, jnp.float16, "memory linear in the length; not pallas_tpu: "),
    "no kernel for a GPU this old": ("old gpu", 64, jnp.float16, "from Ampere on (A100, RTX 30), not on Tesla T4"),
    "no kernel for this platform": ("cpu", 64, jnp.bfloat16, "memory linear in the length)"),
}


@pytest.mark.parametrize("case", WANTED)
def test_auto_takes_the_platforms_kernel_or_says_why_not(case):
    name, head_dim, dtype, message = WANTED[case]
    device = AbstractDevice(device_kind=DEVICES[name], num_cores=None, platform=name.split()[-1])
    mesh = AbstractMesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert message in chosen(*(jax.ShapeDtypeStruct((1, 2048, 1, head_dim), dtype) for _ in range(3)))


def test_a_kernel_that_cannot_serve_is_refused_with_its_reason():
    q, k, v, _ = inputs(1, 4, 4, 1, 1, 4)

    def refuses(problem):
        return "no ALiBi on this device" if "slopes" in problem.features else None

    fake = dispatch.Implementation(run=lambda q, k, v, mask: q, refuses=refuses)
    with mock.patch.dict(IMPLEMENTATIONS, fake=fake):
        assert attention(q, k, v, AttentionMask(), implementation="fake") is q
        with pytest.raises(UserError, match="'fake' cannot serve: no ALiBi on this device"):
            attention(q, k, v, AttentionMask(slopes=jnp.ones(1)), implementation="fake")


MISTAKES = {
    "6 query heads are not a multiple of 4": ((1, 4, 4, 6, 4, 8), {}, "auto"),
    "mask.query_segment_ids has shape": (
        (1, 4, 5, 2, 2, 8),
        {"query_segment_ids": jnp.ones((1, 5), int), "key_segment_ids": jnp.ones((1, 5), int)},
        "auto",
    ),
    "must be given together": ((1, 4, 4, 2, 2, 8), {"key_segment_ids": jnp.ones((1, 4), int)}, "auto"),
    "mask.window=-1 must be positive": ((1, 4, 4, 2, 2, 8), {"window": -1}, "auto"),
    "mask.window=-2 must be positive": ((1, 4, 4, 2, 2, 8), {"window": np.int32(-2)}, "auto"),
    "mask.window=-3 must be positive": ((1, 4, 4, 2, 2, 8), {"window": jnp.int32(-3)}, "auto"),
    "mask.window has dtype float32, expected integers": ((1, 4, 4, 2, 2, 8), {"window": 3.0}, "auto"),
    "mask.slopes has shape": ((1, 4, 4, 2, 2, 8), {"slopes": jnp.ones(3)}, "auto"),
    "mask.slopes is a list, expected an array": ((1, 4, 4, 2, 2, 8), {"slopes": [0.5, 0.25]}, "auto"),
    "mask.slopes has dtype int32, expected floating point": ((1, 4, 4, 2, 2, 8), {"slopes": jnp.arange(2)}, "auto"),
    "'pallas_gpu' cannot serve: it runs on gpu, and the devices here are cpu": (
        (1, 4, 4, 2, 2, 64),
        {},
        "pallas_gpu",
    ),
    "did you mean 'chunked'": ((1, 4, 4, 2, 2, 8), {}, "chunkd"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_line(message):
    shape, fields, form = MISTAKES[message]
    with pytest.raises(UserError, match=message) as error:
        attention(*inputs(*shape)[:3], AttentionMask(**fields), implementation=form)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 2, 8), (1, 0, 4, 2, 2, 8), (1, 4, 0, 2, 2, 8), (1, 4, 4, 2, 0, 8)])
def test_nothing_to_attend_to_is_one_line(shape):
    with pytest.raises(UserError, match="must be at least 1 in every dimension"):
        attention(*inputs(*shape)[:3], NO_RULES)


def test_dtypes_that_differ_or_are_not_served_are_one_line():
    q, k, v, _ = inputs(1, 4, 4, 1, 1, 8)
    with pytest.raises(UserError, match="must have one dtype, got float32, bfloat16, float32"):
        attention(q, k.astype(jnp.bfloat16), v, NO_RULES)
    with pytest.raises(UserError, match="dtype int32 is not one of bfloat16, float16, float32"):
        attention(*(x.astype(jnp.int32) for x in (q, k, v)), NO_RULES)
