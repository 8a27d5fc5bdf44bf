"""Build the device mesh: `tensor` inside a host, `data` across the hosts of a group, `replica` across groups.

Processes are numbered along the network (`topology.py`), and slices of a TPU one after the other, so that the mesh's
data axes, which follow the processes, have neighbours in the network next to each other, and groups of hosts are
runs of them. Without a tensor axis, a TPU's data axes follow its torus instead (x, then y, then z): only over devices
in that order does libtpu gather and sum by all links of a torus. The rows of a process are then not next to each other
in the batch (`shares.own_rows`).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from llm_jax.config import MeshConfig
from llm_jax.errors import UserError, require

AXES = ("replica", "data", "tensor")
# Meshes (replica, data, tensor) that plans prefer for models of a size (`plan.best`): 4M tokens a step, in sequences of
# 4,096, on hosts of 8 A800 of 80 GB. With more replicas than one, weights are to be gathered by "group".
KNOWN_GOOD: dict[str, dict[int, tuple[int, int, int]]] = {
    "2b": {1: (1, 1, 1), 8: (1, 8, 1), 64: (1, 64, 1), 512: (1, 512, 1), 1024: (1, 1024, 1), 2048: (1, 1024, 2)},
    "7b": {8: (1, 8, 1), 64: (1, 64, 1), 512: (1, 512, 1), 1024: (1, 1024, 1), 2048: (1, 1024, 2)},
    "13b": {8: (1, 8, 1), 64: (1, 64, 1), 512: (1, 512, 1), 1024: (1, 1024, 1), 2048: (1, 1024, 2)},
    "34b": {64: (8, 4, 2), 512: (8, 64, 1), 1024: (1, 1024, 1), 2048: (1, 1024, 2)},
    "70b": {64: (1, 64, 1), 512: (8, 64, 1), 1024: (8, 128, 1), 2048: (128, 8, 2)},
}
# The chips of a TPU's host, by their coordinates in blocks of 2 x 2, as a ring of neighbours.
RING = {(0, 0): 0, (1, 0): 1, (1, 1): 2, (0, 1): 3}


def _known(size: str, device_count: int) -> tuple[int, int, int]:
    near = min(KNOWN_GOOD[size], key=lambda count: abs(math.log2(count / device_count)))
    mesh = KNOWN_GOOD[size][near]
    require(
        near == device_count,
        f"no mesh is known for {size} models on {device_count} devices (MeshConfig.known); the nearest is that for "
        f"{near}: replica={mesh[0]} x data={mesh[1]} x tensor={mesh[2]}",
    )
    return mesh


def shape(config: MeshConfig, device_count: int) -> tuple[int, int, int]:
    """The (replica, data, tensor) sizes of a mesh over `device_count` devices.

    Raises `UserError`, naming the nearest mesh that there is, when the sizes do not multiply to the device count.
    """
    if config.known:
        return _known(config.known, device_count)
    others = config.replica * config.tensor
    data = config.data if config.data > 0 else device_count // others
    if data * others == device_count:
        return config.replica, data, config.tensor
    tensor = max(t for t in range(1, min(config.tensor, device_count) + 1) if device_count % t == 0)
    raise UserError(
        f"mesh replica={config.replica} x data={config.data} x tensor={config.tensor} does not cover the "
        f"{device_count} devices; the nearest that does is replica=1 x data={device_count // tensor} x tensor={tensor}"
    )


def build(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all of them by default), with the tensor axis within each host."""
    devices = jax.devices() if devices is None else devices
    return Mesh(grid(config, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def grid(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array [replica, data, tensor]."""
    sizes = shape(config, len(devices))
    per_host = len(devices) // len({device.process_index for device in devices})
    require(
        per_host % sizes[2] == 0,
        f"mesh tensor={sizes[2]} does not divide the {per_host} devices of a host; choose a divisor of {per_host}",
    )
    is_torus = all(hasattr(device, "coords") for device in devices)
    order = _along_torus if is_torus and sizes[2] == 1 else _along_hosts
    return np.array(sorted(devices, key=order)).reshape(sizes)


def of_this_process(mesh: Mesh) -> Mesh:
    """This process's part of a mesh, whose devices need not be neighbours in the whole, with its tensor axis."""
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    own = [group for group in groups if group[0].process_index == jax.process_index()]
    return Mesh(np.array(own)[None], mesh.axis_names, axis_types=mesh.axis_types)


def follows_processes(mesh: Mesh) -> bool:
    """Whether each process's rows of a batch lie next to each other."""
    owners = [device.process_index for device in mesh.devices.flat]
    return owners == sorted(owners)


def _along_torus(device: Any) -> tuple[int, ...]:
    """What a device comes after: other slices, and chips of smaller z, then y, then x."""
    return getattr(device, "slice_index", 0) or 0, *reversed(device.coords), getattr(device, "core_on_chip", 0)


def _along_hosts(device: Any) -> tuple[int, ...]:
    """What a device comes after: other slices, other processes, and chips that are before it in the ring."""
    coordinates = getattr(device, "coords", None)
    ring: tuple[int, ...] = ()
    if coordinates is not None:
        x, y, *rest = coordinates
        ring = (*rest, x // 2, y // 2, RING[x % 2, y % 2], getattr(device, "core_on_chip", 0))
    return getattr(device, "slice_index", 0) or 0, device.process_index, *ring, device.id
