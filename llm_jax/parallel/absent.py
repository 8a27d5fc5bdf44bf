"""Accelerators that are not here, to compile for: how XLA is told what they are, and what its compilers need."""

import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.errors import require

# What the compilers for NVIDIA's GPUs need beside the plugin itself: folder under nvidia/, wheel, what is read from it.
GPU_WHEELS = (
    ("cuda_nvcc", "nvidia-cuda-nvcc-cu12", "bin/ptxas"),
    ("cuda_nvrtc", "nvidia-cuda-nvrtc-cu12", "lib"),
    ("nvjitlink", "nvidia-nvjitlink-cu12", "lib"),
    ("cuda_runtime", "nvidia-cuda-runtime-cu12", "lib"),
)


class Target(NamedTuple):
    """A device. Bytes, cycles and counts are of one GPU, or of one core of a TPU."""

    name: str  # as on the command line
    platform: str  # "gpu" or "tpu"
    title: str  # what the device calls itself
    topology: str  # of the fewest devices there are
    device: dict[str, Any]  # a GPU's properties, by the names of XLA's GpuDeviceInfo
    compute: tuple[int, int] = (0, 0)  # a GPU's compute capability
    warp_slots: int = 64  # warps that may live on a multiprocessor at once
    block_slots: int = 32  # and thread blocks
    matrix_units: int = 0  # of a TPU core, each taking one row of 128 a cycle
    accelerator_type: str = ""  # of a TPU
    megacore: bool = False  # a TPU's two cores are one device

    @property
    def architecture(self) -> str:
        """What ptxas calls the GPU; kernels for Hopper use instructions of that generation alone ("a")."""
        major, minor = self.compute
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def _gpu(**properties: Any) -> dict[str, Any]:
    """A data-centre GPU's properties: what all of them share, and what differs."""
    shared = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
    }
    return shared | properties


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="a100",  # and the A800, which differs in its links only
            platform="gpu",
            title="NVIDIA A100-SXM4-80GB",
            topology="1x1x1",
            compute=(8, 0),
            device=_gpu(
                shared_memory_per_core=167936,
                shared_memory_per_block_optin=166912,
                core_count=108,
                fpus_per_core=64,
                memory_bandwidth=2039040000000,
                l2_cache_size=41943040,
                clock_rate_ghz=1.41,
                device_memory_size=85100068864,
            ),
        ),
        Target(
            name="h100",
            platform="gpu",
            title="NVIDIA H100 80GB HBM3",
            topology="1x1x1",
            compute=(9, 0),
            device=_gpu(
                shared_memory_per_core=233472,
                shared_memory_per_block_optin=232448,
                core_count=132,
                fpus_per_core=128,
                memory_bandwidth=3352320000000,
                l2_cache_size=52428800,
                clock_rate_ghz=1.98,
                device_memory_size=84942979072,
            ),
        ),
        Target("v5p", "tpu", "TPU v5", "v5:2x2x1", {}, matrix_units=4, accelerator_type="v5p-8", megacore=True),
        Target("v5e", "tpu", "TPU v5 lite", "v5e:2x2x1", {}, matrix_units=4, accelerator_type="v5litepod-4"),
    )
}


def description(target: Target) -> str:
    """The GPU as a GpuTargetConfigProto in text format, what XLA takes in place of a device."""
    major, minor = target.compute
    extension = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}"
    properties = " ".join(f"{name}: {value}" for name, value in target.device.items())
    return (
        f"gpu_device_info {{ {properties} {capability} }} "
        'platform_name: "CUDA" runtime_version { major: 12 minor: 8 } dnn_version_info { major: 9 minor: 10 } '
        f'device_description_str: "{target.title}"'
    )


def devices(target: Target, topology: str = "") -> list[Any]:
    """Absent devices, to lower and compile for. Only in a process that started with `environment(target)`.

    Args:
      target: what they are.
      topology: their number and order: "SLICESxHOSTSxGPUS", or a TPU's torus as "8x8x16", whose ends are joined where
        it is four chips long; "" = the fewest there are.
    """
    import jax

    # A CPU is all that this process may run on: nothing looks for a driver.
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    if target.platform == "tpu":
        return _tpus(topologies, target, topology)
    importlib.import_module("jax_cuda12_plugin")
    topology = topology or target.topology
    described = topologies.get_topology_desc(
        topology, platform="cuda", target_config=description(target), topology=topology
    )
    return list(described.devices)


def _tpus(topologies: Any, target: Target, topology: str) -> list[Any]:
    if not topology:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=target.topology).devices)
    sizes = [int(size) for size in topology.split("x")]
    sizes += [1] * (3 - len(sizes))  # a torus of two axes lies in one plane
    described = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{target.topology.partition(':')[0]}:{'x'.join(map(str, sizes))}",
        chips_per_host_bounds=(2, 2, 1),
        num_slices=1,
        wrap=tuple(size % 4 == 0 for size in sizes),
        **({"chip_config_name": "megacore"} if target.megacore else {}),
    )
    return list(described.devices)


def environment(target: Target, dump: Path | None = None) -> dict[str, str]:
    """The variables that a process must be started with to compile for `target`, and to write what it made to `dump`.

    Raises `UserError` if a wheel is missing: which, and how to get it.
    """
    variables = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    if target.platform == "tpu":
        _require_module("libtpu", "libtpu")
        return variables | {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": target.accelerator_type,
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise a second process stops at libtpu's lock file
            **({"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"} if dump else {}),
        }
    _require_module("jax_cuda12_plugin", "jax-cuda12-plugin and jax-cuda12-pjrt")
    folders = gpu_folders()
    compiler = folders["cuda_nvcc"]
    libraries = [str(folders[name] / "lib") for name in ("cuda_nvrtc", "nvjitlink", "cuda_runtime")]
    return variables | {
        "PATH": os.pathsep.join([str(compiler / "bin"), os.environ.get("PATH", "")]),
        "CUDA_DIR": str(compiler),
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
        "XLA_FLAGS": f"--xla_dump_to={dump} --xla_dump_hlo_as_text" if dump else "",
        **({"MOSAIC_GPU_DUMP_TO": str(dump)} if dump else {}),
    }


def gpu_folders() -> dict[str, Path]:
    """Where the wheels of `GPU_WHEELS` lie in this environment."""
    root = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    for folder, wheel, needed in GPU_WHEELS:
        _require((root / folder / needed).exists(), wheel)
    return {folder: root / folder for folder, _, _ in GPU_WHEELS}


def _require_module(module: str, wheel: str) -> None:
    _require(importlib.util.find_spec(module) is not None, wheel)


def _require(present: bool, wheel: str) -> None:
    require(present, f"{wheel} is not installed: `make aot` makes an environment that has it, .venv-aot")
