"""Weight-only quantisation of a whole model: matrices and tables get few bits, norms and biases stay float.

Which weights these are, and along which dimensions they share scales, the layers state with `quantized.initializer`.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config import QUANTIZATIONS, ModelConfig
from llm_jax.errors import require
from llm_jax.models import decoder, heads, quantized
from llm_jax.models.quantized import PackedArray, Quantized, is_quantized, quantize_array
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
    target = decoder.abstract(config)
    structure: Any
    flat, structure = jax.tree_util.tree_flatten_with_path(target, is_leaf=is_quantized)
    weights, layouts = structure.flatten_up_to(params), itertools.repeat(None)
    mesh = getattr(jax.tree.leaves(params)[0].sharding, "mesh", None)
    if mesh is not None:
        layouts = structure.flatten_up_to(rules.shardings(decoder.logical_axes(config), target, mesh))
    for i, ((path, wanted), layout) in enumerate(zip(flat, layouts)):
        if isinstance(wanted, Quantized):
            weight, weights[i] = weights[i], _quantize(weights[i], path[0].key, config.norm_head, wanted, layout)
            if donate:
                weight.delete()
    return config, jax.tree.unflatten(structure, weights)


def dequantize(params: Any, config: ModelConfig) -> tuple[ModelConfig, Any]:
    """The same function as a float model, in `config.param_dtype`: what the quantised weights stand for, rounded.

    Returns the configuration that describes the new parameters, and the parameters, where the old ones are.
    """
    config = dataclasses.replace(config, quantization="none", quantization_group=0)

    def to_float(leaf: Any) -> Any:
        return _dequantize(leaf, config.param_dtype) if is_quantized(leaf) else leaf

    return config, jax.tree.map(to_float, params, is_leaf=is_quantized)


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(weight: Quantized, dtype: str) -> jax.Array:
    return quantized.dequantize(weight).astype(dtype)


def weight_bytes(params: Any) -> int:
    """Bytes of all parameters, on all devices together."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _quantize(weight: jax.Array, part: str, norm_head: bool, wanted: Quantized, layout: Any) -> Quantized:
    """A weight in the form of `wanted`, whose values are shapes, in a layout (None = where it is)."""
    tiles = tuple(size // scales for size, scales in zip(weight.shape, wanted.scale.shape))
    packed_axis = wanted.axis if isinstance(wanted, PackedArray) else None
    if part == "layers":
        return _quantize_layers(weight, tiles[1:], packed_axis, wanted.scale.dtype, layout)
    return _quantize_table(weight, tiles, wanted.scale.dtype, norm_head and part == "head", layout)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize_layers(
    stack: jax.Array, tiles: tuple[int, ...], packed_axis: int | None, scale_dtype: jnp.dtype, layout: Any
) -> Quantized:
    """One layer after the other: the float32 in which this is computed is that of one."""
    array = jax.lax.map(lambda weight: quantize_array(weight, tiles, packed_axis, scale_dtype), stack)
    return array if layout is None else jax.lax.with_sharding_constraint(array, layout)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize_table(
    table_VD: jax.Array, tiles: tuple[int, ...], scale_dtype: jnp.dtype, unit_rows: bool, layout: Any
) -> Quantized:
    """With `unit_rows`, the rows' L2 norms are divided out of the scales, as NormHead divides them out of the rows."""
    array = quantize_array(table_VD, tiles, None, scale_dtype)
    if unit_rows:
        norms_V1 = jnp.sqrt(jnp.sum(jnp.square(quantized.dequantize(array)), axis=1, keepdims=True))
        array = dataclasses.replace(array, scale=array.scale / jnp.maximum(norms_V1, heads.NORM_HEAD_EPS))
    return array if layout is None else jax.lax.with_sharding_constraint(array, layout)
