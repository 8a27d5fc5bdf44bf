"""All forms of attention against each other, the float64 oracle, and a dense float32 computation's own rounding.

The kernels for GPUs and TPUs are interpreted. `pytest tests/kernels/test_agreement.py -m slow -k table -s` prints the
table of `docs/kernels.md`.
"""

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.mask import AttentionMask
from tests.kernels import oracle
from tests.kernels.forms import FORMS, KERNELS, QUANTITIES, dense, inputs, output_and_gradients, relative_error
from tests.kernels.strategies import full_masks, problems

TOLERANCE = {"float32": 4e-6, "bfloat16": 1.2e-2, "float16": 1.5e-3}


def forms_in(dtype):
    return [form for form in FORMS if (form, dtype) != ("pallas_tpu", "float16")]


# Two sequences of several tiles on either side, neither a whole number of them; every rule is in force; the first rows
# of the second sequence and the last of it see nothing.
SHAPE = (2, 37, 45, 4, 2, 32)
EVERYTHING = AttentionMask(
    window=jnp.int32(19),
    query_segment_ids=jnp.asarray([[1] * 20 + [2] * 17, [0] * 3 + [3] * 30 + [0] * 4], jnp.int32),
    key_segment_ids=jnp.asarray([[1] * 22 + [2] * 23, [3] * 42 + [0] * 3], jnp.int32),
    query_offset=jnp.asarray([4, 6], jnp.int32),
    key_lengths=jnp.asarray([43, 38], jnp.int32),
    slopes=jnp.asarray([0.5, 0.25, 0.125, 0.0625], jnp.float32),
    query_scale=jnp.linspace(0.5, 1.5, 74).reshape(2, 37),
)


def errors(actual, expected, dout, least=0.1):
    """Relative L2 error of each quantity.

    The scores of a row that sees one key have no gradient but rounding: errors of dq and dk are not relative to less
    than `least` times the norm of dout, which is about the norm that they have for standard normal inputs.
    """
    small = least * np.linalg.norm(np.asarray(dout, np.float64))
    return dict(zip(QUANTITIES, map(relative_error, actual, expected, (0.0, small, small, 0.0)), strict=True))


def check(shape, mask, dtype, forms, tile):
    """Every form's errors are small, alone and against one another.

    Returns what each form gave, and for `assert_rounds_like_dense` its errors with those of the dense computation.
    """
    q, k, v, dout = inputs(*shape, dtype=jnp.dtype(dtype))
    expected = oracle.attention(q, k, v, mask, dout)
    results = {form: output_and_gradients(q, k, v, mask, dout, form, tile) for form in forms}
    for form, result in results.items():
        found = errors(result, expected, dout)
        assert all(x.dtype == jnp.dtype(dtype) for x in result)
        assert max(found.values()) < TOLERANCE[dtype], (form, found)
    for one, other in itertools.combinations(results, 2):
        assert max(errors(results[one], results[other], dout).values()) < TOLERANCE[dtype], (one, other)
    compared = results | {"dense": dense(q, k, v, mask, dout)}
    return results, {name: errors(result, expected, dout, least=1.0) for name, result in compared.items()}


def assert_rounds_like_dense(found):
    """The root mean square of each form's float32 errors, over some problems, is at most twice the dense one's.

    Not in every problem: where one query sees one key, either may be exact by chance.
    """

    def typical(form, name):
        return np.sqrt(np.mean([problem[form][name] ** 2 for problem in found]))

    for form, name in itertools.product(found[0], QUANTITIES):
        assert typical(form, name) <= 2 * typical("dense", name), (form, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rule_at_once(dtype):
    """And rows that see nothing are exactly 0, and NaN in keys that nobody sees reaches no number.

    Nor does, in the kernels, NaN in queries that see nothing or in the gradients of their outputs.
    """
    q, k, v, dout = inputs(*SHAPE, dtype=jnp.dtype(dtype))
    seen_BTS = np.array([[[oracle.sees(EVERYTHING, b, t, s) for s in range(45)] for t in range(37)] for b in range(2)])
    blind_BT, hidden_BS = ~seen_BTS.any(axis=2), ~seen_BTS.any(axis=1)
    # What a rule alone hides from all queries may hold anything; a segment without a query hides no key for good.
    unread_BS = hidden_BS & ~np.asarray(EVERYTHING.visible_keys(37, 45))
    assert blind_BT.any() and unread_BS.any()
    keys, queries = (jnp.where(x[:, :, None, None], jnp.nan, 1).astype(dtype) for x in (unread_BS, blind_BT))
    forms = FORMS if dtype == "float32" else KERNELS  # `test_attention` has the plain forms in bfloat16
    results, found = check(SHAPE, EVERYTHING, dtype, forms, (16, 16))
    if dtype == "float32":
        assert_rounds_like_dense([found])
    for form, result in results.items():
        out, dq, dk, dv = map(np.asarray, result)
        assert not out[blind_BT].any() and not dq[blind_BT].any(), form
        assert not dk[hidden_BS].any() and not dv[hidden_BS].any(), form
        rows = (q * queries, dout * queries) if form in KERNELS else (q, dout)
        poisoned = output_and_gradients(rows[0], k * keys, v * keys, EVERYTHING, rows[1], form, (16, 16))
        for clean, other in zip(result, poisoned, strict=True):
            np.testing.assert_array_equal(np.asarray(clean), np.asarray(other), err_msg=form)


def broken(**changes):
    return dataclasses.replace(EVERYTHING, **changes)


BROKEN = {
    "window off by one": broken(window=EVERYTHING.window + 1),
    "tail visible": broken(key_lengths=EVERYTHING.key_lengths + 1),
    "queries off by one": broken(query_offset=EVERYTHING.query_offset + 1),
    "slopes of other heads": broken(slopes=jnp.roll(EVERYTHING.slopes, 2)),
    "segments run together": broken(query_segment_ids=jnp.ones_like(EVERYTHING.query_segment_ids) * 2),
    "query scale left out": broken(query_scale=jnp.ones_like(EVERYTHING.query_scale)),
}


@pytest.mark.parametrize("form", KERNELS)
def test_the_comparison_sees_broken_masks(form):
    """One program for all of them, compiled already by the test above."""
    q, k, v, dout = inputs(*SHAPE)
    expected = oracle.attention(q, k, v, EVERYTHING, dout)
    for name, mask in BROKEN.items():
        found = errors(output_and_gradients(q, k, v, mask, dout, form, (16, 16)), expected, dout)
        assert min(found.values()) > 1e-3, (name, found)


@hypothesis.settings(max_examples=20, deadline=None, database=None)
@hypothesis.given(mask=full_masks(*SHAPE[:4]))
def test_any_values_of_the_rules(mask):
    """Of one shape: the programs are those that `test_every_rule_at_once` has compiled."""
    check(SHAPE, mask, "float32", FORMS, (16, 16))


SIZES = st.sampled_from([16, 32])


@hypothesis.settings(max_examples=2, deadline=None, database=None)
@hypothesis.given(problem=problems(longest=40, head_dims=st.just(32), sizes=SIZES))
def test_any_problem(problem):
    """The plain forms are drawn problems of their own, see `test_attention`."""
    check(problem[0], problem[1], "float32", KERNELS, problem[2])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_many_more_problems(dtype):
    found, head_dims = [], st.sampled_from([32, 64, 96, 128])

    @hypothesis.settings(max_examples=30, deadline=None)
    @hypothesis.given(problem=problems(longest=40, head_dims=head_dims, sizes=SIZES))
    def draw(problem):
        found.append(check(problem[0], problem[1], dtype, forms_in(dtype), problem[2])[1])

    draw()
    if dtype == "float32":
        assert_rounds_like_dense(found)


HEAD_DIMS = (32, 64, 96, 128, 192, 256)
TABLE_MASKS = {
    "causal": AttentionMask(),
    "bidirectional": AttentionMask(causal=False),
    "every rule": EVERYTHING,
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_table(dtype, capsys):
    """The worst relative error over all head dims, masks and two draws of the inputs, printed."""
    forms = forms_in(dtype)
    worst = {form: dict.fromkeys(QUANTITIES, 0.0) for form in (*forms, "dense float32")}
    for head_dim, mask, seed in itertools.product(HEAD_DIMS, TABLE_MASKS.values(), range(2)):
        q, k, v, dout = inputs(*SHAPE[:-1], head_dim, dtype=jnp.dtype(dtype), seed=seed)
        expected = oracle.attention(q, k, v, mask, dout)
        results = {form: output_and_gradients(q, k, v, mask, dout, form, (16, 32)) for form in forms}
        results["dense float32"] = dense(q, k, v, mask, dout)
        for form, result in results.items():
            for name, error in errors(result, expected, dout).items():
                worst[form][name] = max(worst[form][name], error)
    with capsys.disabled():
        print(f"\n| {dtype} | " + " | ".join(QUANTITIES) + " |\n|---|" + "---|" * len(QUANTITIES))
        for form, found in worst.items():
            print(f"| {form} | " + " | ".join(f"{found[name]:.1e}" for name in QUANTITIES) + " |")
    assert max(max(worst[form].values()) for form in forms) < TOLERANCE[dtype]
    if dtype == "float32":
        assert all(worst[form][name] <= 2 * worst["dense float32"][name] for form in forms for name in QUANTITIES)
