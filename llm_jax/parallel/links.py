"""What collectives move over which links, and the bounds of a step's time that follow from it.

A group of n devices with k of them in each of h hosts gathers or reduce-scatters an array of S bytes in a hierarchy:
each byte enters a host once, by the network cards of the k devices, so a device takes S (h - 1) / (h k) from the
network and S (k - 1) / k from its host. Both parts flow at once, so the slower one is the collective's time. An
all-reduce is a reduce-scatter and an all-gather. On a torus a group of all devices uses all of its axes; otherwise
`tensor` has one of them, and the data-parallel axes have the others. Latency is left out, so these are bounds: no step
is faster.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from llm_jax.parallel.hardware import Target

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """A collective of a step, on every group of devices along some mesh axes at once."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which the members of a group differ
    size: float  # bytes: gathered, the array's whole; reduced, each device's whole summand; else what a device sends
    members: int  # devices in a group
    in_host: int  # of them in one host
    count: float = 1.0  # type: ignore[assignment]  # times in a step; of a tuple, nobody counts anything here
    what: str = ""  # of which arrays


class Traffic(NamedTuple):
    """Bytes or seconds of a device's links inside its host (of a torus: all links), and of the network."""

    fast: float
    slow: float


def in_host(sizes: Mapping[str, int], axes: Iterable[str], host_devices: int) -> int:
    """How many devices of a host a group along `axes` has, where hosts lie along the last axes of the mesh."""
    left, members = host_devices, 1
    for axis in reversed(list(sizes)):
        here = math.gcd(sizes[axis], left)
        members *= here if axis in axes else 1
        left //= here
    return members


def received(collective: Collective) -> Traffic:
    """Bytes that each device takes in, in one collective."""
    kind, _, size, n, k, *_ = collective
    if n == 1:
        return Traffic(0.0, 0.0)
    if kind == "collective-permute":
        return Traffic(size, 0.0) if k > 1 else Traffic(0.0, size)
    if kind == "all-to-all":
        return Traffic(size * (k - 1) / n, size * (n - k) / n)
    hosts = n / k
    passes = 2 if kind == "all-reduce" else 1
    return Traffic(passes * size * (k - 1) / k, passes * size * (hosts - 1) / (hosts * k))


def seconds(collective: Collective, target: Target) -> Traffic:
    """How long one collective keeps the links busy."""
    fast, slow = received(collective)
    hardware = target.hardware
    if not hardware.torus_axes:
        return Traffic(fast / hardware.link, slow / hardware.network_share)
    axes = hardware.torus_axes
    if collective.members < target.devices:
        axes = 1 if collective.axes == ("tensor",) else axes - 1
    return Traffic((fast + slow) / (hardware.link * axes / hardware.torus_axes), 0.0)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds that a step takes at least."""

    compute: float  # all FLOPs at the peak
    fast: float  # all traffic inside hosts
    slow: float  # all traffic between hosts
    collectives: float  # each at the pace of the link that limits it, one after the other; and what goes to the host
    useful: float  # the model's own FLOPs at the peak: what utilisation counts

    @property
    def serial(self) -> float:
        """Without any overlap."""
        return self.compute + self.collectives

    @property
    def overlapped(self) -> float:
        """With all communication under compute, as far as the links allow."""
        return max(self.compute, self.fast, self.slow)

    @property
    def halfway(self) -> float:
        """With half of the overlap that there may be: what plans are ranked by."""
        return (self.serial + self.overlapped) / 2

    @property
    def utilisation(self) -> tuple[float, float]:
        """Bounds of the model FLOPs utilisation: without overlap, and with all of it."""
        return self.useful / self.serial, self.useful / self.overlapped

    @property
    def limit(self) -> str:
        """What a step with perfect overlap waits for."""
        parts = {"compute": self.compute, "links inside hosts": self.fast, "network between hosts": self.slow}
        return max(parts, key=lambda name: parts[name])


def bounds(collectives: Iterable[Collective], flops: float, useful_flops: float, target: Target) -> Bounds:
    """Bounds of a step in which a device computes `flops`, of which `useful_flops` are the model's."""
    times = [(collective.count, seconds(collective, target)) for collective in collectives]
    return Bounds(
        compute=flops / target.hardware.peak_flops,
        fast=sum(count * time.fast for count, time in times),
        slow=sum(count * time.slow for count, time in times),
        collectives=sum(count * max(time) for count, time in times),
        useful=useful_flops / target.hardware.peak_flops,
    )
