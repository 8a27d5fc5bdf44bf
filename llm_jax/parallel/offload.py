"""Parameters that wait in the host's memory while they are not used."""

from typing import Any

import jax

HOST, DEVICE = "pinned_host", "device"


def to_host(params: Any) -> Any:
    """The same arrays in the host's memory; those given stay."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)), params)


def fetch(params: Any) -> Any:
    """Parameters where they can be computed with; what is fetched from the host is freed with the result."""

    def one(x: jax.Array) -> jax.Array:
        return jax.device_put(x, x.sharding.with_memory_kind(DEVICE)) if is_on_host(x) else x

    return jax.tree.map(one, params)


def is_on_host(params: Any) -> bool:
    """Whether any array is one of `to_host`."""
    return any(leaf.sharding.memory_kind == HOST for leaf in jax.tree.leaves(params))
