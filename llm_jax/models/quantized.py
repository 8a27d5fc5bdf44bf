"""Weights of few bits, and the products with them: what `linear`, `lookup` and the heads do when a weight is quantised.

Only weights are quantised: symmetrically, with one scale for every group of a weight's input features (all of them,
or a few). int8 weights are qwix's `QArray`. int4 weights are packed two to a byte, because XLA's CPU compiler reads its
own int4 one element at a time; each half of the bytes is a `QArray` again. Tables, whose rows are looked up or turned
into logits, stay at int8, where they cost next to nothing, while int4 costs them dear (docs/quantization.md).

A product never makes a float copy of the whole model. On accelerators the conversion is left to XLA. Its CPU compiler
converts a matrix first, all of them before the first is needed, and out of any loop: there the products run in
blocks that stay in cache, in a loop that keeps the conversion where it is.

B batch, T length, I input features, O output features (each may be several dimensions), V vocabulary, D model,
M = B T rows, K all input features, N all output features.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import qwix
from qwix import QArray

from llm_jax.config import ModelConfig
from llm_jax.errors import require
from llm_jax.parallel import zero
from llm_jax.parallel.rules import LogicalAxes

BLOCK_SIZE = 2**20  # weights that are converted at once on a CPU: their float32 copy stays in the last-level cache


@flax.struct.dataclass
class PackedArray:
    """Two int4 arrays in one of int8: inputs 2i in the low and inputs 2i + 1 in the high bits of byte i.

    `axis`, counted from the end, is the input dimension along which neighbours share a byte. A scale belongs to the
    same input features as in a `QArray` of the unpacked values.
    """

    qvalue: jax.Array
    scale: jax.Array
    axis: int = flax.struct.field(pytree_node=False)

    @classmethod
    def pack(cls, array: QArray, axis: int) -> "PackedArray":
        """The packed form of values from -8 to 7."""
        low, high = (jax.lax.slice_in_dim(array.qvalue, i, None, 2, axis % array.ndim) for i in (0, 1))
        return cls(jnp.bitwise_or(jnp.bitwise_and(low, 15), jnp.left_shift(high, 4)), array.scale, axis)

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        """The shape of the values one by one."""
        axis = self.axis % self.qvalue.ndim
        return tuple(size * 2 if i == axis else size for i, size in enumerate(self.qvalue.shape))

    def unpack(self) -> QArray:
        """The same values one by one, as int8."""
        values = jnp.stack(halves(self.qvalue), self.axis % self.qvalue.ndim + 1)
        return QArray(values.reshape(self.unpacked_shape), self.scale, qtype=jnp.int8)


Quantized: TypeAlias = QArray | PackedArray


def is_quantized(leaf: Any) -> bool:
    """Whether something is one quantised weight: the `is_leaf` of trees that hold some."""
    return isinstance(leaf, Quantized)


def halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values, int8, in the low and in the high four bits of every byte."""
    return jnp.right_shift(jnp.left_shift(packed, 4), 4), jnp.right_shift(packed, 4)


def tile_shape(shape: Sequence[int], inputs: Sequence[int], kind: str, group: int) -> tuple[int, ...]:
    """How many neighbours of a weight share a scale, in each of its dimensions.

    Args:
      shape: the weight's, without a layer axis.
      inputs: the dimensions of its input features.
      kind: "int8" or "int4".
      group: at most how many features of the last input dimension share a scale; 0 = all input features share one.

    Raises:
      UserError: no suitable group divides the input features.
    """
    if not group:
        last = shape[inputs[-1]]
        require(kind != "int4" or last % 2 == 0, f"int4 packs two inputs to a byte: {last} input features are odd")
        return tuple(size if axis in inputs else 1 for axis, size in enumerate(shape))
    return tuple(group_size(size, group, kind) if axis == inputs[-1] else 1 for axis, size in enumerate(shape))


def group_size(features: int, group: int, kind: str) -> int:
    """The largest divisor of `features` up to `group`, even for int4; `UserError` where it is below half of both."""
    step = 2 if kind == "int4" else 1
    sizes = [size for size in range(step, min(features, group) + 1, step) if features % size == 0]
    size = max(sizes, default=0)
    require(
        2 * size >= min(features, group),
        f"{kind} groups of up to {group} do not divide {features} input features (the nearest is {size}): "
        "choose another quantization_group",
    )
    return size


def quantize_array(
    weight: jax.Array, tiles: Sequence[int], packed_axis: int | None, scale_dtype: jnp.dtype
) -> Quantized:
    """Quantise a weight with one scale for each tile: to int4 packed along an axis (from the end), or to int8.

    The weight of greatest magnitude in a tile becomes the most negative integer, exactly, by a scale of its sign: so
    all integers are used. (`qwix.quantize` leaves that one out, and clips the greatest weights by half a step.)
    """
    lowest = jnp.iinfo(jnp.int8 if packed_axis is None else jnp.int4).min
    split = weight.astype(jnp.float32).reshape([n for size, t in zip(weight.shape, tiles) for n in (size // t, t)])
    inside = tuple(range(1, split.ndim, 2))
    highs, lows = jnp.max(split, inside, keepdims=True), jnp.min(split, inside, keepdims=True)
    scales = jnp.where(highs > -lows, highs, lows) / lowest
    scales = jnp.where(scales == 0, 1.0, scales).astype(scale_dtype)
    values = jnp.clip(jnp.round(split / scales.astype(jnp.float32)), lowest, -lowest - 1).astype(jnp.int8)
    array = QArray(values.reshape(weight.shape), scales.squeeze(inside), qtype=jnp.int8)
    return array if packed_axis is None else PackedArray.pack(array, packed_axis)


def dequantize(weight: Quantized) -> jax.Array:
    """The weight's values, float32."""
    array = weight.unpack() if isinstance(weight, PackedArray) else weight
    return qwix.dequantize(array.astype(jnp.float32))


def initializer(init: Callable[..., jax.Array], axes: LogicalAxes, inputs: Sequence[int], config: ModelConfig) -> Any:
    """An initialiser, with logical axes, of what the config makes of a kernel: float as `init` gives it, or quantised.

    `inputs` are the dimensions of the kernel's input features. A scale has the kernel's axes, except where one scale
    serves a whole dimension. Scales of groups, of which there are many, are bfloat16; others are float32.
    """
    return _initializer(init, axes, inputs, config.quantization, config.quantization_group)


def table_initializer(init: Callable[..., jax.Array], axes: LogicalAxes, config: ModelConfig) -> Any:
    """`initializer` for a table [V, D]: in a quantised model int8, with a scale for each row."""
    return _initializer(init, axes, (1,), "none" if config.quantization == "none" else "int8", 0)


def _initializer(
    init: Callable[..., jax.Array], axes: LogicalAxes, inputs: Sequence[int], kind: str, group: int
) -> Any:
    if kind == "none":
        return nn.with_logical_partitioning(init, axes)

    def quantized(key: jax.Array, shape: Sequence[int], dtype: str) -> Quantized:
        packed_axis = inputs[-1] - len(shape) if kind == "int4" else None
        scale_dtype = jnp.dtype(jnp.bfloat16 if group else jnp.float32)
        array = quantize_array(
            init(key, shape, dtype), tile_shape(shape, inputs, kind, group), packed_axis, scale_dtype
        )
        return dataclasses.replace(
            array,
            qvalue=nn.LogicallyPartitioned(array.qvalue, axes),
            scale=nn.LogicallyPartitioned(array.scale, _scale_axes(array, axes)),
        )

    return quantized


def _scale_axes(weight: Quantized, axes: LogicalAxes) -> LogicalAxes:
    return tuple(axis if size > 1 else None for axis, size in zip(axes, weight.scale.shape))


def _gather(weight: Quantized, axes: LogicalAxes) -> Quantized:
    return dataclasses.replace(
        weight,
        qvalue=zero.gather(weight.qvalue, axes, weight.qvalue.dtype),
        scale=zero.gather(weight.scale, _scale_axes(weight, axes), weight.scale.dtype),
    )


def gather(weight: Quantized, axes: LogicalAxes, dtype: jnp.dtype) -> jax.Array:
    """The whole weight as compute uses it, in `dtype`; what moves between devices are the few bits."""
    return dequantize(_gather(weight, axes)).astype(dtype)


def linear(x_BTI: jax.Array, kernel_IO: Quantized, axes: LogicalAxes) -> jax.Array:
    """`x @ kernel` over all of the input features: [B, T, *I] and [*I, *O] to [B, T, *O], in the dtype of `x`."""
    kernel_IO, inputs = _gather(kernel_IO, axes), x_BTI.ndim - 2
    if not _in_blocks():
        return _contract(x_BTI, kernel_IO, range(inputs)).astype(x_BTI.dtype)
    rows, outputs = x_BTI.shape[:2], kernel_IO.qvalue.shape[inputs:]
    y_MN = _linear_in_blocks(x_BTI.reshape(math.prod(rows), -1).astype(jnp.float32), _input_blocks(kernel_IO, inputs))
    return y_MN.reshape(*rows, *outputs).astype(x_BTI.dtype)


def linear_transposed(y_BTO: jax.Array, kernel_IO: Quantized, axes: LogicalAxes) -> jax.Array:
    """`y @ kernel.T` over all of the output features: [B, T, *O] and [*I, *O] to [B, T, *I], in the dtype of `y`.

    This is the gradient that the input of `linear` gets. Derived by JAX, it would keep the kernel as floats.
    """
    kernel_IO, outputs = _gather(kernel_IO, axes), y_BTO.ndim - 2
    shape_IO = kernel_IO.unpacked_shape if isinstance(kernel_IO, PackedArray) else kernel_IO.qvalue.shape
    inputs = len(shape_IO) - outputs
    if not _in_blocks():
        weight_IO = dequantize(kernel_IO).astype(y_BTO.dtype)
        contracted = tuple(range(2, y_BTO.ndim)), tuple(range(inputs, len(shape_IO)))
        x_BTI = jax.lax.dot_general(y_BTO, weight_IO, (contracted, ((), ())), preferred_element_type=jnp.float32)
        return x_BTI.astype(y_BTO.dtype)
    y_MN = y_BTO.reshape(math.prod(y_BTO.shape[:2]), -1).astype(jnp.float32)
    kernels = _input_blocks(kernel_IO, inputs)
    x_blocks = jax.lax.map(lambda kernel_KN: y_MN @ dequantize(kernel_KN).T, kernels)
    return x_blocks.swapaxes(0, 1).reshape(*y_BTO.shape[:2], *shape_IO[:inputs]).astype(y_BTO.dtype)


def logits(hidden_BTD: jax.Array, table_VD: QArray, axes: LogicalAxes) -> jax.Array:
    """`hidden @ table.T`, float32 [B, T, V]."""
    table_VD = _gather(table_VD, axes)
    if not _in_blocks():
        return _contract(hidden_BTD, table_VD, (1,))
    x_MK = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).astype(jnp.float32)
    return _logits_in_blocks(x_MK, table_VD).reshape(*hidden_BTD.shape[:2], -1)


def lookup(table_VD: Quantized, tokens_BT: jax.Array, axes: LogicalAxes, dtype: jnp.dtype) -> jax.Array:
    """Rows of the table by token id, [B, T, D] in `dtype`; only the rows taken are dequantised."""
    rows = jax.tree.map(lambda part: jnp.take(part, tokens_BT, axis=0), _gather(table_VD, axes))
    return dequantize(rows).astype(dtype)


def _in_blocks() -> bool:
    """Whether to compute in blocks: on a CPU, and not on a mesh (a simulated one), whose shards blocks would cut."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() == "cpu" and (mesh.empty or mesh.size == 1)


def _pairs(x: jax.Array, weight: Quantized) -> list[tuple[jax.Array, QArray]]:
    """Inputs and weights whose products add up to the product of `x` with the weight."""
    if isinstance(weight, QArray):
        return [(x, weight)]
    values = halves(weight.qvalue)
    return [(x[..., i::2], QArray(values[i], weight.scale, qtype=jnp.int8)) for i in (0, 1)]


def _contract(x: jax.Array, weight: Quantized, inputs: Sequence[int]) -> jax.Array:
    """The product over the trailing dimensions of `x` and the dimensions `inputs` of the weight, float32."""
    contracted = tuple(range(x.ndim - len(inputs), x.ndim)), tuple(inputs)
    products = (
        qwix.dot_general(part, array.astype(x.dtype), (contracted, ((), ())), preferred_element_type=jnp.float32)
        for part, array in _pairs(x, weight)
    )
    return functools.reduce(jnp.add, products)


def _count_blocks(rows: int, size: int) -> int:
    """Into how many equal parts to cut `rows`, so that `size` weights come in blocks: two at least, to be a loop."""
    return next((n for n in range(2, rows) if rows % n == 0 and size <= n * BLOCK_SIZE), rows)


def _input_blocks(kernel_IO: Quantized, inputs: int) -> Quantized:
    """A kernel [*I, *O] as equal blocks [blocks, K / blocks, N] of its input features, whole groups each."""
    N = math.prod(kernel_IO.qvalue.shape[inputs:])
    bytes_KN, scale_GN = (part.reshape(-1, N) for part in (kernel_IO.qvalue, kernel_IO.scale))
    packed = isinstance(kernel_IO, PackedArray)
    groups = len(scale_GN) if len(scale_GN) > 1 else len(bytes_KN)
    blocks = _count_blocks(groups, bytes_KN.size * (2 if packed else 1))
    if len(scale_GN) == 1:
        scale_GN = jnp.broadcast_to(scale_GN, (blocks, N))
    values, scales = (part.reshape(blocks, -1, N) for part in (bytes_KN, scale_GN))
    if packed:
        return PackedArray(values, scales, axis=-2)
    return QArray(values, scales, qtype=jnp.int8)


def _linear_in_blocks(x_MK: jax.Array, kernels: Quantized) -> jax.Array:
    """`x @ kernel`, float32 [M, N]: the sum over the blocks of a kernel's input features."""

    def add(sum_MN: jax.Array, block: tuple[jax.Array, Quantized]) -> tuple[jax.Array, None]:
        return sum_MN + _contract(*block, (0,)), None

    blocks, _, N = kernels.qvalue.shape
    x_blocks = x_MK.reshape(len(x_MK), blocks, -1).swapaxes(0, 1)
    return jax.lax.scan(add, jnp.zeros((len(x_MK), N), jnp.float32), (x_blocks, kernels))[0]


def _logits_in_blocks(x_MK: jax.Array, table_VK: QArray) -> jax.Array:
    """`x @ table.T`, float32 [M, V], from blocks of the table's rows."""
    rows = len(table_VK.qvalue)
    blocks = _count_blocks(rows, rows * x_MK.shape[1])
    tables = jax.tree.map(lambda part: part.reshape(blocks, -1, part.shape[-1]), table_VK)
    # XLA's CPU product reads a matrix [V, K] faster if it comes first.
    y_VM = jax.lax.map(lambda table: qwix.dot_general(table, x_MK, (((1,), (1,)), ((), ()))), tables)
    return y_VM.reshape(rows, len(x_MK)).T
