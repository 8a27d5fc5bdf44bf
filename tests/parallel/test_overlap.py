"""Options for overlap: only where something moves, by what a layer's weights weigh; and what they do to a real step."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.config import DataConfig, LayerGroup, MeshConfig, ModelConfig, TrainConfig
from llm_jax.parallel import compiled, hardware, overlap
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import ahead_of_time

MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=1024,
    num_layers=16,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=2816,
    max_length=1024,
    compute_dtype="bfloat16",
)


def mesh_of(platform, device_kind="", **sizes):
    device = types.SimpleNamespace(platform=platform, device_kind=device_kind)
    devices = np.array([device] * int(np.prod(list(sizes.values()))))
    return types.SimpleNamespace(devices=devices, size=devices.size, shape=sizes)


def test_nothing_is_asked_where_nothing_moves():
    assert overlap.compiler_options(mesh_lib.build(MeshConfig()), MODEL) == {}
    assert overlap.compiler_options(mesh_of("gpu", replica=1, data=1, tensor=1), MODEL) == {}


@pytest.mark.parametrize("model", [MODEL, dataclasses.replace(MODEL, qkv_bias=True, num_kv_heads=2)], ids=["", "bias"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_exactly_a_layers_weights_are_gathered_together(tensor, model):
    options = overlap.compiler_options(mesh_of("gpu", replica=1, data=4, tensor=tensor), model)
    layers = sum(leaf.size for leaf in jax.tree.leaves(models.abstract(model)["layers"]))
    assert options["xla_gpu_all_gather_combine_threshold_bytes"] == 2 * layers // (model.num_layers * tensor)


def test_tpus_without_sparse_cores_are_not_asked_for_them():
    sizes = {"replica": 1, "data": 4, "tensor": 1}
    assert overlap.compiler_options(mesh_of("tpu", "TPU v5", **sizes), MODEL) == overlap.TPU
    assert overlap.compiler_options(mesh_of("tpu", "TPU v5 lite", **sizes), MODEL) == {}


@pytest.mark.slow
def test_a_step_for_absent_tpus_gathers_and_reduces_beside_compute(tmp_path):
    pytest.importorskip("libtpu", reason="the compiler for TPUs is not installed: `make aot`")
    model = dataclasses.replace(MODEL, groups=(LayerGroup(MODEL.num_layers, "layer", "dots"),))
    config = TrainConfig(model=model, mesh=MeshConfig(), data=DataConfig(sequence_length=1024, batch_size=128))
    answer = ahead_of_time.compile_for(config, hardware.target("v5px64"), tmp_path)
    step = compiled.read(answer.text, answer.sizes, answer.hosts, visible_keys=512.5)
    for kind in ("all-gather", "reduce-scatter"):
        found = [entry for entry in step.communication if entry.collective.kind == kind]
        assert sum(entry.collective.count for entry in found) >= 7 * MODEL.num_layers
        assert all(entry.is_async for entry in found)
    # What is summed whole are the norms' gradients.
    assert max(entry.size for entry in step.collectives if entry.kind == "all-reduce") <= 4 * 1024 * 2
    for line in answer.text.splitlines():
        assert '"core_count":"64"' not in line  # a ring over all chips uses a third of their links


@pytest.mark.slow
def test_a_step_for_absent_gpus_gathers_and_reduces_under_compute(tmp_path):
    pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is not installed: `make aot`")
    target = hardware.target("a800x16")
    model = dataclasses.replace(MODEL, groups=(LayerGroup(MODEL.num_layers, "layer", "dots"),))
    config = TrainConfig(model=model, mesh=MeshConfig(), data=DataConfig(sequence_length=1024, batch_size=64))
    answer = ahead_of_time.compile_for(config, target, tmp_path)
    step = compiled.read(answer.text, answer.sizes, answer.hosts, visible_keys=512.5)
    assert step.hidden_share("all-gather") >= 0.8
    assert step.hidden_share("reduce-scatter") >= 0.8
    # What is summed whole are scalars: every gradient comes as a shard.
    assert max(entry.size for entry in step.collectives if entry.kind == "all-reduce") < 1024


@pytest.mark.slow
def test_a_step_for_absent_gpus_holds_one_microbatch_at_a_time(tmp_path):
    pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is not installed: `make aot`")
    target = hardware.target("a800x16")
    model = dataclasses.replace(MODEL, groups=(LayerGroup(MODEL.num_layers, "layer", "dots"),))
    found = []
    for count in (1, 2):
        data = DataConfig(sequence_length=1024, batch_size=64 * count)
        config = TrainConfig(model=model, mesh=MeshConfig(), data=data, microbatches=count)
        found.append(ahead_of_time.compile_for(config, target, tmp_path / str(count)))
    gradients = found[0].arguments / 3  # what is added up, as large as the parameters, of which there are two moments
    assert found[1].temporaries < 1.1 * found[0].temporaries + gradients
