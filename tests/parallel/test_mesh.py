"""Meshes that fit, and what is said of those that do not."""

import jax
import pytest

from llm_jax.config import MeshConfig
from llm_jax.errors import UserError
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
    def __init__(self, process_index, index=0):
        self.process_index = process_index
        self.id = index
        self.platform = "cpu"


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
