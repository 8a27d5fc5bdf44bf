"""Matrix products and gated units whose gradients are written out, because compilers do poorly on the derived ones.

JAX derives a projection's weight gradient as the product of the output's gradient with the input, transposed at the
end; XLA's CPU compiler then writes transposed copies with the surrounding element-wise work fused in, element by
element. Stated in the layout of the weight itself, the same product needs no such copy. docs/log.md has the
measurements.

B batch, T length, I input features, O output features (each may be several dimensions), F feed-forward.
"""

import jax


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
    return dx_BTI, _contract(x_BTI, range(2), dy_BTO, range(2))


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
    return dgate_BTF, dy_BTF * gate_BTF * sigmoid_BTF


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
