"""The Hopper kernels, on JAX's model of the hardware, against the float64 oracle; and that they lower for one."""

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
from jax.extend.core import subjaxprs

from llm_jax.errors import UserError
from llm_jax.kernels import mosaic_gpu, tile
from llm_jax.kernels.choice import Problem
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.mosaic_gpu import Blocks, Pass, mosaic_gpu_attention
from llm_jax.kernels.warpgroups import Ring
from tests.kernels import oracle

NAMES = ("out", "dq", "dk", "dv")
SAVED = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
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


def inputs(B, T, S, N, K, H, dtype=jnp.bfloat16):
    """Queries, keys, values and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


attend = functools.partial(mosaic_gpu_attention, blocks=SMALL, interpret=True)


def output_and_gradients(q, k, v, mask, dout):
    out, pullback = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
    return out, *pullback(dout)


def check(q, k, v, mask, dout, tolerance):
    actual = jax.jit(output_and_gradients)(q, k, v, mask, dout)
    assert all(a.dtype == q.dtype for a in actual)
    pairs = zip(NAMES, actual, oracle.attention(q, k, v, mask, dout), strict=True)
    errors = {name: np.linalg.norm(np.asarray(a, np.float64) - e) / np.linalg.norm(e) for name, a, e in pairs}
    assert max(errors.values()) < tolerance, errors
    return actual


# Two sequences whose ends are in the middle of a block on either side, every rule in force.
SHAPE = (2, 70, 140, 2, 1, 64)
EVERYTHING = AttentionMask(
    window=jnp.int32(20),
    query_segment_ids=jnp.asarray([[1] * 30 + [2] * 40, [3] * 64 + [0] * 6], jnp.int32),
    key_segment_ids=jnp.asarray([[1] * 80 + [2] * 60, [3] * 130 + [0] * 10], jnp.int32),
    query_offset=jnp.asarray([70, 60], jnp.int32),
    key_lengths=jnp.asarray([140, 110], jnp.int32),
    slopes=jnp.asarray([0.05, 0.01], jnp.float32),
    query_scale=jnp.linspace(0.5, 1.5, 140).reshape(2, 70),
)


def test_all_rules_at_once_and_what_nobody_sees_may_hold_anything():
    q, k, v, dout = inputs(*SHAPE)
    hidden_T = EVERYTHING.query_segment_ids == 0
    hidden_S = (EVERYTHING.key_segment_ids == 0) | (jnp.arange(140) >= EVERYTHING.key_lengths[:, None])
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
        (1, 135, 70, 1, 1, 64),
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
    """Whether the forward pass of a walk over more blocks than there are buffers has races."""
    q, k, v, _ = inputs(1, 64, 256, 1, 1, 64)
    model = InterpretGPUParams(detect_races=True)
    with mock.patch.object(mosaic_gpu, "interpreter", lambda: model):
        jax.block_until_ready(attend(q, k, v, AttentionMask(causal=False)))
    return interpret_pallas_call.get_races().races_found


def test_no_warpgroup_reads_what_another_overwrites():
    assert not races_found()


def test_a_buffer_given_back_too_early_would_be_seen():
    receive, release = Ring.receive, Ring.release

    def receive_and_release(self, step):
        buffers = receive(self, step)
        release(self, step)
        return buffers

    with mock.patch.object(Ring, "receive", receive_and_release), mock.patch.object(Ring, "release", lambda *_: None):
        assert races_found()


def test_vmap_is_a_larger_batch():
    q, k, v, _ = inputs(2, 60, 60, 1, 1, 64)
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


def test_lowers_for_a_gpu_that_is_not_here_without_a_square_array():
    x = jax.ShapeDtypeStruct((1, 8192, 40, 128), jnp.bfloat16)
    mask = AttentionMask(window=jax.ShapeDtypeStruct((), jnp.int32), slopes=jax.ShapeDtypeStruct((40,), jnp.float32))

    def run(q, k, v, mask, dout):
        out, pullback = jax.vjp(lambda *x: mosaic_gpu_attention(*x, mask), q, k, v)
        return out, *pullback(dout)

    text = jax.jit(run).trace(x, x, x, mask, x).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("attention_forward", "attention_query_gradients", "attention_key_gradients"):
        assert kernel in text
    assert "8192x8192" not in text


SERVED = Problem("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", 1, 64, 64, 2, 1, 128, ())


def test_refusals():
    assert mosaic_gpu.refuses(SERVED) is None
    assert "Hopper" in mosaic_gpu.refuses(SERVED._replace(device_kind="NVIDIA A100-SXM4-80GB"))
    assert "float32" in mosaic_gpu.refuses(SERVED._replace(dtype="float32"))
    assert "96" in mosaic_gpu.refuses(SERVED._replace(head_dim=96))


def test_errors_are_clear():
    q, k, v, _ = inputs(1, 64, 64, 1, 1, 32)
    with pytest.raises(UserError, match="head dims are 64, 128, not 32"):
        attend(q, k, v, AttentionMask())
    q, k, v, _ = inputs(1, 64, 64, 1, 1, 64)
    with pytest.raises(UserError, match="cast them to one"):
        attend(q, k.astype(jnp.float16), v, AttentionMask())
    with pytest.raises(UserError, match="multiple of 128"):
        mosaic_gpu_attention(q, k, v, AttentionMask(), blocks=SMALL._replace(forward=Pass(64, 64, 2)))
