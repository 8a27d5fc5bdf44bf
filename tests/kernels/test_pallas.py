"""The fused kernels of GPUs and TPUs, interpreted, against the float64 oracle; and that they lower for absent devices.

What only one of them has is tested in `test_pallas_gpu` and `test_pallas_tpu`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.pallas_gpu import gpu_attention
from llm_jax.kernels.pallas_tpu import tpu_attention
from tests.kernels import forms, oracle
from tests.kernels.forms import SAVED, dense, inputs
from tests.kernels.fused import ATTEND, EVERYTHING, SHAPE, check, compiled, output_and_gradients, relative_errors

every_form = pytest.mark.parametrize("form", ATTEND)


@every_form
def test_all_rules_at_once(form):
    q, k, v, dout = inputs(*SHAPE)
    check(form, q, k, v, EVERYTHING, dout)


@pytest.mark.parametrize("window", [0, 2, 17])
@every_form
def test_the_window_is_an_argument_of_the_compiled_program(form, window):
    q, k, v, dout = inputs(*SHAPE)
    check(form, q, k, v, dataclasses.replace(EVERYTHING, window=jnp.int32(window)), dout)


CASES = {
    "bidirectional, head dim 96": ((1, 33, 18, 1, 1, 96), AttentionMask(causal=False), jnp.float32, 4e-6, ATTEND),
    "causal, head dim 192, bfloat16": ((1, 20, 36, 2, 1, 192), AttentionMask(), jnp.bfloat16, 1.2e-2, ATTEND),
    "more queries than keys, float16": ((1, 40, 5, 2, 2, 32), AttentionMask(), jnp.float16, 2e-3, ("pallas_gpu",)),
}


@pytest.mark.parametrize(("case", "form"), [(case, form) for case in CASES for form in CASES[case][-1]])
def test_head_dims_and_dtypes(case, form):
    shape, mask, dtype, tolerance, _ = CASES[case]
    q, k, v, dout = inputs(*shape, dtype=dtype)
    check(form, q, k, v, mask, dout, tolerance)


@pytest.mark.parametrize("factor", [1, 10])
@every_form
def test_rounding_is_that_of_a_dense_computation(form, factor):
    """Over a few problems the error against float64 is at most twice that of the whole score matrix in float32.

    Large scores have a large log-sum-exp: what is lost in rounding it is lost to all weights of a row. All passes have
    the same tiles, as a CPU may add up a tile of another shape in another order: the backward pass's scores would then
    not be the forward pass's, which weighs more.
    """
    squares = {form: np.zeros(4), "dense": np.zeros(4)}
    for seed in range(4):
        q, k, v, dout = inputs(1, 48, 48, 2, 1, 32, seed=seed)
        arguments = q * factor, k, v, AttentionMask(), dout
        expected = oracle.attention(*arguments)
        for name, actual in ((form, forms.output_and_gradients(*arguments, form)), ("dense", dense(*arguments))):
            squares[name] += np.square(list(relative_errors(actual, expected).values()))
    assert np.all(np.sqrt(squares[form] / squares["dense"]) < 2), squares


WRONG_MASKS = {
    "a window off by one": {"window": EVERYTHING.window + 1},
    "a length off by one": {"key_lengths": EVERYTHING.key_lengths + 1},
    "slopes of the wrong sign": {"slopes": -EVERYTHING.slopes},
    "slopes of other heads": {"slopes": EVERYTHING.slopes[::-1]},
    "an offset off by one": {"query_offset": EVERYTHING.query_offset - 1},
    "a segment's end off by one": {"key_segment_ids": jnp.roll(EVERYTHING.key_segment_ids, 1, axis=1)},
}


@pytest.mark.parametrize("mistake", WRONG_MASKS)
@every_form
def test_wrong_masks_are_caught(form, mistake):
    """The comparison with the oracle can fail."""
    q, k, v, dout = inputs(*SHAPE)
    actual = compiled(form)(q, k, v, dataclasses.replace(EVERYTHING, **WRONG_MASKS[mistake]), dout)
    errors = relative_errors(actual, oracle.attention(q, k, v, EVERYTHING, dout))
    assert min(errors.values()) > 1e-3, errors


HIDDEN_KEYS = {
    "beyond the length": ({"key_lengths": jnp.asarray([19, 0], jnp.int32)}, {0: slice(19, None), 1: slice(None)}),
    "padding": ({"key_segment_ids": EVERYTHING.key_segment_ids.at[0, :9].set(0)}, {0: slice(9), 1: slice(42, None)}),
    "not yet written": ({"query_offset": jnp.asarray([-5, 2], jnp.int32)}, {0: slice(32, None), 1: slice(39, None)}),
    "behind the window": ({"query_offset": jnp.asarray([40, 44], jnp.int32)}, {0: slice(11), 1: slice(15)}),
}


@pytest.mark.parametrize("case", HIDDEN_KEYS)
@every_form
def test_nan_where_no_query_looks_does_not_leak(form, case):
    changes, hidden = HIDDEN_KEYS[case]
    q, k, v, dout = inputs(*SHAPE)
    mask = dataclasses.replace(EVERYTHING, **changes)
    clean = check(form, q, k, v, mask, dout)
    for b, keys in hidden.items():
        k, v = k.at[b, keys].set(jnp.nan), v.at[b, keys].set(jnp.nan)
    for a, b in zip(clean, compiled(form)(q, k, v, mask, dout), strict=True):
        np.testing.assert_array_equal(a, b)


@every_form
def test_queries_that_see_nothing_are_zero_and_pass_no_gradient(form):
    """Padding, and a sequence without keys: whatever such rows hold, NaN included."""
    q, k, v, dout = inputs(*SHAPE)
    mask = dataclasses.replace(EVERYTHING, key_lengths=jnp.asarray([0, 45], jnp.int32))
    clean = check(form, q, k, v, mask, dout)
    empty = np.array([[True] * 37, [False] * 33 + [True] * 4])
    assert not np.any(np.asarray(clean[0])[empty]) and not np.any(np.asarray(clean[1])[empty])
    assert not np.any(np.asarray(clean[2])[0]) and not np.any(np.asarray(clean[3])[0])
    q, dout = q.at[empty].set(jnp.nan), dout.at[empty].set(jnp.nan)
    for a, b in zip(clean, compiled(form)(q, k, v, mask, dout), strict=True):
        np.testing.assert_array_equal(a, b)


@every_form
def test_vmap(form):
    """Over examples with windows and offsets of their own."""
    q, k, v, dout = inputs(3, 20, 20, 2, 1, 32)
    windows, offsets = jnp.asarray([3, 0, 5], jnp.int32), jnp.asarray([0, 2, -1], jnp.int32)

    def one(q, k, v, dout, window, offset):
        mask = AttentionMask(window=window, query_offset=offset)
        return [x[0] for x in output_and_gradients(ATTEND[form], q[None], k[None], v[None], mask, dout[None])]

    actual = jax.jit(jax.vmap(one))(q, k, v, dout, windows, offsets)
    for i in range(3):
        mask = AttentionMask(window=windows[i], query_offset=offsets[i])
        expected = oracle.attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask, dout[i : i + 1])
        errors = relative_errors([x[i : i + 1] for x in actual], expected)
        assert max(errors.values()) < 4e-6, errors


FORWARD = {"pallas_gpu": "attention_forward", "pallas_tpu": "forward_kernel"}


@every_form
def test_remat_that_saves_the_named_values_does_not_repeat_the_forward_pass(form):
    q, k, v, _ = inputs(1, 16, 16, 1, 1, 32)

    def forwards(wrap):
        attend = wrap(lambda q: ATTEND[form](q, k, v, AttentionMask()))
        return str(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(attend(q))))(q)).count(f"name={FORWARD[form]}")

    assert forwards(jax.checkpoint) == 2
    assert forwards(functools.partial(jax.checkpoint, policy=SAVED)) == 1


GPU_KERNELS = [f'name = "attention_{what}"' for what in ("forward", "query_gradients", "key_gradients")]
TPU_KERNELS = [f'kernel_name = "{what}_kernel"' for what in ("forward", "query_gradients", "key_gradients")]
LOWERED = [("cuda", gpu_attention, GPU_KERNELS, head_dim) for head_dim in (64, 96, 128, 192)]
LOWERED += [("tpu", tpu_attention, TPU_KERNELS, head_dim) for head_dim in (64, 192)]


@pytest.mark.parametrize(("platform", "attend", "kernels", "head_dim"), LOWERED)
def test_lowers_for_a_device_that_is_not_here(platform, attend, kernels, head_dim):
    q, k, v, dout = inputs(2, 300, 333, 4, 2, head_dim, dtype=jnp.bfloat16)
    segments = {"query_segment_ids": jnp.ones((2, 300), jnp.int32), "key_segment_ids": jnp.ones((2, 333), jnp.int32)}

    @jax.jit
    def run(q, k, v, dout, window):
        mask = AttentionMask(window=window, slopes=jnp.ones(4), key_lengths=jnp.asarray([5, 300]), **segments)
        return jax.vjp(lambda *x: attend(*x, mask), q, k, v)[1](dout)

    text = run.trace(q, k, v, dout, jnp.int32(5)).lower(lowering_platforms=(platform,)).as_text()
    assert all(text.count(kernel) == 1 for kernel in kernels)
