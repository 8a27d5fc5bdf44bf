"""What functions of the logits share that never hold those of a whole batch: chunks, and parts of them on a mesh.

Inside `jax.shard_map` a device holds its part of the batch and of the vocabulary; without a mesh its parts are all.

Legend: B batch, T length, D model, C chunk, R = B * C rows, X chunks, V vocabulary (a device's part of it).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax.errors import require
from llm_jax.parallel.rules import RULES
from llm_jax.parallel.zero import scattered_sum


class Parts(NamedTuple):
    """The mesh axes over which a device holds only a part of an array's dimension; () without a mesh."""

    batch: tuple[str, ...]
    vocabulary: tuple[str, ...]
    features: tuple[str, ...]  # D of the unembedding's gradient, as the parameter's own; () where they do not divide it

    @property
    def gradients(self) -> tuple[P, P]:
        """How the gradients of hidden states [B,T,D] and unembedding [V,D] lie."""
        return P(self.batch), P(self.vocabulary, self.features or None)


def mesh_parts(hidden_BTD: jax.Array, unembedding_VD: jax.Array) -> Parts:
    """The axes of the mesh in context. Raises `UserError` where they are missing or do not divide the sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return Parts((), (), ())
    (batch_size, _, D), vocab_size, sizes = hidden_BTD.shape, unembedding_VD.shape[0], dict(mesh.shape)
    parts = Parts(RULES["batch"], RULES["vocab"], RULES["embed"])
    missing = [axis for axis in parts.batch + parts.vocabulary if axis not in sizes]
    require(not missing, f"loss: the mesh has axes {', '.join(sizes)}, but none named {', '.join(missing)}")
    for name, size, axes in (("batch", batch_size, parts.batch), ("vocabulary", vocab_size, parts.vocabulary)):
        ways = math.prod(sizes[axis] for axis in axes)
        where = " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
        require(size % ways == 0, f"loss: a {name} of {size} does not divide by the mesh's {where}")
    divides = D % math.prod(sizes[axis] for axis in parts.features) == 0
    return parts if divides else parts._replace(features=())


def split(x_BT: jax.Array, C: int) -> jax.Array:
    """[B,T,...] to [X,R,...]; a last chunk that is not full is padded with zeros."""
    B, T, *rest = x_BT.shape
    if T % C:
        x_BT = jnp.pad(x_BT, [(0, 0), (0, -T % C)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x_BT.reshape(B, -1, C, *rest), 1, 0).reshape(-1, B * C, *rest)


def join(x_XR: jax.Array, B: int, T: int) -> jax.Array:
    """[X,R,...] back to [B,T,...], without what `split` padded."""
    X, R, *rest = x_XR.shape
    return jnp.moveaxis(x_XR.reshape(X, B, R // B, *rest), 0, 1).reshape(B, -1, *rest)[:, :T]


def sum_gradient(dunembedding_VD: jax.Array, parts: Parts) -> jax.Array:
    """The gradient of the unembedding over the whole batch, each device's share of its features."""
    if not parts.features:
        return jax.lax.psum(dunembedding_VD, parts.batch)
    return scattered_sum(dunembedding_VD, 1, parts.batch)


def first_entry(vocab_size: int, parts: Parts) -> jax.Array | int:
    """The index, in the whole vocabulary, of the first of this device's entries."""
    return jax.lax.axis_index(parts.vocabulary) * vocab_size if parts.vocabulary else 0


def pick(logits_RV: jax.Array, targets_R: jax.Array) -> jax.Array:
    """Each row's logit at its target, 0 where the target is not among this device's entries."""
    V = logits_RV.shape[1]
    picked_R = jnp.take_along_axis(logits_RV, jnp.clip(targets_R, 0, V - 1)[:, None], axis=1)[:, 0]
    return jnp.where((targets_R >= 0) & (targets_R < V), picked_R, 0.0)


def matmul(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """`jnp.einsum` with float32 accumulation and result."""
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
