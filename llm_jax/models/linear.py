"""Matrix products, look-ups and gated units whose gradients are written out, where the derived ones are slow or wrong.

JAX derives a projection's weight gradient as the product of the output's gradient with the input, transposed at the
end; XLA's CPU compiler then writes transposed copies with the surrounding element-wise work fused in, element by
element. Stated in the layout of the weight itself, the same product needs no such copy. docs/log.md has the
measurements.

Weights come in as master parameters, in their own dtype and sharded. They are cast and gathered where they are used,
in the backward pass once more, so that no gathered weight is kept from one pass to the other; and their gradients are
float32 before they are summed over devices.

B batch, T length, I input features, O output features (each may be several dimensions), F feed-forward, V vocabulary,
D model.
"""

import functools

import jax
import jax.numpy as jnp

from llm_jax.models import quantized
from llm_jax.models.quantized import Quantized
from llm_jax.parallel.rules import LogicalAxes, constrain, gather


def _contract(a: jax.Array, a_dims: range, b: jax.Array, b_dims: range, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(a, b, ((tuple(a_dims), tuple(b_dims)), ((), ())), preferred_element_type=dtype)


def linear(x_BTI: jax.Array, kernel_IO: jax.Array | Quantized, axes: LogicalAxes) -> jax.Array:
    """`x @ kernel` over all of the input features: [B, T, *I] and [*I, *O] to [B, T, *O], in the dtype of `x`.

    `axes` are the kernel's logical axes. Its gradient has its own dtype and layout; a quantised one has none.
    """
    if isinstance(kernel_IO, Quantized):
        return quantized.linear(x_BTI, kernel_IO, axes)
    return _linear(x_BTI, kernel_IO, axes)


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
    features = x_BTI.ndim - 2
    gathered_IO = gather(kernel_IO, axes, x_BTI.dtype)
    outputs = range(features, kernel_IO.ndim)
    dx_BTI = _contract(dy_BTO, range(2, dy_BTO.ndim), gathered_IO, outputs, x_BTI.dtype)
    dkernel_IO = _contract(x_BTI, range(2), dy_BTO, range(2), jnp.dtype(jnp.float32))
    return dx_BTI, constrain(dkernel_IO, *axes).astype(kernel_IO.dtype)


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
    zeros_VD = jnp.zeros(table_VD.shape, jnp.float32)
    dtable_VD = zeros_VD.at[tokens_BT].add(dx_BTD.astype(jnp.float32))
    return constrain(dtable_VD, *axes).astype(table_VD.dtype), None


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
