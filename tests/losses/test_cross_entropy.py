"""The chunked loss against materialised logits, alone and split over meshes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.config import LossConfig
from llm_jax.errors import UserError
from llm_jax.losses.cross_entropy import chunked_cross_entropy
from llm_jax.parallel.mesh import AXES

B, T, D, V = 8, 13, 8, 24
EVERYTHING = LossConfig(chunk_size=4, z_loss=0.02, max_z_loss=0.03)
MESHES = ((1, 8, 1), (1, 2, 4), (2, 2, 2))


def inputs(dtype=jnp.float32, vocab_size=V):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D), dtype)
    unembedding = jax.random.normal(keys[1], (vocab_size, D), dtype)
    targets = jax.random.randint(keys[2], (B, T), 0, vocab_size)
    return hidden, unembedding, targets, jax.random.uniform(keys[3], (B, T))


def oracle(hidden, unembedding, targets, weights, config):
    """The total and its gradients for hidden and unembedding by formula in float64, logits and all."""
    h, u, w = (np.asarray(x, np.float64) for x in (hidden, unembedding, weights))
    logits = h @ u.T
    highest = logits.max(-1)
    lse = highest + np.log(np.exp(logits - highest[..., None]).sum(-1))
    onehot = np.eye(u.shape[0])[np.asarray(targets)]
    total = np.sum(w * (lse - (logits * onehot).sum(-1) + config.z_loss * lse**2 + config.max_z_loss * highest**2))
    softmax = np.exp(logits - lse[..., None])
    is_highest = logits == highest[..., None]
    dlogits = softmax - onehot + 2 * config.z_loss * lse[..., None] * softmax
    dlogits += 2 * config.max_z_loss * highest[..., None] * is_highest / is_highest.sum(-1, keepdims=True)
    dlogits *= w[..., None]
    return total, dlogits @ u, np.einsum("btv,btd->vd", dlogits, h)


def loss_and_gradients(hidden, unembedding, targets, weights, config):
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(hidden, unembedding, targets, weights):
        output = chunked_cross_entropy(hidden, unembedding, targets, weights, config)
        return output.total, output

    (total, output), gradients = jax.jit(run)(hidden, unembedding, targets, weights)
    return output, (total, *gradients)


def check(actual, expected, tolerance=2e-5):
    for name, a, e in zip(("total", "dhidden", "dunembedding"), actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=tolerance, atol=tolerance, err_msg=name)


CONFIGS = {
    "plain": LossConfig(chunk_size=5),
    "one chunk longer than the sequence": LossConfig(chunk_size=100),
    "chunks that divide": LossConfig(chunk_size=13),
    "z-loss": LossConfig(chunk_size=4, z_loss=0.02),
    "max-z loss": LossConfig(chunk_size=4, max_z_loss=0.03),
    "both": EVERYTHING,
}


@pytest.mark.parametrize("case", CONFIGS)
def test_total_and_gradients_agree_with_the_formula(case):
    config = CONFIGS[case]
    output, actual = loss_and_gradients(*inputs(), config)
    check(actual, oracle(*inputs(), config))
    assert {"cross_entropy", "accuracy"} <= set(output.metrics)
    assert ("z_loss" in output.metrics, "max_z_loss" in output.metrics) == (config.z_loss > 0, config.max_z_loss > 0)


def only_weighted(config=EVERYTHING):
    return dataclasses.replace(config, only_weighted=True)


def sparse(weighted_rows=B, share=0.4):
    """Inputs of which some tokens have a weight, in the first rows alone."""
    hidden, unembedding, targets, weights = inputs()
    kept = jax.random.uniform(jax.random.key(5), (B, T)) < share
    return hidden, unembedding, targets, weights * kept.at[weighted_rows:].set(False)


@pytest.mark.parametrize("case", CONFIGS)
def test_weighted_tokens_alone_agree_with_the_formula(case):
    check(loss_and_gradients(*sparse(), only_weighted(CONFIGS[case]))[1], oracle(*sparse(), CONFIGS[case]))


def test_weighted_tokens_alone_have_the_metrics_of_all():
    for share in (0.4, 1.0):
        alone = jax.jit(lambda *x: chunked_cross_entropy(*x, only_weighted()))(*sparse(share=share))
        output, _ = loss_and_gradients(*sparse(share=share), only_weighted())
        jax.tree.map(np.testing.assert_array_equal, alone, output)
        of_all = jax.jit(lambda *x: chunked_cross_entropy(*x, EVERYTHING))(*sparse(share=share))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), output, of_all)


def test_nothing_is_computed_of_tokens_without_a_weight():
    hidden, unembedding, targets, weights = sparse()
    unread = jnp.where(weights[..., None] > 0, hidden, jnp.nan)
    _, (total, dhidden, dunembedding) = loss_and_gradients(unread, unembedding, targets, weights, only_weighted())
    check((total, dhidden, dunembedding), oracle(hidden, unembedding, targets, weights, EVERYTHING))
    assert not np.any(np.asarray(dhidden)[np.asarray(weights) == 0])


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("weighted_rows", [3, 0])
def test_weighted_tokens_alone_on_a_mesh_whose_devices_have_more_or_fewer_of_them(shape, weighted_rows):
    arrays = sparse(weighted_rows, share=1.0)
    with jax.set_mesh(jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3)):
        output, actual = loss_and_gradients(*arrays, only_weighted())
    check(actual, oracle(*arrays, EVERYTHING))
    np.testing.assert_allclose(output.weight, np.sum(arrays[-1]), rtol=1e-6)


def test_agrees_with_autodiff_of_log_softmax():
    hidden, unembedding, targets, weights = inputs()

    def plain(hidden, unembedding):
        logprobs = jax.nn.log_softmax(hidden @ unembedding.T)
        return -jnp.sum(weights * jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0])

    expected, gradients = jax.value_and_grad(plain, (0, 1))(hidden, unembedding)
    check(loss_and_gradients(*inputs(), LossConfig(chunk_size=4))[1], (expected, *gradients))


def test_metrics_add_up_to_the_total():
    hidden, unembedding, targets, weights = inputs()
    output = chunked_cross_entropy(hidden, unembedding, targets, weights, EVERYTHING)
    parts = sum(output.metrics[name].total for name in ("cross_entropy", "z_loss", "max_z_loss"))
    right = np.asarray(jnp.argmax(hidden @ unembedding.T, -1) == targets)
    np.testing.assert_allclose(parts, output.total, rtol=1e-6)
    np.testing.assert_allclose(output.weight, np.sum(weights), rtol=1e-6)
    np.testing.assert_allclose(output.metrics["accuracy"].mean(), np.average(right, weights=weights), rtol=1e-5)
    assert right.any()


def test_the_loss_alone_is_the_differentiated_one():
    output, (total, *_) = loss_and_gradients(*inputs(), EVERYTHING)
    alone = jax.jit(lambda *x: chunked_cross_entropy(*x, EVERYTHING))(*inputs())
    jax.tree.map(np.testing.assert_array_equal, alone, output)
    np.testing.assert_array_equal(alone.total, total)


def test_the_gradient_of_a_mean_is_scaled():
    hidden, unembedding, targets, weights = inputs()

    def mean(hidden, unembedding):
        output = chunked_cross_entropy(hidden, unembedding, targets, weights, EVERYTHING)
        return output.total / output.weight

    weight = float(jnp.sum(weights))
    actual = jax.value_and_grad(mean, (0, 1))(hidden, unembedding)
    check((actual[0], *actual[1]), [x / weight for x in oracle(*inputs(), EVERYTHING)])


@pytest.mark.parametrize("features", [D, D - 3], ids=["divided", "whole"])
@pytest.mark.parametrize("shape", MESHES)
def test_the_same_on_a_mesh(shape, features):
    mesh = jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3)
    arrays = [x[..., :features] for x in inputs()[:2]] + list(inputs()[2:])
    output, expected = loss_and_gradients(*arrays, EVERYTHING)
    with jax.set_mesh(mesh):
        sharded_output, actual = loss_and_gradients(*arrays, EVERYTHING)
    check(actual, expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), sharded_output, output)


def test_ties_for_the_highest_logit_share_its_gradient_also_across_devices():
    hidden, unembedding, targets, weights = inputs()
    unembedding = unembedding.at[V // 2 :].set(unembedding[: V // 2])
    mesh = jax.make_mesh((1, 2, 4), AXES, (AxisType.Auto,) * 3)
    check(
        loss_and_gradients(hidden, unembedding, targets, weights, EVERYTHING)[1],
        oracle(hidden, unembedding, targets, weights, EVERYTHING),
    )
    with jax.set_mesh(mesh):
        check(
            loss_and_gradients(hidden, unembedding, targets, weights, EVERYTHING)[1],
            oracle(hidden, unembedding, targets, weights, EVERYTHING),
        )


def test_one_reduction_of_the_unembedding_gradient_after_the_chunks():
    """On a mesh nothing as large as logits moves, and the gradient [V,D] is reduced once, outside the loop: each
    device gets its share of D, as it holds of the parameter."""
    mesh = jax.make_mesh((1, 4, 2), AXES, (AxisType.Auto,) * 3)
    batch, vocabulary = NamedSharding(mesh, P(("replica", "data"))), NamedSharding(mesh, P("tensor"))

    def run(hidden, unembedding, targets, weights):
        return jax.grad(lambda *x: chunked_cross_entropy(*x, targets, weights, EVERYTHING).total, (0, 1))(
            hidden, unembedding
        )

    arrays, shardings = inputs(), (batch, vocabulary, batch, batch)
    shares = NamedSharding(mesh, P("tensor", ("replica", "data")))
    with jax.set_mesh(mesh):
        text = jax.jit(run, in_shardings=shardings, out_shardings=(batch, shares)).lower(*arrays).compile().as_text()
    reduced = [line for line in text.splitlines() if "reduce-scatter(" in line]
    assert len(reduced) == 1 and f"f32[{V // 2},{D // 4}]" in reduced[0] and "while" not in reduced[0]
    assert not re.search(rf"f32\[{V // 2},{D}\]\S* all-reduce", text)
    assert "all-gather" not in text and "all-to-all" not in text


def test_bfloat16_inputs_within_their_precision():
    output, actual = loss_and_gradients(*inputs(jnp.bfloat16), EVERYTHING)
    assert output.total.dtype == jnp.float32 and actual[1].dtype == actual[2].dtype == jnp.bfloat16
    check(actual, oracle(*inputs(jnp.bfloat16), EVERYTHING), tolerance=3e-2)


def test_tokens_of_weight_zero_do_not_count_whatever_their_target():
    hidden, unembedding, targets, weights = inputs()
    weights = weights.at[:, 7:].set(0)
    short = loss_and_gradients(hidden[:, :7], unembedding, targets[:, :7], weights[:, :7], EVERYTHING)[1]
    total, dhidden, dunembedding = loss_and_gradients(
        hidden, unembedding, targets.at[:, 7:].set(-100), weights, EVERYTHING
    )[1]
    check((total, dhidden[:, :7], dunembedding), short)
    assert not np.any(dhidden[:, 7:])


def test_a_batch_of_weight_zero_is_zero():
    hidden, unembedding, targets, weights = inputs()
    output, results = loss_and_gradients(hidden, unembedding, targets, 0 * weights, EVERYTHING)
    assert output.weight == 0 and output.metrics["cross_entropy"].mean() == 0
    assert all(np.all(np.asarray(x) == 0) for x in results)


def test_logits_are_never_held_whole():
    def temporary(length):
        shapes = ((2, length, 8), (4096, 8), (2, length), (2, length))
        dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
        args = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]

        def run(hidden, unembedding, targets, weights):
            config = LossConfig(chunk_size=32)
            return jax.grad(lambda *x: chunked_cross_entropy(*x, targets, weights, config).total, (0, 1))(
                hidden, unembedding
            )

        return jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1024) < 1.3 * temporary(128)
    assert temporary(1024) < 2 * 1024 * 4096 * 4 / 4


def test_the_formula_catches_broken_losses():
    """The comparison can fail: a regulariser left out, a last chunk left out, the gradient of another target."""
    hidden, unembedding, targets, weights = inputs()
    for config, shift, length in (
        (LossConfig(chunk_size=4, max_z_loss=0.03), 0, T),
        (LossConfig(chunk_size=4, z_loss=0.02), 0, T),
        (EVERYTHING, 1, T),
        (EVERYTHING, 0, T - T % EVERYTHING.chunk_size),
    ):
        kept = weights.at[:, length:].set(0)
        broken = loss_and_gradients(hidden, unembedding, (targets + shift) % V, kept, config)[1]
        for actual, expected in zip(broken, oracle(*inputs(), EVERYTHING), strict=True):
            assert np.max(np.abs(np.asarray(actual) - expected)) > 1e-2


def test_mistakes_are_one_line():
    hidden, unembedding, targets, weights = inputs()
    with pytest.raises(UserError, match=r"targets .* must have the shape"):
        chunked_cross_entropy(hidden, unembedding, targets[:, 1:], weights, EVERYTHING)
    with pytest.raises(UserError, match=r"hidden states .* and unembedding"):
        chunked_cross_entropy(hidden, unembedding.T, targets, weights, EVERYTHING)
    mesh = jax.make_mesh((1, 2, 4), ("replica", "data", "tensor"), (AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        with pytest.raises(UserError, match=r"a vocabulary of 22 does not divide by the mesh's tensor=4"):
            chunked_cross_entropy(hidden, unembedding[:22], targets, weights, EVERYTHING)
        with pytest.raises(UserError, match=r"a batch of 3 does not divide by the mesh's replica=1 x data=2"):
            chunked_cross_entropy(hidden[:3], unembedding, targets[:3], weights[:3], EVERYTHING)
    other = jax.make_mesh((8,), ("model",), (AxisType.Auto,))
    with jax.set_mesh(other), pytest.raises(UserError, match="none named replica, data, tensor"):
        chunked_cross_entropy(hidden, unembedding, targets, weights, EVERYTHING)
