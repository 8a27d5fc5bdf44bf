"""Targets by name: how many devices of which kind, how they are arranged, and which names are refused."""

import types

import pytest

from llm_jax.errors import UserError
from llm_jax.parallel import absent, hardware


@pytest.mark.parametrize("topology", ["4x4", "4x4x1"])
def test_a_torus_of_two_axes_may_be_named_by_two(topology, monkeypatch):
    """As the runtime names them; its description takes three."""
    described = []
    topologies = types.SimpleNamespace(
        get_topology_desc=lambda **given: (described.append(given), types.SimpleNamespace(devices=[]))[1]
    )
    absent._tpus(topologies, absent.TARGETS["v5e"], topology)
    assert described[0]["topology_name"] == "v5e:4x4x1" and described[0]["wrap"] == (True, True, False)


@pytest.mark.parametrize(
    ("name", "devices", "topology"),
    [
        ("a800x1024", 1024, "1x128x8"),
        ("h100x512", 512, "1x64x8"),
        ("a800x4", 4, "1x1x4"),
        ("v5p-2048", 1024, "8x8x16"),  # named by its cores, two on a chip
        ("v5p-1024", 512, "8x8x8"),
        ("v5px1024", 1024, "8x8x16"),
        ("v5p-64", 32, "2x4x4"),
        ("v5p-8", 4, "2x2x1"),
        ("v5e-256", 256, "16x16x1"),
    ],
)
def test_targets(name, devices, topology):
    target = hardware.target(name)
    assert (target.devices, target.topology) == (devices, topology)
    assert target.hardware.chip in absent.TARGETS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a900x1024", "did you mean 'a800x1024'"),
        ("h10x512", "did you mean 'h100x512'"),
        ("v5px", "did you mean 'v5px"),
        ("a800-1024", "did you mean 'a800x1024'"),  # only slices of TPUs count cores
        ("a800x12", "12 devices are not whole hosts of 8; the nearest number is 16"),
        ("v5px1000", "a power of two of chips; the nearest has 512"),
        ("", "unknown target ''"),
    ],
)
def test_what_there_is_not(name, message):
    with pytest.raises(UserError, match=message):
        hardware.target(name)


def test_hosts_may_have_fewer_network_cards():
    assert hardware.target("a800x1024").hardware.network_share == 25e9
    assert hardware.target("a800x1024", cards=1).hardware.network_share == 25e9 / 8
    with pytest.raises(UserError, match="no network cards"):
        hardware.target("v5px64", cards=1)


def test_peaks_are_found_by_what_devices_call_themselves():
    assert hardware.peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert hardware.peak_of("TPU v5 lite") == 197e12
    assert hardware.peak_of("a calculator") is None
