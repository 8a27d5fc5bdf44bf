"""Chunked logprobs and entropies against log_softmax of all logits in float64, alone, split over meshes, of a model."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import models
from llm_jax.config import ModelConfig
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.losses.logprobs import token_logprobs
from llm_jax.parallel.mesh import AXES
from llm_jax.training import language_model

B, T, D, V = 8, 13, 6, 24
MESHES = ((1, 8, 1), (1, 2, 4), (2, 2, 2))
MODEL = ModelConfig(
    vocab_size=40, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=24, max_length=16,
    init_std=0.4,
)  # fmt: skip
HEADS = {"head": {}, "NormHead": {"norm_head": True}, "tied": {"tie_embeddings": True}}


def inputs(dtype=jnp.float32):
    """Hidden states, unembedding, targets, and what the logprobs and entropies are multiplied by before they add up."""
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (B, T, D), dtype)
    unembedding = jax.random.normal(keys[1], (V, D), dtype)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    return hidden, unembedding, targets, *jax.random.normal(keys[3], (2, B, T))


def oracle(hidden, unembedding, targets, logprob_factors, entropy_factors, temperature):
    """logprobs, entropies, and the gradients of their weighted sum by formula in float64, logits and all."""
    h, u, g, e = (np.asarray(x, np.float64) for x in (hidden, unembedding, logprob_factors, entropy_factors))
    logits = h @ u.T / temperature
    all_logprobs = logits - logits.max(-1, keepdims=True)
    all_logprobs -= np.log(np.exp(all_logprobs).sum(-1, keepdims=True))
    onehot, p = np.eye(V)[np.asarray(targets)], np.exp(all_logprobs)
    entropies = -(p * all_logprobs).sum(-1)
    dlogits = g[..., None] * (onehot - p) - e[..., None] * p * (all_logprobs + entropies[..., None])
    dlogits /= temperature
    return (all_logprobs * onehot).sum(-1), entropies, dlogits @ u, np.einsum("btv,btd->vd", dlogits, h)


def run(hidden, unembedding, targets, logprob_factors, entropy_factors, **settings):
    """The same four of `token_logprobs`, jitted; without entropies the second is None and does not count."""

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def total(hidden, unembedding, targets, logprob_factors, entropy_factors):
        result = token_logprobs(hidden, unembedding, targets, **settings)
        total = jnp.sum(logprob_factors * result.logprobs_BT)
        if result.entropies_BT is not None:
            total += jnp.sum(entropy_factors * result.entropies_BT)
        return total, result

    (_, result), gradients = jax.jit(total)(hidden, unembedding, targets, logprob_factors, entropy_factors)
    return *result, *gradients


def check(actual, expected, tolerance=2e-5):
    for name, a, e in zip(("logprobs", "entropies", "dhidden", "dunembedding"), actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("chunk_size", [4, 13, 100])
def test_values_and_gradients_agree_with_log_softmax(chunk_size, temperature):
    actual = run(*inputs(), temperature=temperature, chunk_size=chunk_size, entropies=True)
    check(actual, oracle(*inputs(), temperature))
    assert actual[0].dtype == actual[1].dtype == jnp.float32 and actual[0].shape == (B, T)


def test_logprobs_without_entropies_are_the_same():
    hidden, unembedding, targets, factors, _ = inputs()
    logprobs, none, *gradients = run(*inputs(), temperature=0.6, chunk_size=4)
    assert none is None
    expected = oracle(hidden, unembedding, targets, factors, np.zeros((B, T)), 0.6)
    check((logprobs, expected[1], *gradients), expected)
    with_entropies = run(*inputs(), temperature=0.6, chunk_size=4, entropies=True)
    np.testing.assert_array_equal(logprobs, with_entropies[0])


def test_values_without_gradients_are_bit_for_bit_those_with_them():
    """The ratio of the first minibatch is exactly 1 only if the pass before training and the trained one agree."""
    settings = {"temperature": 0.6, "chunk_size": 4, "entropies": True}
    alone = jax.jit(lambda *x: token_logprobs(*x, **settings))(*inputs()[:3])
    jax.tree.map(np.testing.assert_array_equal, tuple(alone), run(*inputs(), **settings)[:2])


@pytest.mark.parametrize("shape", MESHES)
def test_the_same_on_a_mesh(shape):
    with jax.set_mesh(jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3)):
        actual = run(*inputs(), temperature=0.6, chunk_size=4, entropies=True)
    check(actual, oracle(*inputs(), 0.6))


def test_nothing_as_large_as_logits_moves_between_devices():
    mesh = jax.make_mesh((1, 4, 2), AXES, (AxisType.Auto,) * 3)
    batch, vocabulary = NamedSharding(mesh, P(("replica", "data"))), NamedSharding(mesh, P("tensor"))

    def gradients(hidden, unembedding, targets):
        def total(*x):
            return sum(jnp.sum(y) for y in token_logprobs(*x, targets, chunk_size=4, entropies=True))

        return jax.grad(total, (0, 1))(hidden, unembedding)

    arrays, shardings = inputs()[:3], (batch, vocabulary, batch)
    with jax.set_mesh(mesh):
        jitted = jax.jit(gradients, in_shardings=shardings, out_shardings=shardings[:2])
        text = jitted.lower(*arrays).compile().as_text()
    reduced = [line for line in text.splitlines() if "all-reduce(" in line and f"f32[{V // 2},{D}]" in line]
    assert len(reduced) == 1 and "while" not in reduced[0]
    assert "all-gather" not in text and "all-to-all" not in text


def test_bfloat16_inputs_within_their_precision():
    actual = run(*inputs(jnp.bfloat16), temperature=0.6, chunk_size=4, entropies=True)
    assert actual[0].dtype == actual[1].dtype == jnp.float32 and actual[2].dtype == actual[3].dtype == jnp.bfloat16
    expected = oracle(*inputs(jnp.bfloat16), 0.6)
    check((*actual[:2], *expected[2:]), expected)  # the matmul accumulates in float32, so the values are exact
    check(actual, expected, tolerance=4e-2)


def test_large_logits_keep_their_precision():
    """Of a certain token the logprob is near 0, however large the logits; nothing overflows."""
    hidden = jnp.full((1, 1, 1), 1000.0)
    unembedding = jnp.array([[1.0], [0.99], [-1.0]])
    result = token_logprobs(hidden, unembedding, jnp.zeros((1, 1), jnp.int32), chunk_size=1, entropies=True)
    np.testing.assert_allclose(result.logprobs_BT[0, 0], -np.log1p(np.exp(-10.0)), rtol=2e-3)
    np.testing.assert_allclose(result.entropies_BT[0, 0], 11 * np.exp(-10.0), rtol=2e-3)


def test_a_target_outside_the_vocabulary_harms_nothing_that_counts():
    hidden, unembedding, targets, logprob_factors, entropy_factors = inputs()
    outside = targets.at[:, 7:].set(-100)
    factors = (logprob_factors.at[:, 7:].set(0), entropy_factors.at[:, 7:].set(0))
    settings = {"temperature": 1.0, "chunk_size": 4, "entropies": True}
    logprobs, entropies, dhidden, dunembedding = run(hidden, unembedding, outside, *factors, **settings)
    short = run(hidden[:, :7], unembedding, targets[:, :7], *(x[:, :7] for x in factors), **settings)
    check((logprobs[:, :7], entropies[:, :7], dhidden[:, :7], dunembedding), short)
    assert not np.any(dhidden[:, 7:])


def gradients_of(length, vocab_size=4096, chunk_size=32):
    shapes = ((2, length, 8), (vocab_size, 8), (2, length))
    args = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (jnp.float32, jnp.float32, jnp.int32), strict=True)]

    def gradients(hidden, unembedding, targets):
        def total(*x):
            return sum(jnp.sum(y) for y in token_logprobs(*x, targets, chunk_size=chunk_size, entropies=True))

        return jax.grad(total, (0, 1))(hidden, unembedding)

    return gradients, args


def test_logits_are_never_held_whole():
    def temporary(length):
        gradients, args = gradients_of(length)
        return jax.jit(gradients).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1024) < 1.3 * temporary(128)
    assert temporary(1024) < 2 * 1024 * 4096 * 4 / 4


def test_no_array_of_the_program_is_larger_than_a_chunk_of_logits():
    gradients, args = gradients_of(1024)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    assert max(sizes(jax.make_jaxpr(gradients)(*args).jaxpr)) == 2 * 32 * 4096


@pytest.mark.parametrize("head", HEADS)
def test_a_models_logprobs_and_their_gradients(head):
    """Of two texts in a row and padding, against the model's own logits."""
    model = dataclasses.replace(MODEL, **HEADS[head])
    params, batch = models.init(model, jax.random.key(1)), packed_batch()
    batch = batch._replace(positions=2 * batch.positions)  # which no text has by itself
    function = language_model.logprobs_function(model, temperature=0.6, chunk_size=5, entropies=True)
    factors = np.random.default_rng(1).normal(size=(2, *batch.tokens.shape)).astype(np.float32)

    def actual(params):
        result = function(params, batch)
        return jnp.sum(factors[0] * result.logprobs_BT) + jnp.sum(factors[1] * result.entropies_BT), result

    def expected(params):
        logits = models.logits(params, model, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        every = jax.nn.log_softmax(logits / 0.6)
        picked = jnp.take_along_axis(every, batch.targets[..., None], -1)[..., 0] * batch.loss_weights
        entropies = -jnp.sum(jnp.exp(every) * every, -1) * batch.loss_weights
        return jnp.sum(factors[0] * picked) + jnp.sum(factors[1] * entropies), (picked, entropies)

    (_, result), gradients = jax.jit(jax.value_and_grad(actual, has_aux=True))(params)
    (_, values), wanted = jax.jit(jax.value_and_grad(expected, has_aux=True))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), tuple(result), values)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-4), gradients, wanted)
    assert not np.any(np.asarray(result.logprobs_BT)[batch.loss_weights == 0])


def packed_batch():
    """Rows of a text of 5 tokens, one of 6 or 4, and padding; the first target of each text does not count."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, MODEL.vocab_size, (2, 14)).astype(np.int32)
    segments, positions, weights = (np.zeros((2, 14), np.float32) for _ in range(3))
    for row, second in enumerate((6, 4)):
        for begin, length, segment in ((0, 5, 1), (5, second, 2)):
            text = slice(begin, begin + length)
            segments[row, text], positions[row, text] = segment, np.arange(length)
            weights[row, begin + 1 : begin + length - 1] = 1
    return Batch(tokens, np.roll(tokens, -1, 1), weights, segments.astype(np.int32), positions.astype(np.int32))


def test_packed_and_padded_texts_have_the_logprobs_that_they_have_alone():
    params, batch = models.init(MODEL, jax.random.key(1)), packed_batch()
    function = jax.jit(language_model.logprobs_function(MODEL, chunk_size=5, entropies=True))
    together = function(params, batch)
    for begin, end in ((0, 5), (5, 11)):
        alone = function(params, Batch(*(x[:1, begin:end] for x in batch)))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a, b[:1, begin:end], atol=1e-5)
        assert np.count_nonzero(alone.logprobs_BT) == end - begin - 2


def test_dropout_and_noise_are_off():
    model = dataclasses.replace(MODEL, dropout_rate=0.5, neftune_alpha=5.0)
    params, batch = models.init(MODEL, jax.random.key(1)), packed_batch()
    noisy, plain = (language_model.logprobs_function(m, chunk_size=5)(params, batch) for m in (model, MODEL))
    np.testing.assert_array_equal(noisy.logprobs_BT, plain.logprobs_BT)


def test_mistakes_are_one_line():
    hidden, unembedding, targets, *_ = inputs()
    for arrays in ((hidden, unembedding.T, targets), (hidden, unembedding, targets[:, 1:])):
        with pytest.raises(UserError, match=r"logprobs: hidden states .* unembedding .* and targets"):
            token_logprobs(*arrays, chunk_size=4)
    with pytest.raises(UserError, match=r"temperature=0\.0 must be positive"):
        token_logprobs(hidden, unembedding, targets, temperature=0.0, chunk_size=4)
    with pytest.raises(UserError, match="chunk_size=0 must be positive"):
        token_logprobs(hidden, unembedding, targets, chunk_size=0)
    mesh = jax.make_mesh((1, 2, 4), AXES, (AxisType.Auto,) * 3)
    with jax.set_mesh(mesh), pytest.raises(UserError, match="a batch of 3 does not divide"):
        token_logprobs(hidden[:3], unembedding, targets[:3], chunk_size=4)
