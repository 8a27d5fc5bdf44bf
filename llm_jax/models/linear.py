"""Matrix products, look-ups and gated units whose gradients are written out, where the derived ones are slow or wrong.

JAX derives a projection's weight gradient as the product of the output's gradient with the input, transposed at the
end; XLA's CPU compiler then writes transposed copies with the surrounding element-wise work fused in, element by
element. Stated in the layout of the weight itself, the same product needs no such copy. docs/log.md has the
measurements.

Weights come in as master parameters, in their own dtype and sharded. They are cast and gathered where they are used,
in the backward pass once more, so that no gathered weight is kept from one pass to the other; and their gradients are
float32 before they are summed over devices. Quantised weights, and those under an adapter, are frozen: no gradient of
theirs is computed, and nothing but the weights themselves is kept for their backward pass.

B batch, T length, I input features, O output features (each may be several dimensions), F feed-forward, V vocabulary,
D model, R rank of an adapter.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from llm_jax.models import quantized
from llm_jax.models.quantized import Quantized
from llm_jax.parallel.rules import LogicalAxes, constrain
from llm_jax.parallel.zero import gather, gradient_of, summed


def _contract(a: jax.Array, a_dims: range, b: jax.Array, b_dims: range, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(a, b, ((tuple(a_dims), tuple(b_dims)), ((), ())), preferred_element_type=dtype)


@flax.struct.dataclass
class Adapted:
    """A frozen kernel [*I, *O] with a low-rank adapter (`models/lora.py`): it acts as kernel + scale * down @ up."""

    kernel: jax.Array | Quantized  # first, because Flax compares the first leaf with the shape that a layer states
    down: jax.Array  # [*I, R]
    up: jax.Array  # [R, *O]
    scale: float = flax.struct.field(pytree_node=False)


def linear(x_BTI: jax.Array, kernel_IO: jax.Array | Quantized | Adapted, axes: LogicalAxes) -> jax.Array:
    """`x @ kernel` over all of the input features: [B, T, *I] and [*I, *O] to [B, T, *O], in the dtype of `x`.

    `axes` are the kernel's logical axes. Its gradient has its own dtype and layout; a frozen one has none.
    """
    if isinstance(kernel_IO, Adapted):
        return _frozen(x_BTI, kernel_IO.kernel, axes) + _low_rank(x_BTI, kernel_IO, axes)
    if isinstance(kernel_IO, Quantized):
        return _frozen(x_BTI, kernel_IO, axes)
    return _linear(x_BTI, kernel_IO, axes)


def _low_rank(x_BTI: jax.Array, adapted: Adapted, axes: LogicalAxes) -> jax.Array:
    """What the adapter adds to the product: scale * (x @ down) @ up."""
    down_axes, up_axes = adapter_axes(axes, x_BTI.ndim - 2)
    x_BTR = constrain(_linear(x_BTI, adapted.down, down_axes), "batch", None, None)
    return _linear(x_BTR * adapted.scale, adapted.up, up_axes)


def adapter_axes(axes: LogicalAxes, inputs: int) -> tuple[LogicalAxes, LogicalAxes]:
    """The logical axes of `down` and `up`, given those of a kernel and how many of them are input features."""
    return (*axes[:inputs], None), (None, *axes[inputs:])


def dense(adapted: Adapted, axes: LogicalAxes, inputs: int, dtype: jnp.dtype) -> jax.Array:
    """The whole kernel with its adapter as compute uses it, in `dtype`; gradients flow to the adapter only."""
    whole = quantized.gather if isinstance(adapted.kernel, Quantized) else gather
    kernel_IO: jax.Array = jax.lax.stop_gradient(whole(adapted.kernel, axes, dtype))
    down_axes, up_axes = adapter_axes(axes, inputs)
    down_IR, up_RO = gather(adapted.down, down_axes, dtype), gather(adapted.up, up_axes, dtype)
    return kernel_IO + jnp.tensordot(down_IR * adapted.scale, up_RO, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _frozen(x_BTI: jax.Array, kernel_IO: jax.Array | Quantized, axes: LogicalAxes) -> jax.Array:
    if isinstance(kernel_IO, Quantized):
        return quantized.linear(x_BTI, kernel_IO, axes)
    return _linear_forward(x_BTI, kernel_IO, axes)[0]


def _frozen_forward(
    x_BTI: jax.Array, kernel_IO: jax.Array | Quantized, axes: LogicalAxes
) -> tuple[jax.Array, jax.Array | Quantized]:
    return _frozen(x_BTI, kernel_IO, axes), kernel_IO


def _frozen_backward(axes: LogicalAxes, kernel_IO: jax.Array | Quantized, dy_BTO: jax.Array) -> tuple[jax.Array, None]:
    if isinstance(kernel_IO, Quantized):
        return quantized.linear_transposed(dy_BTO, kernel_IO, axes), None
    return _linear_transposed(dy_BTO, kernel_IO, axes), None


_frozen.defvjp(_frozen_forward, _frozen_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x_BTI: jax.Array, kernel_IO: jax.Array, axes: LogicalAxes) -> jax.Array:
    return _linear_forward(x_BTI, kernel_IO, axes)[0]


def _linear_forward(
    x_BTI: jax.Array, kernel_IO: jax.Array, axes: LogicalAxes
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    features = x_BTI.ndim - 2
    gathered_IO = gather(kernel_IO, axes, x_BTI.dtype)
    y_BTO = _contract(x_BTI, range(2, x_BTI.ndim), gathered_IO, range(features), x_BTI.dtype)
    return y_BTO, (x_BTI, kernel_IO)


def _linear_backward(
    axes: LogicalAxes, residuals: tuple[jax.Array, jax.Array], dy_BTO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_BTI, kernel_IO = residuals
    dkernel_IO = summed(_kernel_gradient, (x_BTI, dy_BTO), kernel_IO, axes)
    dx_BTI = _linear_transposed(dy_BTO, kernel_IO, axes)
    return dx_BTI, gradient_of(kernel_IO, dkernel_IO, axes)


def _kernel_gradient(x_BTI: jax.Array, dy_BTO: jax.Array) -> jax.Array:
    return _contract(x_BTI, range(2), dy_BTO, range(2), jnp.dtype(jnp.float32))


def _linear_transposed(dy_BTO: jax.Array, kernel_IO: jax.Array, axes: LogicalAxes) -> jax.Array:
    """`dy @ kernel.T` over all of the output features, in the dtype of `dy`."""
    outputs = range(kernel_IO.ndim - dy_BTO.ndim + 2, kernel_IO.ndim)
    return _contract(dy_BTO, range(2, dy_BTO.ndim), gather(kernel_IO, axes, dy_BTO.dtype), outputs, dy_BTO.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


def lookup(table_VD: jax.Array | Quantized, tokens_BT: jax.Array, axes: LogicalAxes, dtype: jnp.dtype) -> jax.Array:
    """Rows of the table by token id, [B, T, D] in `dtype`; gradients of one row's many uses add up in float32."""
    if isinstance(table_VD, Quantized):
        return quantized.lookup(table_VD, tokens_BT, axes, dtype)
    return _lookup(table_VD, tokens_BT, axes, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table_VD: jax.Array, tokens_BT: jax.Array, axes: LogicalAxes, dtype: jnp.dtype) -> jax.Array:
    return jnp.take(gather(table_VD, axes, dtype), tokens_BT, axis=0)


def _lookup_forward(
    table_VD: jax.Array, tokens_BT: jax.Array, axes: LogicalAxes, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _lookup(table_VD, tokens_BT, axes, dtype), (table_VD, tokens_BT)


def _lookup_backward(
    axes: LogicalAxes, dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], dx_BTD: jax.Array
) -> tuple[jax.Array, None]:
    del dtype
    table_VD, tokens_BT = residuals
    # Each device gets its features of all tokens, which are fewer numbers than a sum of whole tables would move.
    tokens_BT, dx_BTD = constrain(tokens_BT, None, None), constrain(dx_BTD, None, None, axes[1])
    zeros_VD = constrain(jnp.zeros(table_VD.shape, jnp.float32), *axes)
    dtable_VD = zeros_VD.at[tokens_BT].add(dx_BTD.astype(jnp.float32))
    return gradient_of(table_VD, dtable_VD, axes), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


@jax.custom_vjp
def swiglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """silu(gate) * up (Shazeer, 2020). Only its two inputs are kept for the backward pass."""
    return jax.nn.silu(gate_BTF) * up_BTF


def _swiglu_forward(gate_BTF: jax.Array, up_BTF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return swiglu(gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _swiglu_backward(residuals: tuple[jax.Array, jax.Array], dy_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate_BTF, up_BTF = residuals
    sigmoid_BTF = jax.nn.sigmoid(gate_BTF)
    dgate_BTF = dy_BTF * up_BTF * sigmoid_BTF * (1 + gate_BTF * (1 - sigmoid_BTF))
    return dgate_BTF, dy_BTF * gate_BTF * sigmoid_BTF


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
