"""Parameters built on their devices, in their final sharding, from tensors that arrive a block of rows at a time.

Memory on the host beside the parameters themselves: a block for each core on a CPU, whose arrays are filled in place;
one tensor for other devices, which take the stacked layers one by one.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.config import ModelConfig
from llm_jax.training.checkpoint import placed

ALIGNMENT = 64  # bytes; JAX takes a CPU array over as it is only if it is aligned to this

Region: TypeAlias = tuple[slice, ...]
Regions: TypeAlias = Mapping[Any, Region]  # by device


class Source(Protocol):
    """One layer of a parameter, or all of one that is not stacked."""

    def blocks(self) -> Iterator[tuple[Region, np.ndarray]]:
        """Its values in blocks, each with the region of the parameter that it fills."""


def place(config: ModelConfig, sources: Mapping[str, Sequence[Source]], mesh: Mesh | None) -> Any:
    """The parameters of `config`, in its `param_dtype`, from the sources of each one.

    Args:
      config: the model.
      sources: by a parameter's path, such as "layers/ffn/up/kernel": a source for each layer, or a single one where
        the parameter is not stacked.
      mesh: where the parameters go, sharded by their logical axes; None = the default device.
    """

    def one(path: jax.tree_util.KeyPath, array: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return _parameter(array, sources[name], stacked=name.startswith("layers/"))

    return jax.tree_util.tree_map_with_path(one, placed(config, mesh))


def _parameter(array: jax.ShapeDtypeStruct, sources: Sequence[Source], stacked: bool) -> jax.Array:
    """One sharded parameter, of which this process makes the shards of its own devices."""
    regions = {
        device: tuple(slice(*s.indices(size)[:2]) for s, size in zip(index or (), array.shape))
        for device, index in array.sharding.addressable_devices_indices_map(array.shape).items()
    }
    if not stacked:
        shards = _fill_in_place(regions, sources, array.dtype)
    else:  # no device has layers of its own
        regions = {device: region[1:] for device, region in regions.items()}
        fill = _fill_in_place if takes_over_host_memory() else _fill_by_layers
        shards = fill(regions, sources, array.dtype, (len(sources),))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def takes_over_host_memory() -> bool:
    """Whether devices use the host's arrays as they are, without a copy."""
    return jax.local_devices()[0].platform == "cpu"


def _fill_in_place(
    regions: Regions, sources: Sequence[Source], dtype: np.dtype, layers: tuple[int, ...] = ()
) -> list[jax.Array]:
    """Every device's part, [*layers, *its region], in host memory that a CPU's array then takes over."""
    buffers = [_aligned((*layers, *_extent(region)), dtype) for region in regions.values()]
    parts = [[buffer[layer] for buffer in buffers] for layer in range(*layers)] if layers else [buffers]
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_fill, sources, itertools.repeat(list(regions.values())), parts))
    return [jax.device_put(buffer, device) for buffer, device in zip(buffers, regions)]


def _fill_by_layers(
    regions: Regions, sources: Sequence[Source], dtype: np.dtype, layers: tuple[int, ...]
) -> list[jax.Array]:
    """Every device's part, [*layers, *its region], in which a layer at a time is written on the device."""
    shards = [jnp.zeros((*layers, *_extent(region)), dtype, device=device) for device, region in regions.items()]
    for layer, source in enumerate(sources):
        parts = [np.empty(_extent(region), dtype) for region in regions.values()]
        _fill(source, list(regions.values()), parts)
        for i, device in enumerate(regions):
            shards[i] = _set_layer(shards[i], jax.device_put(parts[i], device), layer)
        jax.block_until_ready(shards)  # the parts are freed before the next layer's are made
    return shards


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer, index, 0)


def _fill(source: Source, regions: Sequence[Region], buffers: Sequence[np.ndarray]) -> None:
    """Write a source's blocks to the part of it that each buffer holds."""
    for filled, block in source.blocks():
        for region, buffer in zip(regions, buffers):
            inside = [_overlap(a, b) for a, b in zip(filled, region)]
            if all(s.start < s.stop for s in inside):
                np.copyto(_bits(buffer[_shift(inside, region)]), _bits(block[_shift(inside, filled)]))


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as integers: numpy copies its own types faster than bfloat16."""
    return array.view(f"u{array.itemsize}")


def _overlap(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _shift(inside: Sequence[slice], origin: Region) -> Region:
    """The region counted from the start of another one."""
    return tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(inside, origin))


def _extent(region: Region) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in region)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX need not copy to a CPU device."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
