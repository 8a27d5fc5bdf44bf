"""A number for each array of a tree, by which a state that was written is known again when it is read.

The number depends on every bit of the array and on where it stands, and not on how the array is laid out: it is a sum
modulo 2^32, to which each device adds its own shard. So what one mesh has written another can check, in the time that
reading the arrays takes. Any change within one element changes the number, as it multiplies that by an odd number.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.parallel import shares

MULTIPLIER = 0x9E3779B1  # 2^32 over the golden ratio, odd: neighbouring places get far weights
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
HALVES = ("bfloat16", "float16")  # which float32 holds exactly

Fingerprints = dict[str, tuple[int, str]]  # by an array's path: its number, and the dtype that it had


def fingerprints(tree: Any) -> Fingerprints:
    """The fingerprint of every array of a tree; every process that has a part of it must call this."""
    return {path: (_number(x, x.dtype), x.dtype.name) for path, x in _arrays(tree).items()}


def differing(tree: Any, noted: Fingerprints) -> list[str]:
    """The paths of a tree's arrays that are not those whose fingerprints were noted.

    Half-precision arrays may have become float32 since; of one that has become narrower nothing can be said.
    """
    arrays = {
        path: (x, *noted.get(path, (-1, x.dtype.name)))
        for path, x in _arrays(tree).items()
        if path not in noted or noted[path][1] in (x.dtype.name, *(HALVES if x.dtype == jnp.float32 else ()))
    }
    return [path for path, (x, number, dtype) in arrays.items() if _number(x, jnp.dtype(dtype)) != number]


def _arrays(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.block_until_ready(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def _number(x: jax.Array, dtype: jnp.dtype) -> int:
    return int(shares.settled(_sum(x, dtype)))


@functools.partial(jax.jit, static_argnums=1)
def _sum(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    x = x.astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, UNSIGNED[dtype.itemsize])
    place, stride = jnp.zeros(x.shape, jnp.uint32), 2 * MULTIPLIER
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(x.astype(jnp.uint32) * (place | 1), dtype=jnp.uint32)
