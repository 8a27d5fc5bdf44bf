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
from llm_jax.models.linear import Adapted


def for_decoding(params: Any, config: ModelConfig, *, donate: bool = False) -> tuple[ModelConfig, Any]:
    """The same model with its layers apart and, unless a mesh divides the heads, with fewer and larger products.

    "layers" becomes a tuple with one tree for each layer; query, key and value become one projection, and so do gate
    and up. The head is stored as [D, V], with NormHead's division done once. Every function of a model takes either
    layout. Float or quantised parameters serve.

    Args:
      params: the parameters, with layers on a leading axis.
      config: theirs.
      donate: free what is laid out anew, as this goes.

    Returns:
      The configuration with which to use the new parameters, and the parameters. They are for use, not for saving.
    """
    require(decoder.is_stacked(params), "the parameters are laid out for decoding already")
    adapted = any(map(_is_adapted, jax.tree.leaves(params, is_leaf=_is_adapted)))
    require(not adapted, "merge a model's adapters (models.lora.merge) before it is laid out for decoding")
    require(config.output == "logits", "a reward model is not laid out for decoding: it generates nothing")
    config, params = decoder.without_mup(params, config)  # of which a part goes by norm_head
    mesh = getattr(jax.tree.leaves(params)[0].sharding, "mesh", None)
    if mesh is not None and mesh.shape.get("tensor", 1) > 1:
        return config, {**params, "layers": _unstack(params["layers"], donate)}
    params = {**params, "layers": _unstack(_fuse(params["layers"], donate), donate)}
    if not config.tie_embeddings and config.quantization == "none":
        params["head"] = _transpose_head(params, config, donate)
        config = dataclasses.replace(config, norm_head=False)
    return dataclasses.replace(config, decoding_layout=True), params


def _is_adapted(leaf: Any) -> bool:
    return isinstance(leaf, Adapted)


def _transpose_head(params: Any, config: ModelConfig, donate: bool) -> Any:
    """The head's matrix as [D, V] in the parameters' dtype; in the compute dtype where it is normalised."""
    dtype = config.compute_dtype if config.norm_head else config.param_dtype
    kernel_DV = jnp.asarray(heads.unembedding(params, dataclasses.replace(config, compute_dtype=dtype)).T)
    if donate:
        jax.block_until_ready(kernel_DV)
        _free(params["head"])
    return {"kernel": kernel_DV}


def _fuse(layers: Any, donate: bool) -> Any:
    """Stacked layers with the projections of the same input as one, along their heads or features."""
    attention, ffn = dict(layers["attention"]), dict(layers["ffn"])
    attention["query_key_value"] = _join([attention.pop(name) for name in ("query", "key", "value")], -2, donate)
    ffn["gate_up"] = _join([ffn.pop(name) for name in ("gate", "up")], -1, donate)
    return {**layers, "attention": attention, "ffn": ffn}


def _join(projections: list[Any], axis: int, donate: bool) -> Any:
    """Kernels and biases, or their quantised values and scales, end to end."""
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis), *projections)
    if donate:
        jax.block_until_ready(joined)
        _free(projections)
    return joined


def _unstack(stacked: Any, donate: bool) -> tuple[Any, ...]:
    """One tree for each layer, from one stack after the other."""
    leaves, structure = jax.tree.flatten(stacked)
    split = []
    for leaf in leaves:
        split.append(jax.block_until_ready([leaf[i] for i in range(leaf.shape[0])]))
        if donate:
            leaf.delete()
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*split))


def _free(arrays: Any) -> None:
    for leaf in jax.tree.leaves(arrays):
        leaf.delete()
