"""Bytes and seconds of collectives, counted by hand, and by moving every byte of a small one."""

import pytest

from llm_jax.parallel import hardware, links
from llm_jax.parallel.links import Collective

A800, SLOW, V5P = hardware.target("a800x1024"), hardware.target("a800x1024", cards=1), hardware.target("v5p-2048")
SIZES = {"replica": 2, "data": 64, "tensor": 8}


def of(kind, size, members, in_host, axes=("data",)):
    return Collective(kind, axes, size, members, in_host)


def test_a_gather_brings_every_byte_into_a_host_once():
    """Each of 16 devices, 4 in each of 4 hosts, begins with a sixteenth; what it lacks comes by one of two ways."""
    members, per_host, size = 16, 4, 1600.0
    fast, slow = links.received(of("all-gather", size, members, per_host))
    outside = size * 12 / 16  # of a host
    assert slow == outside / per_host  # shared among its devices
    assert fast == size * 3 / 4  # all but what the device has brought into the host itself: its own, and its share
    assert fast + slow == pytest.approx(size * 15 / 16)


def test_other_kinds():
    assert links.received(of("reduce-scatter", 800.0, 8, 8)) == (700.0, 0.0)
    assert links.received(of("all-reduce", 800.0, 8, 8)) == (1400.0, 0.0)
    assert links.received(of("all-to-all", 1600.0, 16, 4)) == (300.0, 1200.0)
    assert links.received(of("collective-permute", 10.0, 2, 1)) == (0.0, 10.0)
    assert links.received(of("all-gather", 800.0, 1, 1)) == (0.0, 0.0)


def test_tensor_parallel_by_data_parallel_costs_the_network_what_data_parallel_alone_does():
    """A weight of 1 GB over 1,024 devices; and an eighth of it over the 128 hosts, by one card each."""
    whole = links.seconds(of("all-gather", 1e9, 1024, 8), A800)
    part = links.seconds(of("all-gather", 1e9 / 8, 128, 1), A800)
    assert whole.slow == pytest.approx(1e9 * 127 / 128 / 200e9)
    assert part.slow == pytest.approx(whole.slow)
    assert part.fast == 0.0


def test_one_card_for_a_host_is_shared_by_its_devices():
    fast, slow = links.seconds(of("all-gather", 1e9, 1024, 8), SLOW)
    assert slow == pytest.approx(1e9 * 127 / 128 / 25e9)
    assert fast == pytest.approx(1e9 * 7 / 8 / 200e9)


def test_a_torus_has_all_its_links_for_all_its_chips_only():
    assert links.seconds(of("all-gather", 1e9, 1024, 4), V5P).fast == pytest.approx(1e9 * 1023 / 1024 / 600e9)
    assert links.seconds(of("all-gather", 1e9, 256, 1), V5P).fast == pytest.approx(1e9 * 255 / 256 / 400e9)
    assert links.seconds(of("all-gather", 1e9, 4, 4, ("tensor",)), V5P).fast == pytest.approx(1e9 * 3 / 4 / 200e9)


@pytest.mark.parametrize(
    ("sizes", "axes", "expected"),
    [
        (SIZES, ("tensor",), 8),
        (SIZES, ("data",), 1),
        (SIZES, ("data", "tensor"), 8),
        ({"replica": 128, "data": 8, "tensor": 1}, ("data",), 8),
        ({"replica": 128, "data": 8, "tensor": 1}, ("replica",), 1),
        ({"replica": 64, "data": 4, "tensor": 4}, ("data",), 2),
        ({"replica": 64, "data": 4, "tensor": 4}, ("replica", "data"), 2),
        ({"replica": 4, "data": 1, "tensor": 1}, ("replica",), 4),
    ],
)
def test_members_in_a_host_are_those_that_lie_side_by_side(sizes, axes, expected):
    assert links.in_host(sizes, axes, 8) == expected
    assert expected == _count_in_host(sizes, axes, 8)


def _count_in_host(sizes, axes, host_devices):
    """Enumerates the devices of the first host, and keeps those of the first group."""
    replicas, shares, tensor = sizes.values()
    found = 0
    for i in range(min(host_devices, replicas * shares * tensor)):
        place = {"replica": i // (shares * tensor), "data": i // tensor % shares, "tensor": i % tensor}
        found += all(place[axis] == 0 for axis in sizes if axis not in axes)
    return found


def test_bounds_of_a_step():
    gather = of("all-gather", 1e9, 1024, 8)._replace(count=10.0)
    reduce = of("all-reduce", 1e9, 8, 8, ("tensor",))._replace(count=4.0)
    bounds = links.bounds([gather, reduce], 312e12 * 0.5, 312e12 * 0.4, A800)
    gather_slow, gather_fast = 10 * 127 / 128 / 200, 10 * 7 / 8 / 200
    reduce_fast = 4 * 2 * 7 / 8 / 200
    assert (bounds.compute, bounds.useful) == (0.5, 0.4)
    assert bounds.slow == pytest.approx(gather_slow)
    assert bounds.fast == pytest.approx(gather_fast + reduce_fast)
    assert bounds.serial == pytest.approx(0.5 + gather_slow + reduce_fast)
    assert bounds.overlapped == 0.5
    assert bounds.utilisation == pytest.approx((0.4 / bounds.serial, 0.8))
    assert bounds.limit == "compute"
    assert links.bounds([gather._replace(count=200.0)], 1.0, 1.0, A800).limit == "network between hosts"
