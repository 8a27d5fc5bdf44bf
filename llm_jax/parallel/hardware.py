"""Accelerators by the hundred: how fast they are, what they hold, and how they are connected.

A target such as `a800x1024` is a number of devices of a kind. Peaks, memory and links are the vendors' figures; bytes a
second are of one direction.
"""

import dataclasses
import difflib
import re

from llm_jax.errors import UserError, require

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets, by a part of JAX's `device_kind`; the first fits.
PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
GIB = 2.0**30
# JAX reserves three quarters of a GPU's memory unless it is told otherwise, and beyond 76 % XLA begins to compute
# things again to save memory; the libraries for the network want some too. A TPU's program may have nearly all.
GPU_SHARE, TPU_SHARE = 0.75, 0.9


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A kind of device, and how devices of it are connected."""

    name: str  # as in a target's name
    chip: str  # what the compilers are told that it is: a name in `absent.TARGETS`
    peak_flops: float  # dense bfloat16 FLOP/s
    memory: float  # bytes of a device
    usable: float  # the share of them that a plan may fill
    host_devices: int
    link: float  # bytes/s of a device to the others of its host: NVLink; of a TPU, to its torus, over all of its axes
    network: float = 0.0  # bytes/s of a network card; 0 = there is none, the links reach every device
    cards: int = 0  # network cards of a host
    torus_axes: int = 0  # of a TPU's links
    cores: int = 1  # of a device, by which the names of TPU slices count

    @property
    def network_share(self) -> float:
        """Bytes/s of a host's network for each of its devices, when all use it."""
        return self.network * self.cards / self.host_devices


def _gpu(name: str, chip: str, peak: str, memory: float, link: float, network: float) -> Hardware:
    return Hardware(name, chip, PEAK_FLOPS[peak], memory, GPU_SHARE, 8, link, network, cards=8)


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        # An A800 is an A100 with a third fewer NVLinks.
        _gpu("a800", "a100", "A800", 85e9, 200e9, 25e9),
        _gpu("a100", "a100", "A100", 85e9, 300e9, 25e9),
        _gpu("h100", "h100", "H100", 85e9, 450e9, 50e9),
        _gpu("h800", "h100", "H800", 85e9, 200e9, 50e9),
        Hardware("v5p", "v5p", PEAK_FLOPS["TPU v5p"], 95.74 * GIB, TPU_SHARE, 4, 600e9, torus_axes=3, cores=2),
        Hardware("v5e", "v5e", PEAK_FLOPS["TPU v5e"], 15.75 * GIB, TPU_SHARE, 4, 200e9, torus_axes=2),
    )
}
USUAL_COUNTS = tuple(2**power for power in range(3, 13))


@dataclasses.dataclass(frozen=True)
class Target:
    """So many devices of a kind."""

    name: str
    hardware: Hardware
    devices: int

    @property
    def topology(self) -> str:
        """Their arrangement, as `absent.devices` takes it: slices, hosts and GPUs, or a torus's sizes."""
        if not self.hardware.torus_axes:
            per_host = min(self.devices, self.hardware.host_devices)
            return f"1x{self.devices // per_host}x{per_host}"
        sizes = [1] * 3
        while (size := sizes[0] * sizes[1] * sizes[2]) < self.devices:  # the shortest side doubles, the last first
            sides = range(self.hardware.torus_axes)
            shortest = min(sides, key=lambda side: (sizes[side], side if size < self.hardware.host_devices else -side))
            sizes[shortest] *= 2
        return "x".join(map(str, sizes))


def target(name: str, cards: int = 0) -> Target:
    """The target called `KINDxDEVICES`, or a TPU slice by its own name `KIND-CORES`, such as v5p-2048 with 1,024 chips.

    Args:
      name: such as `a800x1024`.
      cards: network cards of a host; 0 = one for each device.

    Raises `UserError`, naming the nearest target, for one that does not exist.
    """
    match = re.fullmatch(r"(\w+?)(x|-)([1-9]\d*)", name)
    hardware = HARDWARE.get(match[1]) if match else None
    if match is None or hardware is None or (match[2] == "-" and not hardware.torus_axes):
        known = [f"{kind}x{count}" for kind in HARDWARE for count in USUAL_COUNTS]
        known += [f"{kind}-{count}" for kind, found in HARDWARE.items() if found.torus_axes for count in USUAL_COUNTS]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown target {name!r}; did you mean {near!r}? (kinds: {', '.join(HARDWARE)})")
    count = int(match[3])
    devices = count if match[2] == "x" else count // hardware.cores
    _check_count(name, hardware, devices)
    if cards:
        require(hardware.network > 0, f"target {name!r} has no network cards: its links reach every device")
        hardware = dataclasses.replace(hardware, cards=cards)
    return Target(name, hardware, devices)


def _check_count(name: str, hardware: Hardware, devices: int) -> None:
    per_host = hardware.host_devices
    if hardware.torus_axes:
        nearest = max(per_host, 2 ** (devices.bit_length() - 1) if devices else 0)
        require(devices == nearest, f"target {name!r}: a slice has a power of two of chips; the nearest has {nearest}")
    nearest = max(1, round(devices / per_host)) * per_host
    require(
        devices % per_host == 0 or per_host % devices == 0,
        f"target {name!r}: {devices} devices are not whole hosts of {per_host}; the nearest number is {nearest}",
    )


def peak_of(device_kind: str) -> float | None:
    """FLOP/s of one device by its own name, dense bfloat16; None for one that is not in the table."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if kind in device_kind), None)
