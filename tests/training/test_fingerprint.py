"""Fingerprints: the formula over single elements, the same on every mesh, another for every change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.config import MeshConfig
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training.fingerprint import MULTIPLIER, differing, fingerprints

ARRAY = np.arange(-40, 40, dtype=np.float32).reshape(8, 2, 5) / 7


def expected(array: np.ndarray) -> int:
    bits = array.reshape(-1).view(f"uint{8 * array.dtype.itemsize}")
    return sum(int(b) * ((2 * i * MULTIPLIER) | 1) for i, b in enumerate(bits.tolist())) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_the_formula_on_every_mesh(dtype):
    array = np.asarray(jnp.asarray(ARRAY).astype(dtype))
    want = {"x": (expected(array), dtype)}
    assert fingerprints({"x": jnp.asarray(array)}) == want
    for sizes, spec in (((1, 8, 1), ("data",)), ((2, 2, 2), (("replica", "data"), "tensor")), ((1, 2, 4), ("tensor",))):
        sharding = NamedSharding(mesh_lib.build(MeshConfig(*sizes)), PartitionSpec(*spec))
        assert fingerprints({"x": jax.device_put(array, sharding)}) == want


def test_every_single_bit_counts():
    want = fingerprints({"x": jnp.asarray(ARRAY)})
    for place in (0, 17, 79):
        for bit in (0, 13, 31):
            changed = ARRAY.copy()
            changed.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
            assert differing({"x": jnp.asarray(changed)}, want) == ["x"]
    assert differing({"x": jnp.asarray(ARRAY[::-1])}, want) == ["x"]
    assert differing({"y": jnp.asarray(ARRAY)}, want) == ["y"]
    assert differing({"x": jnp.asarray(ARRAY)}, want) == []


def test_arrays_that_became_wider_are_still_known():
    half = jnp.asarray(ARRAY).astype("bfloat16")
    want = fingerprints({"x": half})
    assert differing({"x": half.astype("float32")}, want) == []
    assert differing({"x": half.astype("float32").at[0, 0, 0].add(1)}, want) == ["x"]
    assert differing({"x": half.astype("float8_e4m3fn")}, want) == []  # cannot be told
