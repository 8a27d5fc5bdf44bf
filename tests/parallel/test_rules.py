"""From logical axes to mesh axes: the table, its refusals, and the gather in front of every use of a parameter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import models
from llm_jax.config import MeshConfig, ModelConfig
from llm_jax.errors import UserError
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import rules

MESH = mesh_lib.build(MeshConfig(data=2, tensor=4))
SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4, ffn_size=48, max_length=16
)


def test_spec_follows_the_table():
    assert rules.partition_spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(
        None, ("replica", "data"), ("tensor",), None
    )


def test_collision_is_refused():
    with pytest.raises(UserError, match="twice"):
        rules.partition_spec(("heads", "ffn"))


def test_every_parameter_is_split_over_all_devices():
    abstract = models.abstract(SMALL)
    shardings = rules.shardings(models.logical_axes(SMALL), abstract, MESH)
    whole = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    shard = sum(
        np.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings))
    )
    # Only norms are split less than eight-fold: they have one axis, over the two data devices.
    assert whole / 8 <= shard < whole / 8 * 1.05


def test_indivisible_parameter_is_named():
    with pytest.raises(UserError, match=r"layers/attention/key/kernel: its 'kv_heads' axis of size 4 .* 8 devices"):
        mesh = mesh_lib.build(MeshConfig(tensor=8))
        rules.shardings(models.logical_axes(SMALL), models.abstract(SMALL), mesh)


def test_constrain_needs_no_mesh():
    x = jnp.ones((2, 3))
    assert rules.constrain(x, "batch", None) is x


def test_constrain_leaves_an_indivisible_sequence_whole():
    with jax.set_mesh(MESH):
        x = jax.jit(lambda x: rules.constrain(x, "batch", "sequence"))(jnp.ones((2, 3)))
        y = jax.jit(lambda x: rules.constrain(x, "batch", "sequence"))(jnp.ones((2, 8)))
    assert x.sharding.shard_shape(x.shape) == (1, 3)
    assert y.sharding.shard_shape(y.shape) == (1, 2)


def test_gather_casts_on_the_shard():
    """The narrow array is pinned to its shard, then gathered. (The CPU back end widens bf16 collectives.)"""
    axes = ("embed", "ffn")
    sharded = NamedSharding(MESH, rules.partition_spec(axes))
    weight = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharded)
    with jax.set_mesh(MESH):
        text = jax.jit(lambda w: rules.gather(w, axes, jnp.dtype("bfloat16"))).lower(weight).as_text()
    constraints = re.findall(r"sharding_constraint %\w+ <@\w+, \[(.*?)\]> : tensor<8x16x(\w+)>", text)
    assert constraints == [('{"replica", "data"}, {"tensor"}', "bf16"), ('{}, {"tensor"}', "bf16")]


def test_gather_returns_gradients_to_their_shard_and_dtype():
    axes = ("embed", "ffn")
    sharded = NamedSharding(MESH, rules.partition_spec(axes))
    weight = jax.device_put(jax.random.normal(jax.random.key(0), (8, 16)), sharded)

    def loss(weight, x):
        gathered = rules.gather(weight, axes, jnp.dtype("bfloat16"))
        assert gathered.dtype == jnp.bfloat16
        return jnp.sum(jnp.square(x @ gathered), dtype=jnp.float32)

    x = jnp.ones((4, 8), jnp.bfloat16)
    with jax.set_mesh(MESH):
        gradient = jax.jit(jax.grad(loss))(weight, x)
    assert gradient.sharding.is_equivalent_to(sharded, 2)
    assert gradient.dtype == jnp.float32
    want = jax.grad(lambda w: jnp.sum(jnp.square(x.astype(jnp.float32) @ w)))(weight)
    np.testing.assert_allclose(gradient, want, rtol=0.05, atol=0.1)
