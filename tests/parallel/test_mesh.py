"""Meshes that fit, and what is said of those that do not."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from llm_jax import models
from llm_jax.config import KNOWN_SIZES, LayerGroup, MeshConfig
from llm_jax.errors import UserError
from llm_jax.models import presets
from llm_jax.parallel import costs, hardware, rules
from llm_jax.parallel import mesh as mesh_lib


def test_data_takes_the_devices_that_are_left():
    mesh = mesh_lib.build(MeshConfig(replica=2, data=-1, tensor=2))
    assert dict(mesh.shape) == {"replica": 2, "data": 2, "tensor": 2}
    assert len({device.id for device in mesh.devices.flat}) == 8


def test_tensor_axis_is_innermost():
    mesh = mesh_lib.build(MeshConfig(data=2, tensor=4))
    assert [device.id for device in mesh.devices[0, 0]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "config", [MeshConfig(data=3), MeshConfig(tensor=3), MeshConfig(replica=16), MeshConfig(data=4, tensor=4)], ids=str
)
def test_a_mesh_that_does_not_fit_names_one_that_does(config):
    with pytest.raises(UserError, match=r"8 devices; the nearest that does is replica=1 x data=\d x tensor=\d"):
        mesh_lib.build(config)


class _Device:
    def __init__(self, process_index, index=0, **attributes):
        self.process_index = process_index
        self.id = index
        self.platform = "cpu"
        vars(self).update(attributes)


def test_tensor_axis_must_fit_in_a_host():
    devices = [_Device(process) for process in (0, 0, 1, 1, 2, 2, 3, 3)]
    with pytest.raises(UserError, match="tensor=4 does not divide the 2 devices of a host"):
        mesh_lib.build(MeshConfig(tensor=4), devices)


def test_hosts_come_in_order_and_a_tensor_group_never_crosses_them():
    """Devices may be listed along a torus, crossing hosts; rows of the batch go by host."""
    devices = [_Device(process, 2 * process + place) for place in (0, 1) for process in (3, 1, 0, 2)]
    grid = mesh_lib.grid(MeshConfig(replica=2, tensor=2), devices)
    assert [[d.process_index for d in group] for group in grid.reshape(4, 2)] == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_devices_can_be_named():
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:1])
    assert mesh.size == 1


def test_a_tensor_group_of_a_tpu_is_a_ring_of_neighbours():
    """Hosts of 2 x 2 chips of a torus 4 x 4 x 2, numbered along x as the runtime does, their chips row by row."""
    devices = [
        _Device(x // 2 + 2 * (y // 2) + 4 * z, x + 4 * y + 16 * z, coords=[x, y, z])
        for z in range(2)
        for y in range(4)
        for x in range(4)
    ]
    for tensor in (2, 4):
        for group in mesh_lib.grid(MeshConfig(tensor=tensor), devices).reshape(-1, tensor):
            assert len({device.process_index for device in group}) == 1
            for one, other in zip(group, np.roll(group, 1)):
                assert sum(abs(a - b) for a, b in zip(one.coords, other.coords)) == 1


@pytest.mark.parametrize("replica", [1, 2])
def test_the_data_axes_of_a_tpu_follow_its_torus(replica):
    devices = [
        _Device(0, 100 - x - 4 * y - 16 * z, coords=[x, y, z]) for x in range(4) for z in range(2) for y in range(4)
    ]
    grid = mesh_lib.grid(MeshConfig(replica=replica), devices)
    assert grid.shape == (replica, 32 // replica, 1)
    assert [device.coords for device in grid.flat] == [[n % 4, n // 4 % 4, n // 16] for n in range(32)]


def test_replicas_are_the_slices_of_a_job():
    devices = [_Device(2 * place + piece, place, slice_index=piece) for place in range(4) for piece in range(2)]
    grid = mesh_lib.grid(MeshConfig(replica=2), devices)
    assert [{device.slice_index for device in replica.flat} for replica in grid] == [{0}, {1}]


PRESETS = {"2b": "qwen_1_8b", "7b": "llama2_7b", "13b": "llama2_13b", "34b": "llama2_34b", "70b": "llama2_70b"}


@pytest.mark.parametrize("size", KNOWN_SIZES)
def test_known_meshes_hold_their_models(size):
    """By the estimate of their memory, a sequence at a time, with the least kept for the backward pass."""
    model = dataclasses.replace(presets.get(PRESETS[size]), compute_dtype="bfloat16", max_length=4096)
    for count, sizes in mesh_lib.KNOWN_GOOD[size].items():
        assert mesh_lib.shape(MeshConfig(known=size), count) == sizes and np.prod(sizes) == count
        group = LayerGroup(model.num_layers, "group" if sizes[0] > 1 else "layer", "full")
        work = costs.Workload(1024, 4096, 1024 // (sizes[0] * sizes[1]))
        executed = dataclasses.replace(model, groups=(group,))
        mesh = AbstractMesh(sizes, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 3)
        rules.shardings(models.logical_axes(executed), models.abstract(executed), mesh)  # refuses what does not divide
        named = dict(zip(mesh_lib.AXES, sizes))
        assert costs.estimate(executed, named, hardware.target(f"a800x{count}"), work).fits, count


def test_where_no_mesh_is_known_the_nearest_is_named():
    with pytest.raises(UserError, match=r"no mesh is known for 70b models on 8 devices .* for 64: replica=1 x data=64"):
        mesh_lib.build(MeshConfig(known="70b"))
    with pytest.raises(UserError, match="did you mean '7b'"):
        MeshConfig(known="7bb")
