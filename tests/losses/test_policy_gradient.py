"""The policy's gradient: against the enumeration of every response, and however the batch is divided."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from llm_jax.data.batch import Batch
from llm_jax.losses import policy
from llm_jax.losses.logprobs import token_logprobs
from llm_jax.optim import adamw, schedules
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import language_model, state, step

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)

# Every response of a policy with a table of logits: vocabulary 5, at most 3 tokens.

V, LENGTH, END, TEMPERATURE, BETA = 5, 3, 4, 0.7, 0.3
STATES = [s for n in range(LENGTH) for s in itertools.product(range(V), repeat=n)]
INDEX = {s: i for i, s in enumerate(STATES)}


class Enumeration(NamedTuple):
    """All responses [R, 3]: their tokens, which of them are drawn, the state before each, a score for each response."""

    tokens: np.ndarray
    mask: np.ndarray
    states: np.ndarray
    scores: np.ndarray


def enumeration(ending):
    """All 125 responses; or, where they end with an end token, the 85 that there are then."""
    drawn = {}
    for response in itertools.product(range(V), repeat=LENGTH):
        length = response.index(END) + 1 if ending and END in response else LENGTH
        drawn[response[:length]] = length
    tokens, mask, states = (np.zeros((len(drawn), LENGTH), np.int32) for _ in range(3))
    for row, response in enumerate(drawn):
        for t, token in enumerate(response):
            tokens[row, t], mask[row, t], states[row, t] = token, 1, INDEX[response[:t]]
    scores = np.random.default_rng(3).normal(size=len(drawn)).astype(np.float32)
    return Enumeration(tokens, mask.astype(np.float32), states, scores)


def tables():
    """Logits of the policy and of the reference, and values, for every state."""
    draw = np.random.default_rng(4)
    shape = (len(STATES), V)
    return draw.normal(size=shape).astype(np.float32), draw.normal(size=shape).astype(np.float32)


def exact_logprobs(logits, every, temperature=TEMPERATURE):
    """Of all responses' tokens [R, 3], by log_softmax; 0 where nothing is drawn."""
    table = jax.nn.log_softmax(logits / temperature)
    return table[every.states, every.tokens] * every.mask


def exact_objective(logits, reference, every):
    """E[score] - BETA * KL(policy || reference): a sum over all responses, each with its probability."""
    logprobs = jnp.sum(exact_logprobs(logits, every), 1)
    divergence = logprobs - jnp.sum(exact_logprobs(reference, every), 1)
    return jnp.sum(jnp.exp(logprobs) * (every.scores - BETA * divergence))


exact_gradient = jax.jit(jax.grad(exact_objective))


def exact_values(logits, reference, every):
    """The expected sum of rewards after each state, by summing over the responses that go through it."""
    logprobs, from_reference = (np.asarray(exact_logprobs(x, every)) for x in (logits, reference))
    rewards = -BETA * (logprobs - from_reference) * every.mask
    rewards[np.arange(len(rewards)), every.mask.sum(1).astype(int) - 1] += every.scores
    values = np.zeros(len(STATES))
    for i in range(len(STATES)):
        for t in range(LENGTH):
            through = (every.states[:, t] == i) & (every.mask[:, t] > 0)
            weights = np.exp(logprobs[through, t:].sum(1))
            values[i] += np.sum(weights * rewards[through, t:].sum(1))
    return values.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("lam", "temperature"))
def sampled_gradient(logits, reference, every, values, *, lam, temperature=TEMPERATURE, mask=None):
    """The expectation of minus the gradient of PPO's loss, by the functions under test: one response a row."""
    mask = every.mask if mask is None else mask

    def logprobs(logits, temperature):
        identity = jnp.eye(V, dtype=jnp.float32)
        result = token_logprobs(logits[every.states], identity, every.tokens, temperature=temperature, chunk_size=2)
        return result.logprobs_BT

    old, from_reference = logprobs(logits, temperature), logprobs(reference, temperature)
    rewards = policy.token_rewards(every.scores, policy.kl_estimates(old, from_reference).k1, mask, BETA)
    advantages, _ = policy.gae(rewards, values, mask, 1.0, lam)
    probabilities = jnp.exp(jnp.sum(exact_logprobs(logits, every), 1, keepdims=True))

    def total(logits):
        weights = mask * probabilities
        return -policy.policy_loss(
            logprobs(logits, temperature), old, advantages, weights, clip=0.2, max_log_ratio=20.0
        ).total

    return jax.grad(total)(logits)


VALUES = {
    "no critic": lambda exact: np.zeros_like(exact),
    "any critic": lambda exact: np.random.default_rng(5).normal(size=exact.shape).astype(np.float32),
    "the exact critic": lambda exact: exact,
}


@pytest.mark.parametrize("ending", [False, True], ids=["125 responses", "85 that end"])
@pytest.mark.parametrize(("critic", "lam"), [(name, 1.0) for name in VALUES] + [("the exact critic", 0.6)])
def test_the_expected_gradient_is_that_of_the_objective(critic, ending, lam):
    """With lambda 1 for any critic that does not know the token to come, with less for the exact one."""
    every, (logits, reference) = enumeration(ending), tables()
    assert len(every.tokens) == (85 if ending else 125)
    close(jnp.sum(jnp.exp(jnp.sum(exact_logprobs(logits, every), 1))), 1.0)
    expected = exact_gradient(logits, reference, every)
    table = VALUES[critic](exact_values(logits, reference, every))
    actual = sampled_gradient(logits, reference, every, table[every.states] * every.mask, lam=lam)
    close(actual, expected, atol=3e-6)
    assert np.max(np.abs(expected)) > 1e-2


def test_the_enumeration_tells_broken_variants():
    """A value read one position late, padding that counts, logprobs without the temperature, no reference."""
    every, (logits, reference) = enumeration(True), tables()
    expected = exact_gradient(logits, reference, every)
    table = exact_values(logits, reference, every)
    values = table[every.states] * every.mask
    run = functools.partial(sampled_gradient, logits, reference, every)
    late = np.pad(values, ((0, 0), (0, 1)))[:, 1:]
    broken = {
        "late": run(late, lam=1.0),
        "padding": run(values, lam=1.0, mask=np.ones_like(every.mask)),
        "temperature": run(values, lam=1.0, temperature=1.0),
        "reference": sampled_gradient(logits, logits, every, values, lam=1.0),
    }
    close(run(values, lam=1.0), expected, atol=3e-6)
    for name, gradient in broken.items():
        assert np.max(np.abs(gradient - expected)) > 1e-3, name


def test_kl_estimates_have_the_exact_kl_as_expectation():
    """k1's and k3's values, k2's gradient; k2's value and the gradient of k1 itself are something else."""
    every, (logits, reference) = enumeration(True), tables()

    def exact(logits):
        logprobs = exact_logprobs(logits, every)
        return jnp.sum(jnp.exp(jnp.sum(logprobs, 1)) * jnp.sum(logprobs - exact_logprobs(reference, every), 1))

    def expectations(logits):
        probabilities = jnp.exp(jnp.sum(exact_logprobs(jax.lax.stop_gradient(logits), every), 1))
        estimates = policy.kl_estimates(exact_logprobs(logits, every), exact_logprobs(reference, every))
        return jax.tree.map(lambda k_RT: jnp.sum(probabilities * jnp.sum(k_RT, 1)), estimates)

    divergence, gradient = jax.value_and_grad(exact)(logits)
    means, gradients = expectations(logits), jax.jacrev(expectations)(logits)
    close(means.k1, divergence)
    close(means.k3, divergence)
    close(gradients.k1, np.zeros_like(gradient), atol=1e-6)
    assert abs(means.k2 - divergence) > 1e-2
    # Of one token, k2's gradient is k1 times the score: the whole gradient counts the tokens that follow too.
    first = every._replace(tokens=np.arange(V)[:, None], states=np.zeros((V, 1), int), mask=np.ones((V, 1)))

    def k2_of_first(logits):
        probabilities = jnp.exp(exact_logprobs(jax.lax.stop_gradient(logits), first))
        estimates = policy.kl_estimates(exact_logprobs(logits, first), exact_logprobs(reference, first))
        return jnp.sum(probabilities * estimates.k2)

    def exact_of_first(logits):
        logprobs = exact_logprobs(logits, first)
        return jnp.sum(jnp.exp(logprobs) * (logprobs - exact_logprobs(reference, first)))

    close(jax.grad(k2_of_first)(logits), jax.grad(exact_of_first)(logits), atol=1e-6)


def test_leave_one_out_gives_the_gradient_of_the_expected_score():
    """Two responses of one token each, all 25 pairs: the baseline of the other response leaves no bias."""
    logits, scores = np.random.default_rng(0).normal(size=(2, V)).astype(np.float32)
    pairs = np.array(list(itertools.product(range(V), repeat=2)))
    advantages = policy.group_advantages(scores[pairs], "rloo")
    probabilities = jnp.prod(jax.nn.softmax(logits)[pairs], 1, keepdims=True)

    def total(logits):
        logprobs = jax.nn.log_softmax(logits)[pairs]
        old = jax.lax.stop_gradient(logprobs)
        weights = jnp.broadcast_to(probabilities / 2, pairs.shape)
        return -policy.policy_loss(logprobs, old, advantages, weights, clip=0.2, max_log_ratio=20.0).total

    close(jax.grad(total)(logits), jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * scores))(logits), atol=1e-6)


# A model's update: however the batch is divided over devices and microbatches.

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=4, ffn_size=48, max_length=16,
    init_std=0.2,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant", eps=1e-5)


class Experience(NamedTuple):
    batch: Batch
    old_logprobs: Any
    advantages: Any


def loss_fn(params, experience, key):
    function = language_model.logprobs_function(MODEL, temperature=0.7, chunk_size=5, entropies=True)
    logprobs, entropies = function(params, experience.batch)
    mask = experience.batch.loss_weights
    return policy.policy_loss(
        logprobs, experience.old_logprobs, experience.advantages, mask, entropies=entropies,
        reference=experience.old_logprobs, clip=0.2, max_log_ratio=20.0, entropy_coefficient=0.03, kl_coefficient=0.4,
    )  # fmt: skip


@functools.cache
def train(mesh_sizes, microbatches=1):
    """Metrics of three updates on the same responses, and the parameters after them."""
    mesh = mesh_lib.build(MeshConfig(*mesh_sizes), jax.devices()[: int(np.prod(mesh_sizes))])
    optimizer = adamw.build(OPTIMIZER, adamw.decay_mask)
    current = state.init_state(MODEL, optimizer, mesh, jax.random.key(3))
    mask, draw = np.zeros((16, 12), np.float32), np.random.default_rng(0)
    for row in range(16):
        mask[row, 3 : 4 + row % 9] = 1
    tokens = draw.integers(0, MODEL.vocab_size, (16, 13)).astype(np.int32)
    segments = np.ones((16, 12), np.int32)
    positions = np.tile(np.arange(12, dtype=np.int32), (16, 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], mask, segments, positions)
    rows = NamedSharding(mesh, P(("replica", "data")))
    batch, advantages = jax.device_put((batch, draw.normal(size=(16, 12)).astype(np.float32)), rows)
    update = step.build(loss_fn, optimizer, schedules.learning_rate(OPTIMIZER, 3), seed=5, microbatches=microbatches)
    results = []
    with jax.set_mesh(mesh):
        advantages = jax.jit(policy.whiten)(advantages, batch.loss_weights)
        before = language_model.logprobs_function(MODEL, temperature=0.7, chunk_size=5, entropies=True)
        old = jax.jit(before)(current.params, batch).logprobs_BT
        for _ in range(3):
            current, metrics = update(current, Experience(batch, old, advantages))
            results.append({name: float(value) for name, value in metrics.items()})
    return results, jax.device_get(current.params)


def test_the_first_update_begins_with_ratio_one_and_kl_zero_and_the_next_do_not():
    first, second, third = train((1, 1, 1))[0]
    assert first["ratio"] == 1.0 and first["approximate_kl"] == first["reference_kl"] == first["clip_fraction"] == 0.0
    assert second["approximate_kl"] > 1e-5 and third["policy_loss"] < second["policy_loss"] < first["policy_loss"]


@pytest.mark.parametrize(
    ("mesh_sizes", "microbatches"), [((1, 8, 1), 1), ((2, 2, 2), 1), ((1, 1, 1), 4), ((1, 2, 4), 2)]
)
def test_meshes_and_microbatches_give_the_same_updates(mesh_sizes, microbatches):
    (results, params), (expected, wanted) = train(mesh_sizes, microbatches), train((1, 1, 1))
    for a, e in zip(results, expected, strict=True):
        assert a.keys() == e.keys()
        close([a[k] for k in e], list(e.values()), rtol=1e-3, atol=1e-5)
    jax.tree.map(functools.partial(close, rtol=1e-3), params, wanted)
