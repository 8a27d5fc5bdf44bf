"""AdamW against the algorithm written out in numpy, the schedules' values, and the rules of decay."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.config import OptimizerConfig
from llm_jax.errors import UserError
from llm_jax.optim import presets
from llm_jax.optim.adamw import build, decay_mask, global_norm
from llm_jax.optim.schedules import learning_rate

CONFIG = OptimizerConfig(
    learning_rate=0.1, warmup_steps=3, schedule="cosine", eps=1e-3, weight_decay=0.2, clip_norm=0.7, b1=0.8, b2=0.9
)
STEPS = 10
SCHEDULE = learning_rate(CONFIG, STEPS)


def parameters(dtype=jnp.float32):
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    return {
        "embedder": {"embedding": draw(5, 4)},
        "layers": {
            "attention": {"query": {"kernel": draw(2, 4, 4), "bias": draw(2, 4)}},
            "attention_norm": {"scale": draw(2, 4)},
        },
        "final_norm": {"scale": draw(4)},
        "head": {"kernel": draw(4, 5)},
    }


def gradients(step, tree):
    random = np.random.default_rng(100 + step)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) * (0.05 if step % 2 else 3), x.dtype), tree)


def run(config, params, steps=STEPS):
    optimizer, schedule = build(config, decay_mask), learning_rate(config, steps)
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, p: optimizer.update(g, s, p, schedule=schedule))
    for step in range(steps):
        updates, state = update(gradients(step, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def written_out(config, params, steps=STEPS):
    """Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2, after clipping by global norm."""
    template = params
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    decays = ["kernel" in name or "embedding" in name for name in names]
    theta = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
    m, v = [0.0 * x for x in theta], [0.0 * x for x in theta]
    for step in range(steps):
        g = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradients(step, template))]
        norm = math.sqrt(sum(float(np.sum(x**2)) for x in g))
        g = [x * min(1.0, config.clip_norm / norm) for x in g] if config.clip_norm else g
        progress = min(max((step - config.warmup_steps) / (steps - config.warmup_steps), 0.0), 1.0)
        floor = config.final_fraction
        decayed = floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
        rate = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * decayed
        for i, x in enumerate(g):
            m[i] = config.b1 * m[i] + (1 - config.b1) * x
            v[i] = config.b2 * v[i] + (1 - config.b2) * x**2
            adam = (m[i] / (1 - config.b1 ** (step + 1))) / (np.sqrt(v[i] / (1 - config.b2 ** (step + 1))) + config.eps)
            theta[i] = theta[i] - rate * (adam + (config.weight_decay * theta[i] if decays[i] else 0.0))
    return jax.tree.unflatten(jax.tree.structure(template), theta)


def difference(a, b):
    return max(
        float(np.max(np.abs(np.asarray(x) - np.asarray(y))))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
def test_ten_steps_agree_with_the_algorithm(clip_norm):
    config = dataclasses.replace(CONFIG, clip_norm=clip_norm)
    assert difference(run(config, parameters())[0], written_out(config, parameters())) < 1e-5


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.21}, {"clip_norm": 0.8}, {"eps": 2e-3}, {"warmup_steps": 4}, {"b2": 0.91}]
)
def test_the_comparison_sees_a_changed_setting(change):
    assert (
        difference(run(dataclasses.replace(CONFIG, **change), parameters())[0], written_out(CONFIG, parameters()))
        > 1e-4
    )


def test_moments_and_updates_are_float32_for_bfloat16_parameters():
    params = parameters(jnp.bfloat16)
    optimizer = build(CONFIG, decay_mask)
    state = optimizer.init(params)
    updates, state = optimizer.update(gradients(0, params), state, params, schedule=SCHEDULE)
    kept = [x for x in jax.tree.leaves((updates, state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(kept) == 3 * len(jax.tree.leaves(params)) and all(x.dtype == jnp.float32 for x in kept)


def test_the_state_can_be_described_without_allocating():
    abstract = jax.eval_shape(build(CONFIG, decay_mask).init, parameters())
    real = build(CONFIG, decay_mask).init(parameters())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), real)


def test_global_norm():
    tree = parameters()
    expected = np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]))
    np.testing.assert_allclose(global_norm(tree), expected, rtol=1e-6)
    assert global_norm(parameters(jnp.bfloat16)).dtype == jnp.float32 and global_norm({}) == 0


def test_a_gradient_that_is_not_finite_stays_visible():
    params = parameters()
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    optimizer = build(CONFIG, decay_mask)
    updates, _ = optimizer.update(bad, optimizer.init(params), params, schedule=SCHEDULE)
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(updates))


def test_what_decays():
    assert decay_mask(parameters()) == {
        "embedder": {"embedding": True},
        "layers": {"attention": {"query": {"kernel": True, "bias": False}}, "attention_norm": {"scale": False}},
        "final_norm": {"scale": False},
        "head": {"kernel": True},
    }


@pytest.mark.parametrize("name", ["gate", "layers/attention/scale", "layers/attention_norm/weight"])
def test_a_parameter_that_no_rule_covers_is_named(name):
    tree = jnp.ones(3)
    for key in reversed(name.split("/")):
        tree = {key: tree}
    with pytest.raises(UserError, match=f"parameter '{name}' matches no rule"):
        build(CONFIG, decay_mask).init(tree)


def test_a_parameter_that_two_rules_cover_is_named(monkeypatch):
    from llm_jax.optim import adamw

    extra = adamw.DecayRule("head", r"head/.*", False)
    monkeypatch.setattr(adamw, "DECAY_RULES", (*adamw.DECAY_RULES, extra))
    with pytest.raises(UserError, match="'head/kernel' matches matrix and head"):
        decay_mask(parameters())


def values(config, total_steps, steps):
    schedule = learning_rate(config, total_steps)
    return [float(schedule(step)) for step in steps]


def test_warm_up_loses_no_step():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="constant")
    np.testing.assert_allclose(values(config, 10, range(6)), [0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(values(dataclasses.replace(config, warmup_steps=0), 10, range(2)), [1, 1])


@pytest.mark.parametrize("name,halfway", [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_decay_begins_at_the_peak_and_ends_at_the_final_fraction(name, halfway):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule=name, final_fraction=0.1)
    last = 2.0 if name == "constant" else 0.2
    np.testing.assert_allclose(values(config, 110, (9, 10, 60, 110, 500)), [2, 2, 2 * halfway, last, last], rtol=1e-6)


def test_cosine_and_linear_differ_where_they_should():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, final_fraction=0.0)
    np.testing.assert_allclose(values(config, 100, (25,)), [(1 + math.cos(math.pi / 4)) / 2], rtol=1e-6)
    np.testing.assert_allclose(values(dataclasses.replace(config, schedule="linear"), 100, (25,)), [0.75], rtol=1e-6)


def test_decay_steps_override_the_length_of_the_run():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, decay_steps=50, final_fraction=0.1)
    np.testing.assert_allclose(values(config, 1000, (50, 999)), [0.1, 0.1], rtol=1e-6)
    assert learning_rate(config, 1000)(jnp.int32(3)).dtype == jnp.float32


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warmup_steps=2000 must be below the 100 steps"):
        learning_rate(OptimizerConfig(), 100)


def test_presets_hold_the_papers_values():
    rates = {name: config.learning_rate for name, config in presets.PRESETS.items()}
    assert rates == {
        "llama2_7b": 3e-4,
        "llama2_13b": 3e-4,
        "llama2_34b": 1.5e-4,
        "llama2_70b": 1.5e-4,
        "baichuan2_7b": 2e-4,
        "baichuan2_13b": 1.5e-4,
        "qwen": 3e-4,
    }
    assert presets.get("llama2_7b").eps == 1e-5 and presets.get("qwen").eps == 1e-8
    assert presets.get("baichuan2_13b").clip_norm == 0.5 and presets.get("llama2_70b").clip_norm == 1.0
    assert {(c.b1, c.b2, c.warmup_steps, c.schedule) for c in presets.PRESETS.values()} == {(0.9, 0.95, 2000, "cosine")}
    with pytest.raises(UserError, match="no optimizer preset 'llama2'; did you mean 'llama2_7b'"):
        presets.get("llama2")
