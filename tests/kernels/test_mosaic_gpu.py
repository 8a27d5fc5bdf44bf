"""The Hopper kernels, on JAX's model of the hardware, against the float64 oracle; and that they lower for one."""

import dataclasses
import functools
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import subjaxprs

from llm_jax.errors import UserError
from llm_jax.kernels import mosaic_gpu, tile
from llm_jax.kernels.choice import Problem
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.mosaic_gpu import Blocks, Pass, mosaic_gpu_attention
from llm_jax.kernels.warpgroups import Ring
from tests.kernels import forms, oracle
from tests.kernels.forms import QUANTITIES, SAVED, relative_error

SMALL = Blocks(Pass(128, 64, 2), Pass(64, 128, 2), Pass(128, 64, 2))


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """JAX's model compiles a kernel's body anew for each warpgroup of each program: here once, and without care."""
    programs, lock = {}, threading.Lock()

    def run(jaxpr, consts, *arguments):
        with lock:
            if id(jaxpr) not in programs:
                body = jax.jit(lambda consts, *arguments: jax.core.eval_jaxpr(jaxpr, consts, *arguments))
                quickly = {"xla_backend_optimization_level": 0}
                programs[id(jaxpr)] = jaxpr, body.lower(consts, *arguments).compile(quickly)
        programs[id(jaxpr)][1](consts, *arguments)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)
    yield
    interpret_pallas_call.reset_gpu_interpret_mode_state()


inputs = functools.partial(forms.inputs, dtype=jnp.bfloat16)
attend = functools.partial(mosaic_gpu_attention, blocks=SMALL, interpret=True)


def output_and_gradients(q, k, v, mask, dout):
    out, pullback = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
    return out, *pullback(dout)


compiled = jax.jit(output_and_gradients)


def check(q, k, v, mask, dout, tolerance):
    actual = compiled(q, k, v, mask, dout)
    assert all(a.dtype == q.dtype for a in actual)
    expected = oracle.attention(q, k, v, mask, dout)
    errors = dict(zip(QUANTITIES, map(relative_error, actual, expected), strict=True))
    assert max(errors.values()) < tolerance, errors
    return actual


# Two sequences whose ends are in the middle of a block on either side, every rule in force.
SHAPE = (2, 72, 144, 2, 1, 64)
EVERYTHING = AttentionMask(
    window=jnp.int32(20),
    query_segment_ids=jnp.asarray([[1] * 30 + [2] * 42, [3] * 66 + [0] * 6], jnp.int32),
    key_segment_ids=jnp.asarray([[1] * 80 + [2] * 64, [3] * 134 + [0] * 10], jnp.int32),
    query_offset=jnp.asarray([70, 60], jnp.int32),
    key_lengths=jnp.asarray([141, 110], jnp.int32),
    slopes=jnp.asarray([0.05, 0.01], jnp.float32),
    query_scale=jnp.linspace(0.5, 1.5, 144).reshape(2, 72),
)


def test_all_rules_at_once_and_what_nobody_sees_may_hold_anything():
    q, k, v, dout = inputs(*SHAPE)
    hidden_T = EVERYTHING.query_segment_ids == 0
    hidden_S = (EVERYTHING.key_segment_ids == 0) | (jnp.arange(144) >= EVERYTHING.key_lengths[:, None])
    poison = [jnp.where(hidden[:, :, None, None], jnp.nan, x) for hidden, x in ((hidden_T, q), (hidden_S, k))]
    actual = check(
        poison[0],
        poison[1],
        jnp.where(hidden_S[:, :, None, None], jnp.nan, v),
        EVERYTHING,
        jnp.where(hidden_T[:, :, None, None], jnp.nan, dout),
        1.2e-2,
    )
    out, dq, dk, dv = (np.asarray(x, np.float32) for x in actual)
    assert not out[np.asarray(hidden_T)].any() and not dq[np.asarray(hidden_T)].any()
    assert not dk[np.asarray(hidden_S)].any() and not dv[np.asarray(hidden_S)].any()


CASES = {
    "causal, several blocks of head dim 128": ((1, 200, 200, 1, 1, 128), AttentionMask(), jnp.float16, 2e-3),
    "bidirectional, more queries than keys": (
        (1, 136, 72, 1, 1, 64),
        AttentionMask(causal=False),
        jnp.bfloat16,
        1.2e-2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_dtypes(case):
    shape, mask, dtype, tolerance = CASES[case]
    q, k, v, dout = inputs(*shape, dtype=dtype)
    check(q, k, v, mask, dout, tolerance)


def shifted(*arguments, window, **rules):
    return tile.visible(*arguments, window=window + 1, **rules)


def test_an_off_by_one_window_would_be_seen():
    q, k, v, dout = inputs(*SHAPE)
    with mock.patch.object(mosaic_gpu, "visible", shifted):
        out = jax.jit(lambda *x: attend(*x))(q, k, v, EVERYTHING)
    expected = oracle.attention(q, k, v, EVERYTHING, dout)[0]
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) > 1.2e-2 * np.linalg.norm(expected)


def races_found():
    """For each kernel, of a walk over more blocks than there are buffers and two query heads, whether it has races."""
    q, k, v, dout = inputs(1, 128, 256, 2, 1, 64)
    model, call, found = InterpretGPUParams(detect_races=True), mosaic_gpu._call, {}

    def watched(kernel, *arguments):
        results = jax.block_until_ready(call(kernel, *arguments))
        found[kernel.__name__] = interpret_pallas_call.get_races().races_found
        return results

    def arrive(barrier, own=plgpu.barrier_arrive):
        plgpu.commit_smem()  # plain reads stand for wgmma here, which the model takes for another kind of access
        own(barrier)

    watch = mock.patch.multiple(mosaic_gpu, interpreter=lambda: model, _call=watched)
    with watch, mock.patch.object(plgpu, "barrier_arrive", arrive):
        jax.vjp(lambda *x: attend(*x, AttentionMask(causal=False)), q, k, v)[1](dout)
    return found


KERNELS = ("attention_forward", "attention_query_gradients", "attention_key_gradients")


def test_no_warpgroup_reads_what_another_overwrites():
    assert races_found() == dict.fromkeys(KERNELS, False)


def test_a_buffer_given_back_too_early_would_be_seen():
    receive, release = Ring.receive, Ring.release

    def receive_and_release(self, step):
        buffers = receive(self, step)
        release(self, step)
        return buffers

    with mock.patch.object(Ring, "receive", receive_and_release), mock.patch.object(Ring, "release", lambda *_: None):
        assert races_found() == dict.fromkeys(KERNELS, True)


def changed(**rules):
    return dataclasses.replace(EVERYTHING, **rules)


# Of one structure, so that one program of each form serves them all.
SAME_INPUTS = {
    "every rule": EVERYTHING,
    "an unlimited window, one segment, queries before the first key, a sequence without keys": changed(
        window=jnp.int32(-3),
        query_segment_ids=jnp.ones((2, 72), jnp.int32),
        key_segment_ids=jnp.ones((2, 144), jnp.int32),
        query_offset=jnp.asarray([-9, 0], jnp.int32),
        key_lengths=jnp.asarray([144, 0], jnp.int32),
    ),
}


def test_agrees_with_the_other_forms_on_the_same_inputs():
    q, k, v, dout = inputs(*SHAPE)
    for name, mask in SAME_INPUTS.items():
        own = compiled(q, k, v, mask, dout)
        for form in ("chunked", "pallas_gpu"):
            other = forms.output_and_gradients(q, k, v, mask, dout, form, (64, 64))
            assert max(map(relative_error, own, other)) < 1.2e-2, (name, form)


def test_vmap_is_a_larger_batch():
    q, k, v, _ = inputs(2, 56, 56, 1, 1, 64)
    mask = AttentionMask(slopes=jnp.asarray([0.5], jnp.float32))
    together = attend(q, k, v, mask)
    apart = jax.vmap(lambda *x: attend(*(y[None] for y in x), mask)[0])(q, k, v)
    np.testing.assert_array_equal(together, apart)


def forwards(jaxpr):
    """How often a program runs the forward kernel."""
    own = sum(eqn.params.get("name") == "attention_forward" for eqn in jaxpr.eqns)
    return own + sum(forwards(inner) for inner in subjaxprs(jaxpr))


def test_a_remat_policy_saves_the_forward_pass():
    q, k, v, _ = inputs(1, 128, 128, 1, 1, 64)

    def gradient(policy):
        attention = jax.checkpoint(lambda q: mosaic_gpu_attention(q, k, v, AttentionMask()), policy=policy)
        return jax.make_jaxpr(jax.grad(lambda q: jnp.sum(attention(q).astype(jnp.float32))))(q).jaxpr

    assert forwards(gradient(None)) == 2
    assert forwards(gradient(SAVED)) == 1


WINDOW_AND_SLOPES = AttentionMask(
    window=jax.ShapeDtypeStruct((), jnp.int32), slopes=jax.ShapeDtypeStruct((40,), jnp.float32)
)


def lowered(num_queries, num_keys, mask=WINDOW_AND_SLOPES):
    """The program for a Hopper GPU, which need not be here."""
    queries, keys = (jax.ShapeDtypeStruct((1, length, 40, 128), jnp.bfloat16) for length in (num_queries, num_keys))

    def run(q, k, v, mask, dout):
        out, pullback = jax.vjp(lambda *x: mosaic_gpu_attention(*x, mask), q, k, v)
        return out, *pullback(dout)

    return jax.jit(run).trace(queries, keys, keys, mask, queries).lower(lowering_platforms=("cuda",)).as_text()


# Blocks divide the one, and cut the other on either side.
@pytest.mark.parametrize("lengths", [(8192, 8192), (104, 2040)])
def test_lowers_for_a_gpu_that_is_not_here_without_a_square_array(lengths):
    text = lowered(*lengths)
    assert all(kernel in text for kernel in KERNELS)
    assert f"{lengths[0]}x{lengths[1]}" not in text


IDS = jax.ShapeDtypeStruct((1, 104), jnp.int32)


@pytest.mark.parametrize(
    "mask", [AttentionMask(causal=False), AttentionMask(causal=False, query_segment_ids=IDS, key_segment_ids=IDS)]
)
def test_lowers_where_no_rule_looks_at_the_place_of_a_query(mask):
    assert all(kernel in lowered(104, 104, mask) for kernel in KERNELS)


@pytest.mark.parametrize("lengths", [(100, 104), (104, 2044), (1, 300)])
def test_lengths_that_do_not_lower_are_refused(lengths):
    refusal = f"multiples of 8, not {lengths[0]} queries and {lengths[1]} keys"
    with pytest.raises(UserError, match=refusal):
        lowered(*lengths)
    with mock.patch.object(mosaic_gpu, "_uneven", lambda *_: None), pytest.raises(ValueError, match="multiple of"):
        lowered(*lengths)
    assert refusal in mosaic_gpu.refuses(SERVED._replace(num_queries=lengths[0], num_keys=lengths[1]))


SERVED = Problem("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", 1, 64, 64, 2, 1, 128, ())


def test_refusals():
    assert mosaic_gpu.refuses(SERVED) is None
    assert "Hopper" in mosaic_gpu.refuses(SERVED._replace(device_kind="NVIDIA A100-SXM4-80GB"))
    assert "float32" in mosaic_gpu.refuses(SERVED._replace(dtype="float32"))
    assert "96" in mosaic_gpu.refuses(SERVED._replace(head_dim=96))
    for version, refused in ((0, False), (12060, False), (12080, True), (12090, True), (13000, False)):
        with mock.patch.object(mosaic_gpu, "cuda_version", return_value=version):
            assert ("wrong programs" in (mosaic_gpu.refuses(SERVED) or "")) == refused


def test_errors_are_clear():
    q, k, v, _ = inputs(1, 64, 64, 1, 1, 32)
    with pytest.raises(UserError, match="head dims are 64, 128, not 32"):
        attend(q, k, v, AttentionMask())
    q, k, v, _ = inputs(1, 64, 64, 1, 1, 64)
    with pytest.raises(UserError, match="cast them to one"):
        attend(q, k.astype(jnp.float16), v, AttentionMask())
    with pytest.raises(UserError, match="multiple of 128"):
        mosaic_gpu_attention(q, k, v, AttentionMask(), blocks=SMALL._replace(forward=Pass(64, 64, 2)))
