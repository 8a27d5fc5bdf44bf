"""Matrix products and gated units whose gradients are written out, because compilers do poorly on the derived ones.

The derived weight gradient of a projection contracts the batch and length of two activations, one of which must be
transposed. XLA's CPU compiler then fuses the element-wise work that made the activation into that transposed copy,
element by element. Transposing first, behind a barrier, leaves a plain copy and a fast product; docs/log.md has the
measurements. Accelerators read either operand transposed for free and take the product as it stands.

B batch, T length, I input features, O output features (each may be several dimensions), F feed-forward.
"""

import jax
import jax.numpy as jnp


def _contract(a: jax.Array, a_dims: range, b: jax.Array, b_dims: range) -> jax.Array:
    return jax.lax.dot_general(a, b, ((tuple(a_dims), tuple(b_dims)), ((), ())))


@jax.custom_vjp
def linear(x_BTI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """`x @ kernel` over all of the input features: [B, T, *I] and [*I, *O] to [B, T, *O], in their common dtype."""
    features = x_BTI.ndim - 2
    return _contract(x_BTI, range(2, x_BTI.ndim), kernel_IO, range(features))


def _linear_forward(x_BTI: jax.Array, kernel_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x_BTI, kernel_IO), (x_BTI, kernel_IO)


def _linear_backward(residuals: tuple[jax.Array, jax.Array], dy_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTI, kernel_IO = residuals
    features = x_BTI.ndim - 2
    dx_BTI = _contract(dy_BTO, range(2, dy_BTO.ndim), kernel_IO, range(features, kernel_IO.ndim))
    dkernel_IO = jax.lax.platform_dependent(x_BTI, dy_BTO, cpu=_transposed_first, default=_kernel_gradient)
    return dx_BTI, dkernel_IO


def _kernel_gradient(x_BTI: jax.Array, dy_BTO: jax.Array) -> jax.Array:
    return _contract(x_BTI, range(2), dy_BTO, range(2))


def _transposed_first(x_BTI: jax.Array, dy_BTO: jax.Array) -> jax.Array:
    x_IBT = jax.lax.optimization_barrier(jnp.moveaxis(x_BTI, (0, 1), (-2, -1)))
    return _contract(x_IBT, range(x_IBT.ndim - 2, x_IBT.ndim), dy_BTO, range(2))


linear.defvjp(_linear_forward, _linear_backward)


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
    # Both gradients feed two products each: the barrier keeps them from being computed once per use.
    return jax.lax.optimization_barrier((dgate_BTF, dy_BTF * gate_BTF * sigmoid_BTF))


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
