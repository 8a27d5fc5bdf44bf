"""The train step gives the same numbers however it is divided: by mesh, by microbatch, by packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.losses.weighted import LossOutput
from llm_jax.optim import adamw, schedules
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import language_model, state, step
from llm_jax.training.loop import place

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    ffn_size=48,
    max_length=16,
    norm_head=True,
    qkv_bias=True,
    init_std=0.1,
)
# Adam divides rounding noise by itself where a gradient is exactly zero; a larger eps keeps such noise small.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, schedule="constant", eps=1e-5)
LOSS = LossConfig(chunk_size=5, max_z_loss=2e-4)
MESHES = {"1x1x1": (1, 1, 1), "1x8x1": (1, 8, 1), "1x2x4": (1, 2, 4), "2x2x2": (2, 2, 2)}
STEPS = 4


def random_batch(index, rows=16, length=16):
    """Two packed documents a row, their border and the number of padded tokens varying."""
    generator = np.random.default_rng(index)
    tokens = generator.integers(0, MODEL.vocab_size, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        border, end = generator.integers(2, length - 4), generator.integers(length - 3, length + 1)
        segments[row, border:] = 2
        segments[row, end:] = 0
        positions[row] = np.concatenate([np.arange(border), np.arange(length - border)])
    weights = (segments > 0).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


@functools.cache
def train(mesh_sizes, microbatches=1, **changes):
    """Losses of a few steps and the parameters after them."""
    model = dataclasses.replace(MODEL, **changes)
    replica, data, tensor = mesh_sizes
    mesh = mesh_lib.build(MeshConfig(replica, data, tensor), jax.devices()[: replica * data * tensor])
    optimizer = adamw.build(OPTIMIZER, adamw.decay_mask)
    schedule = schedules.learning_rate(OPTIMIZER, STEPS)
    current = state.init_state(model, optimizer, mesh, jax.random.key(3))
    update = step.build(
        language_model.loss_function(model, LOSS), optimizer, schedule, seed=5, microbatches=microbatches
    )
    losses = []
    with jax.set_mesh(mesh):
        for index in range(STEPS):
            current, metrics = update(current, place(random_batch(index), mesh))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(current.params)


def assert_same(got, want, rtol=2e-5, atol=2e-5):
    np.testing.assert_allclose(got[0], want[0], rtol=rtol)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(want[1])):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-3, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("mesh_sizes", list(MESHES.values())[1:], ids=list(MESHES)[1:])
@pytest.mark.parametrize("changes", [{}, {"position": "alibi", "qkv_bias": False, "norm_head": False}], ids=str)
def test_every_mesh_gives_the_same_losses_and_parameters(mesh_sizes, changes):
    want = train((1, 1, 1), **changes)
    assert want[0][-1] < want[0][0]
    assert_same(train(mesh_sizes, **changes), want)


@pytest.mark.parametrize("mesh_sizes", [(1, 1, 1), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_of_unequal_weight_give_the_same_update(mesh_sizes, microbatches):
    assert_same(train(mesh_sizes, microbatches), train((1, 1, 1)))


@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_attention_implementations_shard_alike(attention):
    assert_same(train((1, 2, 4), attention=attention, remat="save_attention"), train((1, 1, 1)))


def test_dropout_does_not_depend_on_the_mesh_but_on_the_step():
    want = train((1, 1, 1), dropout_rate=0.3)
    assert_same(train((1, 2, 4), dropout_rate=0.3), want)
    assert abs(want[0][0] - train((1, 1, 1))[0][0]) > 1e-3


def test_bfloat16_compute_keeps_float32_masters_and_learns_alike():
    losses, params = train((1, 2, 4), compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    np.testing.assert_allclose(losses, train((1, 1, 1))[0], rtol=0.01)


def test_state_keeps_its_layout_through_a_step():
    mesh = mesh_lib.build(MeshConfig(data=2, tensor=4))
    optimizer = adamw.build(OPTIMIZER, adamw.decay_mask)
    abstract = state.abstract_state(MODEL, optimizer, mesh)
    current = state.init_state(MODEL, optimizer, mesh, jax.random.key(0))
    update = step.build(
        language_model.loss_function(MODEL, LOSS), optimizer, schedules.learning_rate(OPTIMIZER, STEPS), seed=0
    )
    with jax.set_mesh(mesh):
        after, _ = update(current, place(random_batch(0), mesh))
    for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(abstract)):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim), jax.tree_util.keystr(path)


def test_weight_zero_gives_loss_zero_and_finite_parameters():
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:1])
    optimizer = adamw.build(OPTIMIZER, adamw.decay_mask)
    current = state.init_state(MODEL, optimizer, mesh, jax.random.key(0))
    update = step.build(
        language_model.loss_function(MODEL, LOSS), optimizer, schedules.learning_rate(OPTIMIZER, STEPS), seed=0
    )
    batch = random_batch(0)._replace(loss_weights=np.zeros((16, 16), np.float32))
    with jax.set_mesh(mesh):
        after, metrics = update(current, place(batch, mesh))
    assert float(metrics["loss"]) == 0.0 and float(metrics["gradient_norm"]) == 0.0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after.params))


def test_gradient_is_that_of_the_mean_over_all_weights():
    def loss_fn(params, batch, key):
        error = batch["weight"] * jnp.square(params["x"] - batch["target"])
        return LossOutput(jnp.sum(error), jnp.sum(batch["weight"]), {})

    batch = {"target": jnp.array([1.0, 2.0, 5.0, 7.0]), "weight": jnp.array([1.0, 0.0, 3.0, 2.0])}
    key = jax.random.key(0)
    for microbatches in (1, 2, 4):
        gradients, output = step.sum_gradients(loss_fn, {"x": jnp.array(3.0)}, batch, key, microbatches)
        mean = (1 * (3 - 1) + 3 * (3 - 5) + 2 * (3 - 7)) * 2 / 6
        np.testing.assert_allclose(gradients["x"] / output.weight, mean, rtol=1e-6)


def test_batch_must_divide():
    mesh = mesh_lib.build(MeshConfig())
    step.check_batch(16, 2, mesh)
    with pytest.raises(UserError, match=r"batch_size=12 .* choose a multiple of 16"):
        step.check_batch(12, 2, mesh)


def test_packed_documents_train_as_each_alone():
    """Gradients of one packed row equal the summed gradients of its two documents on their own."""
    loss_fn = language_model.loss_function(MODEL, LOSS)
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:1])
    params = state.init_state(MODEL, adamw.build(OPTIMIZER, adamw.decay_mask), mesh, jax.random.key(1)).params
    packed = random_batch(0, rows=1)
    gradient = jax.jit(jax.grad(lambda p, b: loss_fn(p, b, None).total))
    parts = []
    for segment in (1, 2):
        (chosen,) = np.nonzero(packed.segment_ids[0] == segment)
        alone = Batch(*(field[:, chosen] for field in packed))
        parts.append(gradient(params, alone._replace(segment_ids=np.ones_like(alone.segment_ids))))
    want = jax.tree.map(jnp.add, *parts)
    for got, expected in zip(jax.tree.leaves(gradient(params, packed)), jax.tree.leaves(want)):
        np.testing.assert_allclose(got, expected, atol=2e-4, rtol=1e-4)


def test_a_microbatch_begins_when_the_one_before_is_added_up():
    """Else XLA for GPUs takes one out of the loop and holds activations of both (tests/parallel/test_overlap.py)."""

    def loss_fn(params, batch, key):
        return LossOutput(jnp.sum(params["weight"] * params["early"] * batch), jnp.float32(1), {})

    def once(params):
        return {"early": jax.lax.stop_gradient(jnp.sin(params["weight"]))}

    def gradients(params, batch):
        return step.sum_gradients(loss_fn, params, batch, jax.random.key(0), 2, once=once)

    traced = jax.make_jaxpr(gradients)({"weight": jnp.ones(8)}, jnp.ones((4, 8)))
    (loop,) = (equation for equation in traced.eqns if equation.primitive is jax.lax.scan_p)
    body, consts = loop.params["jaxpr"].jaxpr, loop.params["num_consts"]
    barrier = next(equation for equation in body.eqns if equation.primitive.name == "optimization_barrier")
    assert set(body.invars[consts : consts + loop.params["num_carry"]]) <= set(barrier.invars)
    others = [name for equation in body.eqns if equation is not barrier for name in equation.invars]
    passed_by = [name for name in body.invars if any(name is other for other in others)]
    assert all(name.aval.shape == () for name in passed_by), passed_by  # the key, but no weights and no rows
