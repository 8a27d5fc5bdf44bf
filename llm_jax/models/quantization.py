"""Weight-only quantisation of a whole model: matrices and tables get few bits, norms and biases stay float.

Which weights these are, and along which dimensions they share scales, the layers state with `quantized.initializer`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config import QUANTIZATIONS, ModelConfig
from llm_jax.errors import require
from llm_jax.models import decoder, heads
from llm_jax.models.quantized import PackedArray, Quantized, dequantize, quantize_array
from llm_jax.parallel import rules

DEFAULT_GROUPS = {"int8": 0, "int4": 32}  # docs/quantization.md has what they cost


def quantize(
    params: Any, config: ModelConfig, kind: str, group: int | None = None, *, donate: bool = False
) -> tuple[ModelConfig, Any]:
    """The same model with quantised weights, one leaf after the other, layer by layer, in the layout of the mesh.

    Args:
      params: float parameters, as from `init`: with layers on a leading axis.
      config: theirs.
      kind: "int8" or "int4".
      group: at most how many of a matrix's input features share a scale, 0 = all; None = the kind's default.
      donate: free each float weight as soon as it is quantised.

    Returns:
      The configuration that describes the new parameters, and the parameters.

    Raises:
      UserError: an unknown kind, an unsuitable group, or parameters that are quantised already.
    """
    kinds = ", ".join(QUANTIZATIONS[1:])
    require(kind in QUANTIZATIONS[1:], f"quantize={kind!r} is not one of {kinds}")
    require(config.quantization == "none", f"the model's weights are {config.quantization} already: load its original")
    require(decoder.is_stacked(params), "quantize the parameters before they are laid out for decoding")
    group = DEFAULT_GROUPS[kind] if group is None else group
    config = dataclasses.replace(config, quantization=kind, quantization_group=group)
    target, axes = decoder.abstract(config), decoder.logical_axes(config)
    structure: Any
    flat, structure = jax.tree_util.tree_flatten_with_path(target, is_leaf=_is_quantized)
    weights, layouts = structure.flatten_up_to(params), structure.flatten_up_to(_layout(params, axes, target))
    for i, ((path, wanted), layout) in enumerate(zip(flat, layouts)):
        if isinstance(wanted, Quantized):
            stacked, norm_head = path[0].key == "layers", config.norm_head and path[0].key == "head"
            weight, weights[i] = weights[i], _quantize_leaf(weights[i], wanted, layout, stacked, norm_head)
            if donate:
                weight.delete()
    return config, jax.tree.unflatten(structure, weights)


def weight_bytes(params: Any) -> int:
    """Bytes of all parameters, on all devices together."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _layout(params: Any, axes: Any, target: Any) -> Any:
    """The sharding of every new parameter on the mesh of the old ones; None for all where they are on no mesh."""
    mesh = getattr(jax.tree.leaves(params)[0].sharding, "mesh", None)
    if mesh is not None:
        return rules.shardings(axes, target, mesh)
    return jax.tree.map(lambda _: None, target)


def _quantize_leaf(weight: jax.Array, wanted: Quantized, layout: Any, stacked: bool, norm_head: bool) -> Quantized:
    """A weight in the form of `wanted`, one layer at a time where layers are stacked."""
    packed_axis = wanted.axis if isinstance(wanted, PackedArray) else None
    tiles = [size // scales for size, scales in zip(weight.shape, wanted.scale.shape)]

    def quantize(weight: jax.Array) -> Quantized:
        if stacked:
            return jax.lax.map(lambda layer: quantize_array(layer, tiles[1:], packed_axis), weight)
        array = quantize_array(weight, tiles, packed_axis)
        return _with_unit_rows(array) if norm_head else array

    return jax.jit(quantize, out_shardings=layout)(weight)


def _with_unit_rows(table_VD: Quantized) -> Quantized:
    """The table with its rows' L2 norms divided out of the scales, as NormHead divides them out of the rows."""
    norms_V1 = jnp.sqrt(jnp.sum(jnp.square(dequantize(table_VD)), axis=1, keepdims=True))
    return dataclasses.replace(table_VD, scale=table_VD.scale / jnp.maximum(norms_V1, heads.NORM_HEAD_EPS))
