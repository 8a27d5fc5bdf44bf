"""From logical axes to mesh axes: the table and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

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
