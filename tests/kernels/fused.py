"""What the tests of the fused kernels share: each of them interpreted, its tiles unlike in every pass, and a mask."""

import functools

import jax
import jax.numpy as jnp

from llm_jax.kernels import pallas_gpu, pallas_tpu
from llm_jax.kernels.chunked import Tile
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.pallas_gpu import Pass
from tests.kernels import oracle
from tests.kernels.forms import QUANTITIES, relative_error

GPU_BLOCKS = pallas_gpu.Blocks(Pass(16, 32, 4, 2), Pass(16, 16, 4, 2), Pass(32, 16, 4, 2))
TPU_BLOCKS = pallas_tpu.Blocks(Tile(16, 32), Tile(32, 16), Tile(16, 16))
ATTEND = {
    "pallas_gpu": functools.partial(pallas_gpu.gpu_attention, blocks=GPU_BLOCKS, interpret=True),
    "pallas_tpu": functools.partial(pallas_tpu.tpu_attention, blocks=TPU_BLOCKS, interpret=True),
}
# Two sequences of several blocks on either side, none of them whole at the end, every rule in force.
SHAPE = (2, 37, 45, 4, 2, 32)
EVERYTHING = AttentionMask(
    window=jnp.int32(30),
    query_segment_ids=jnp.asarray([[1] * 20 + [2] * 17, [3] * 33 + [0] * 4], jnp.int32),
    key_segment_ids=jnp.asarray([[1] * 22 + [2] * 23, [3] * 42 + [0] * 3], jnp.int32),
    query_offset=jnp.asarray([4, 6], jnp.int32),
    key_lengths=jnp.asarray([45, 38], jnp.int32),
    slopes=jnp.asarray([0.5, 0.1, 0.3, 0.9], jnp.float32),
    query_scale=jnp.linspace(0.5, 1.5, 74).reshape(2, 37),
)


def output_and_gradients(attend, q, k, v, mask, dout):
    out, pullback = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
    return out, *pullback(dout)


@functools.cache
def compiled(form):
    """One compilation for all masks of a structure."""
    return jax.jit(functools.partial(output_and_gradients, ATTEND[form]))


def relative_errors(actual, expected):
    """Relative L2 error of the output and of each gradient."""
    return dict(zip(QUANTITIES, map(relative_error, actual, expected), strict=True))


def check(form, q, k, v, mask, dout, tolerance=4e-6):
    """What a kernel gives, which is what the definition does."""
    actual = compiled(form)(q, k, v, mask, dout)
    assert all(a.dtype == q.dtype for a in actual)
    errors = relative_errors(actual, oracle.attention(q, k, v, mask, dout))
    assert max(errors.values()) < tolerance, errors
    return actual
