"""The kernels where they are used: in the decoder's scan, under remat, vmap and grad, in the donated step on a mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from llm_jax import models
from llm_jax.config import (
    ATTENTION_IMPLEMENTATIONS,
    REMAT_POLICIES,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
)
from llm_jax.data.batch import Batch
from llm_jax.kernels.attention import IMPLEMENTATIONS
from llm_jax.models import decoder
from llm_jax.optim import adamw, schedules
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import rules
from llm_jax.training import language_model, state, step
from llm_jax.training.loop import place
from tests.kernels.forms import small_tiles

# ALiBi, grouped heads, a window per layer (so a traced one), packed texts: all that a training step can ask for.
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_size=48,
    max_length=24,
    position="alibi",
    window_sizes=(9, 0),
    init_std=0.1,
    remat="save_attention",
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, schedule="constant", eps=1e-5)
ROWS, LENGTH = 4, 24


def batch(dtype=np.int32):
    """Two packed texts a row and some padding."""
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (ROWS, LENGTH + 1)).astype(dtype)
    segments = np.ones((ROWS, LENGTH), dtype)
    segments[:, 10:], segments[:, 21:] = 2, 0
    positions = np.broadcast_to(np.concatenate([np.arange(10), np.arange(14)]), (ROWS, LENGTH)).astype(dtype)
    return Batch(tokens[:, :-1], tokens[:, 1:], (segments > 0).astype(np.float32), segments, positions)


def loss_of(**changes):
    loss_fn = language_model.loss_function(dataclasses.replace(MODEL, **changes), LossConfig(chunk_size=24))
    return lambda params: loss_fn(params, batch(), jax.random.key(0)).total


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.max(np.abs(b)))


def test_the_config_names_what_there_is():
    assert ("auto", *IMPLEMENTATIONS) == ATTENTION_IMPLEMENTATIONS
    assert ("none", *decoder.REMAT_POLICIES) == REMAT_POLICIES


def steps(form):
    """The parameters after two donated steps on a mesh of four devices."""
    optimizer = adamw.build(OPTIMIZER, adamw.decay_mask)
    mesh = mesh_lib.build(MeshConfig(1, 2, 2), jax.devices()[:4])
    model = dataclasses.replace(MODEL, attention=form)
    current = state.init_state(model, optimizer, mesh, jax.random.key(3))
    loss_fn = language_model.loss_function(model, LossConfig(chunk_size=24))
    update = step.build(loss_fn, optimizer, schedules.learning_rate(OPTIMIZER, 2), seed=5)
    with jax.set_mesh(mesh), small_tiles():
        for _ in range(2):
            before = current
            current, _ = update(current, place(batch(), mesh))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    return jax.device_get(current.params)


def test_donated_steps_on_a_mesh_are_those_of_the_reference():
    assert_close(steps("pallas_gpu"), steps("reference"))


@pytest.mark.slow
def test_mapped_over_runs():
    """As sweeps train: the same step for several sets of parameters at once."""
    stacked = jax.vmap(functools.partial(models.init, MODEL))(jax.random.split(jax.random.key(1), 2))
    with small_tiles():
        actual = jax.jit(jax.vmap(jax.grad(loss_of(attention="pallas_gpu"))))(stacked)
    expected = jax.jit(jax.vmap(jax.grad(loss_of(attention="reference"))))(stacked)
    assert_close(actual, expected)


def absent(kind, platform):
    """A mesh of devices that are not here."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return AbstractMesh((1, 2, 2), mesh_lib.AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)


ABSENT = {"cuda": absent("NVIDIA A100-SXM4-80GB", "gpu"), "tpu": absent("TPU v5p", "tpu")}


def lowered_kernels(platform, remat):
    """The names of the kernels that a training step calls on a mesh of absent devices."""
    mesh = ABSENT[platform]
    model = dataclasses.replace(MODEL, head_dim=64, compute_dtype="bfloat16", remat=remat)
    optimizer = adamw.build(OPTIMIZER, adamw.decay_mask)
    loss_fn = language_model.loss_function(model, LossConfig(chunk_size=24))
    update = jax.jit(step.update_function(loss_fn, optimizer), donate_argnums=0)
    layout = NamedSharding(mesh, rules.partition_spec(("batch", None)))
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), batch())
    numbers = jnp.uint32(0), schedules.learning_rate(OPTIMIZER, 2)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = update.trace(state.abstract_state(model, optimizer, mesh), rows, *numbers)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = [
        line for line in text.splitlines() if "custom_call @" in line and re.search("triton|tpu_custom_call", line)
    ]
    return sorted(re.search(r'name = "(?:attention_)?(\w+?)(?:_kernel)?"', line).group(1) for line in calls)


GRADIENTS = ["key_gradients", "query_gradients"]


@pytest.mark.parametrize("platform", ABSENT)
def test_a_training_step_lowers_for_absent_devices_with_the_kernels_inside(platform):
    """And with the output and the log-sum-exp saved, the backward pass has no forward kernel in it."""
    assert lowered_kernels(platform, "save_attention") == ["forward", *GRADIENTS]


def test_full_remat_runs_the_forward_kernel_twice():
    assert lowered_kernels("cuda", "full") == ["forward", "forward", *GRADIENTS]
