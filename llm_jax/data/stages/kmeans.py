"""k-means of vectors of length 1 by their cosine (Dhillon and Modha, 2001), spread over the devices of a mesh.

Legend: N vectors, E dimensions, K clusters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax.data.embeddings import normalised

Floats = npt.NDArray[np.float32]
CHUNK = 4096  # vectors of a device compared with all centroids at once
ROWS = PartitionSpec(("replica", "data", "tensor"))


def fit(vectors_NE: Floats, clusters: int, iterations: int, seed: int, mesh: Mesh) -> Floats:
    """The centroids float32 [K, E], of length 1, after k-means++ (Arthur and Vassilvitskii, 2007) and Lloyd's steps.

    There are at most N of them. An empty cluster begins anew at the vector that is least like its own centroid.
    """
    clusters = min(clusters, len(vectors_NE))
    centroids = seeds(vectors_NE, clusters, seed)
    placed, weights = _place(vectors_NE, mesh)
    for _ in range(iterations):
        sums, counts, similarity = (np.array(part) for part in _step(placed, weights, centroids, mesh))
        empty = np.flatnonzero(counts == 0)
        sums[empty] = vectors_NE[np.argsort(similarity[: len(vectors_NE)], kind="stable")[: len(empty)]]
        centroids = normalised(sums)
    return centroids


def assign(vectors_NE: Floats, centroids_KE: Floats) -> npt.NDArray[np.int32]:
    """The cluster with the nearest centroid, the first of several, int32 [N]."""
    return (vectors_NE @ centroids_KE.T).argmax(axis=1).astype(np.int32)


def seeds(vectors_NE: Floats, clusters: int, seed: int) -> Floats:
    """The first centroids: each a vector, drawn in proportion to its squared distance from those before."""
    generator = np.random.default_rng(seed)
    chosen = [int(generator.integers(len(vectors_NE)))] if clusters else []
    nearest = np.full(len(vectors_NE), 2.0)
    while len(chosen) < clusters:
        distance = np.maximum(2 - 2 * (vectors_NE @ vectors_NE[chosen[-1]]).astype(np.float64), 0)
        nearest = np.minimum(nearest, distance)
        nearest[chosen[-1]] = 0
        total = np.cumsum(nearest)
        free = generator.random() * total[-1] if total[-1] > 0 else 0.0
        chosen.append(min(int(np.searchsorted(total, free, side="right")), len(vectors_NE) - 1))
    return vectors_NE[chosen]


def _place(vectors_NE: Floats, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """The vectors on the mesh, a share on each device, and weights that are 0 for what fills the shares up."""
    missing = -len(vectors_NE) % mesh.size
    filled = np.pad(vectors_NE, ((0, missing), (0, 0)))
    weights = np.pad(np.ones(len(vectors_NE), np.float32), (0, missing))
    sharding = NamedSharding(mesh, ROWS)
    return jax.device_put(filled, sharding), jax.device_put(weights, sharding)


@functools.partial(jax.jit, static_argnames="mesh")
def _step(
    vectors_NE: jax.Array, weights_N: jax.Array, centroids_KE: jax.Array, mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum and number of each cluster's vectors, and how alike each vector is to its centroid."""

    def of_device(vectors_NE: jax.Array, weights_N: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def nearest(vector_E: jax.Array) -> tuple[jax.Array, jax.Array]:
            similarity_K = centroids_KE @ vector_E
            return jnp.argmax(similarity_K), jnp.max(similarity_K)

        cluster_N, similarity_N = jax.lax.map(nearest, vectors_NE, batch_size=CHUNK)
        count = len(centroids_KE)
        sums_KE = jax.ops.segment_sum(vectors_NE * weights_N[:, None], cluster_N, count)
        counts_K = jax.ops.segment_sum(weights_N, cluster_N, count)
        return *jax.lax.psum((sums_KE, counts_K), mesh.axis_names), similarity_N

    whole = PartitionSpec()
    return jax.shard_map(of_device, mesh=mesh, in_specs=(ROWS, ROWS), out_specs=(whole, whole, ROWS))(
        vectors_NE, weights_N
    )
