"""Parameters in the layout that decodes fastest.

A decoding step is bound by reading the weights once. A scan takes each layer's weights out of their stack first, which
costs about as much as using them, and small products cost more in starting than in reading.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config import ModelConfig
from llm_jax.errors import require
from llm_jax.models import decoder, heads


def for_decoding(params: Any, config: ModelConfig, *, donate: bool = False) -> tuple[ModelConfig, Any]:
    """The same model with its layers apart and, unless a mesh divides the heads, with fewer and larger products.

    "layers" becomes a tuple with one tree for each layer; query, key and value become one projection, and so do gate
    and up. The head is stored as [D, V], with NormHead's division done once. Every function of a model takes either
    layout. Float or quantised parameters serve.

    Args:
      params: the parameters, with layers on a leading axis.
      config: theirs.
      donate: free what is laid out anew, stack by stack.

    Returns:
      The configuration that describes the new parameters, and the parameters.
    """
    require(decoder.is_stacked(params), "the parameters are laid out for decoding already")
    layers = _unstack(params["layers"], donate)
    mesh = getattr(jax.tree.leaves(params)[0].sharding, "mesh", None)
    if mesh is not None and mesh.shape.get("tensor", 1) > 1:
        return config, {**params, "layers": layers}
    params = {**params, "layers": tuple(_fuse(layer) for layer in layers)}
    if not config.tie_embeddings and config.quantization == "none":
        params["head"] = {"kernel": _head(params, config)}
        config = dataclasses.replace(config, norm_head=False)
    return dataclasses.replace(config, decoding_layout=True), params


def _head(params: Any, config: ModelConfig) -> jax.Array:
    """The head's matrix [D, V] in the parameters' dtype; in float32 where it is normalised."""
    dtype = "float32" if config.norm_head else config.param_dtype
    return jnp.asarray(heads.unembedding(params, dataclasses.replace(config, compute_dtype=dtype)).T)


def _unstack(stacked: Any, donate: bool) -> tuple[Any, ...]:
    """One tree for each layer, from one stack after the other."""
    leaves, structure = jax.tree.flatten(stacked)
    split = []
    for leaf in leaves:
        split.append(jax.block_until_ready([leaf[i] for i in range(leaf.shape[0])]))
        if donate:
            leaf.delete()
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*split))


def _fuse(layer: Any) -> Any:
    """A layer with the projections of the same input as one, along their heads or features."""
    attention, ffn = dict(layer["attention"]), dict(layer["ffn"])
    attention["query_key_value"] = _join([attention.pop(name) for name in ("query", "key", "value")], axis=-2)
    ffn["gate_up"] = _join([ffn.pop(name) for name in ("gate", "up")], axis=-1)
    return {**layer, "attention": attention, "ffn": ffn}


def _join(projections: list[Any], axis: int) -> Any:
    """Kernels and biases, or their quantised values and scales, end to end."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis), *projections)
