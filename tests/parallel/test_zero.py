"""When weights are made whole: the same numbers whatever is chosen, and gradients that come back to their shards."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llm_jax import models
from llm_jax.config import (
    DataConfig,
    LayerGroup,
    LossConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    from_config_dict,
    to_config_dict,
)
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import rules, zero
from llm_jax.training import language_model, step
from llm_jax.training.loop import place
from tests.golden import make_collectives

MESH = mesh_lib.build(MeshConfig(data=2, tensor=4))
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    ffn_size=48,
    max_length=16,
    qkv_bias=True,
    init_std=0.1,
)
GROUPS = {
    "step": (LayerGroup(3, "step"),),
    "group": (LayerGroup(3, "group", "full"),),
    "mixed": (LayerGroup(1, "step", "dots"), LayerGroup(1, "group", "save_attention"), LayerGroup(1, "layer")),
    "offloaded": (LayerGroup(1, "layer", "full", True), LayerGroup(2, "layer", "dots", True)),
}
MESHES = {"1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2), "4x2x1": (4, 2, 1)}


def batch():
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (16, 17)).astype(np.int32)
    shape = tokens[:, 1:].shape
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), shape)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, np.float32), np.ones(shape, np.int32), positions)


def gradients_of(model, mesh_sizes, microbatches=1):
    """The loss and the gradients of one batch."""
    mesh = mesh_lib.build(MeshConfig(*mesh_sizes), jax.devices()[: int(np.prod(mesh_sizes))])
    shardings = rules.shardings(models.logical_axes(model), models.abstract(model), mesh)
    params = jax.jit(lambda key: models.init(model, key), out_shardings=shardings)(jax.random.key(0))
    loss_fn = language_model.loss_function(model, LossConfig(chunk_size=5))

    def gradients(params, batch):
        once = functools.partial(models.gather_once, config=model)
        result, output = step.sum_gradients(loss_fn, params, batch, jax.random.key(1), microbatches, once=once)
        return output.total, result

    with jax.set_mesh(mesh):
        return jax.jit(gradients)(params, place(batch(), mesh))


@pytest.fixture(scope="module")
def alone():
    return gradients_of(MODEL, (1, 1, 1))


@pytest.mark.parametrize("mesh_sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_every_choice_gives_one_devices_loss_and_gradients(groups, mesh_sizes, alone):
    tables = {"gather_tables": groups[0].gather}
    loss, gradients = gradients_of(dataclasses.replace(MODEL, groups=groups, **tables), mesh_sizes, microbatches=2)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(alone[1])):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-4, err_msg=jax.tree_util.keystr(path))
        assert got.dtype == jnp.float32


@pytest.mark.parametrize("sublanes", [2, 5])
@pytest.mark.parametrize("mesh_sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_sums_over_a_torus_are_the_same_in_rows_of_a_tile(mesh_sizes, sublanes, alone, monkeypatch):
    """Every projection's and the head's; with a tensor axis only the head's."""
    monkeypatch.setattr(zero, "_is_torus", lambda mesh: mesh.size > 1)
    monkeypatch.setattr(zero, "SUBLANES", sublanes)
    monkeypatch.setattr(zero, "LANES", 4)
    scatter, scattered = jax.lax.psum_scatter, []
    monkeypatch.setattr(jax.lax, "psum_scatter", lambda x, *a, **k: (scattered.append(x.shape), scatter(x, *a, **k))[1])
    model = dataclasses.replace(MODEL, groups=(LayerGroup(3, "step"),), gather_tables="step")
    loss, gradients = gradients_of(model, mesh_sizes)
    sizes = [32 * 8 * 4] * 2 + [32 * 4 * 4] * 2 + [32 * 48] * 3 + [64 * 32]
    tensor, devices = mesh_sizes[2], mesh_sizes[0] * mesh_sizes[1]
    tiles = [
        -(-size // devices // (4 * sublanes)) * devices for size in (sizes if tensor == 1 else [64 * 32 // tensor])
    ]
    assert sorted(scattered) == sorted((count * sublanes, 4) for count in tiles)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(alone[1])):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-4, err_msg=jax.tree_util.keystr(path))


def test_groups_are_part_of_a_config_and_of_no_checkpoint():
    model = dataclasses.replace(MODEL, groups=GROUPS["mixed"], gather_tables="step")
    config = TrainConfig(model=model, data=DataConfig(sequence_length=16))
    assert from_config_dict(TrainConfig, to_config_dict(config)) == config
    assert model.architecture() == MODEL.architecture()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: dataclasses.replace(MODEL, groups=(LayerGroup(2),)), "groups hold 2 layers, num_layers=3"),
        (lambda: LayerGroup(2, "steps"), "LayerGroup.gather='steps' is not one of layer, step, group; did you mean"),
        (lambda: LayerGroup(2, offload=True), "LayerGroup.offload moves what remat keeps to the host: choose"),
    ],
    ids=["layers", "gather", "offload"],
)
def test_groups_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        change()


@pytest.mark.parametrize("plan", make_collectives.PLANS)
def test_the_collectives_are_those_that_the_plan_promises(plan):
    """As the golden file says; and what is gathered once a step, as large as the parameters, whatever is gathered."""
    found = make_collectives.collectives(plan)
    assert found == json.loads(make_collectives.PATH.read_text())[plan]
    parameters = models.count_parameters(make_collectives.MODEL) - make_collectives.MODEL.hidden_size  # the last norm's
    if plan == "step 2x4x1":
        used = json.loads(make_collectives.PATH.read_text())["group 2x4x1"]["all-gather over replica, data"][1]
        assert found["all-gather over replica, data"][1] - used == 4 * parameters
    if plan == "group 2x4x1":
        assert found["all-gather over replica"][1] == 4 * parameters / 4


def test_gather_casts_on_the_shard():
    """The narrow array is pinned to its shard, then gathered. (The CPU back end widens bf16 collectives.)"""
    axes = ("embed", "ffn")
    sharded = NamedSharding(MESH, rules.partition_spec(axes))
    weight = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharded)
    with jax.set_mesh(MESH):
        text = jax.jit(lambda w: zero.gather(w, axes, jnp.dtype("bfloat16"))).lower(weight).as_text()
    constraints = re.findall(r"sharding_constraint %\w+ <@\w+, \[(.*?)\]> : tensor<8x16x(\w+)>", text)
    assert constraints == [('{"replica", "data"}, {"tensor"}', "bf16"), ('{}, {"tensor"}', "bf16")]


def test_gather_returns_gradients_to_their_shard_and_dtype():
    axes = ("embed", "ffn")
    sharded = NamedSharding(MESH, rules.partition_spec(axes))
    weight = jax.device_put(jax.random.normal(jax.random.key(0), (8, 16)), sharded)

    def loss(weight, x):
        gathered = zero.gather(weight, axes, jnp.dtype("bfloat16"))
        assert gathered.dtype == jnp.bfloat16
        return jnp.sum(jnp.square(x @ gathered), dtype=jnp.float32)

    x = jnp.ones((4, 8), jnp.bfloat16)
    with jax.set_mesh(MESH):
        gradient = jax.jit(jax.grad(loss))(weight, x)
    assert gradient.sharding.is_equivalent_to(sharded, 2)
    assert gradient.dtype == jnp.float32
    want = jax.grad(lambda w: jnp.sum(jnp.square(x.astype(jnp.float32) @ w)))(weight)
    np.testing.assert_allclose(gradient, want, rtol=0.05, atol=0.1)
