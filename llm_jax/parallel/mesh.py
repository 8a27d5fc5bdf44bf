"""Build the device mesh: `tensor` inside a host, `data` across the hosts of a group, `replica` across groups."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from llm_jax.config import MeshConfig
from llm_jax.errors import UserError, require

AXES = ("replica", "data", "tensor")


def shape(config: MeshConfig, device_count: int) -> tuple[int, int, int]:
    """The (replica, data, tensor) sizes of a mesh over `device_count` devices.

    Raises `UserError`, naming the nearest mesh that fits, when the sizes do not multiply to the device count.
    """
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
        per_host % config.tensor == 0,
        f"mesh tensor={config.tensor} does not divide the {per_host} devices of a host; choose a divisor of {per_host}",
    )
    # In the order of hosts, so that a host's rows of the global batch are those of its place along the data axes.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return np.array(ordered).reshape(sizes)
