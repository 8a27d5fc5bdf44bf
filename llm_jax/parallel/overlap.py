"""What XLA must be told, on each platform, so that collectives run under compute.

The weights of a layer are gathered in the loop over layers, so by itself nothing of layer l + 1 starts before layer l
has ended. On GPUs the compiler can move a gather one turn ahead (`pipelined`), and its scheduler can start and await
collectives at different places (`latency_hiding`); both are off by default, and each of the other options below makes
up for a default that would undo them. A TPU waits for every collective, unless its SparseCores take it. docs/log.md
has what each was worth in the compiled program.
"""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.config import ModelConfig
from llm_jax.scaling import flops

# In bytes of a device's shard: norms' gradients travel together, a matrix's alone, as soon as it is there.
SMALL_SHARD = 16 * 1024
# Collectives that may be under way at once: all of a layer's gradients, and the next layer's weights.
IN_FLIGHT = 16

GPU: dict[str, bool | int] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": SMALL_SHARD,
    "xla_gpu_experimental_parallel_collective_overlap_limit": IN_FLIGHT,
}
# By its SparseCores, which leave the TensorCore to compute; in rings over all three axes of the torus, for which parts
# of a sum are filled up with zeros.
TPU: dict[str, bool | int] = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_reduce_scatter_padding": True,
}
SPARSE_CORES = ("TPU v5", "TPU v5p")  # kinds of devices that have them


def compiler_options(mesh: Mesh, model: ModelConfig) -> dict[str, Any]:
    """Options for `jax.jit(..., compiler_options=...)` or `Lowered.compile`; {} where nothing moves between devices."""
    device = mesh.devices.flat[0]
    if mesh.size == 1 or device.platform not in ("gpu", "tpu"):
        return {}
    if device.platform == "tpu":
        return dict(TPU) if device.device_kind in SPARSE_CORES else {}
    return GPU | {"xla_gpu_all_gather_combine_threshold_bytes": _layer_bytes(mesh, model)}


def _layer_bytes(mesh: Mesh, model: ModelConfig) -> int:
    """Of a layer's weights as a device computes with them: they are gathered together, but no two layers' are."""
    parameters = (flops.count(model).non_embedding - model.hidden_size) // model.num_layers
    return parameters * jnp.dtype(model.compute_dtype).itemsize // mesh.shape["tensor"]
