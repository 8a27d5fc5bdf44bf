"""The count of a kernel's bytes and products against counts by hand, on kernels small enough for that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from benchmarks.aot import cases, kernels, traffic
from benchmarks.aot.cases import Case
from llm_jax.kernels import pallas_gpu_decode
from llm_jax.kernels.pallas_gpu import Blocks, Pass, gpu_attention

X = jax.ShapeDtypeStruct((64, 16), jnp.float32)
FLOAT = 4


def triangle(ref, limits_ref, out_ref):
    """Row block i takes the products with row blocks 0 to i, or to a limit that is known before."""
    i = pl.program_id(0)
    mine = ref[pl.ds(i * 16, 16), :]

    def add(j, total):
        return total + mine @ ref[pl.ds(j * 16, 16), :].T

    total = jax.lax.fori_loop(0, jnp.minimum(i + 1, limits_ref[i]), add, jnp.zeros((16, 16)))
    out_ref[pl.ds(i * 16, 16), :] = total


def run_triangle(limits):
    return lambda x: pl.pallas_call(
        triangle,
        out_shape=X,
        grid=(4,),
        compiler_params=plgpu.CompilerParams(),
        name="triangle",
    )(x, limits)


@pytest.mark.parametrize(("limits", "visited"), [([9, 9, 9, 9], 10), ([9, 1, 0, 9], 6)])
def test_loops_run_as_far_as_they_would(limits, visited):
    block = 16 * 16 * FLOAT
    work = traffic.count(run_triangle(jnp.asarray(limits)), X)["triangle"]
    assert work.flops == visited * 2 * 16**3
    assert work.bytes_read == (4 + visited) * block + 4 * FLOAT  # its own rows, those of the others, the limit
    assert work.bytes_written == 4 * block


def test_axes_that_vmap_adds_are_not_the_kernels_own():
    work = traffic.count(
        jax.vmap(run_triangle(jnp.asarray([9, 1, 0, 9]))), jax.ShapeDtypeStruct((3, 64, 16), "float32")
    )
    assert work["triangle"].flops == 3 * 6 * 2 * 16**3


def test_a_loop_that_depends_on_data_is_not_counted():
    limits = jax.ShapeDtypeStruct((4,), jnp.int32)
    with pytest.raises(traffic.NotCounted, match="a loop depends on data"):
        traffic.count(lambda x, limits: run_triangle(limits)(x), X, limits)


def test_a_pipeline_fetches_a_block_when_its_place_changes():
    def kernel(order_ref, x_ref, out_ref):
        @pl.when(order_ref[pl.program_id(0)] > 0)
        def _():
            out_ref[...] = x_ref[...] @ x_ref[...].T

    def run(x):
        order = jnp.asarray([0, 2, 2, 1], jnp.int32)
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(4,),
            in_specs=[pl.BlockSpec((16, 16), lambda i, order: (order[i], 0))],
            out_specs=pl.BlockSpec((16, 16), lambda i, order: (0, 0)),
        )
        shape = jax.ShapeDtypeStruct((16, 16), jnp.float32)
        return pl.pallas_call(kernel, out_shape=shape, grid_spec=spec, compiler_params=pltpu.CompilerParams())(order, x)

    (work,) = traffic.count(run, X).values()
    assert work.flops == 3 * 2 * 16**3  # not where `order` is 0
    assert work.bytes_read == 3 * 16 * 16 * FLOAT  # 0, 2 and 1; the second 2 is there already
    assert work.bytes_written == 16 * 16 * FLOAT


def test_the_fused_attention_visits_the_tiles_of_its_mask():
    case = Case("small", 64, 2, 1, 32, window=20)
    blocks = Blocks(*[Pass(16, 16, 4, 2)] * 3)
    shapes = cases.inputs(case, "float32")

    def work(case):
        return traffic.count(lambda q, k, v: gpu_attention(q, k, v, case.mask(), blocks=blocks), *shapes)

    (found,), (dense,) = work(case).values(), work(case.everything_visible()).values()
    # Query block i of 16 sees up to 20 keys back: blocks i - 2 (from the second on, its first query), i - 1 and i.
    tiles = sum(min(i, 2) + 1 for i in range(4))
    products = 2 * 2 * 2 * 16 * 16 * 32  # heads, products of a tile, operations of a number
    assert found.flops == tiles * products
    assert dense.flops == 16 * products


def copy_rows(size):
    """Copies blocks of `size` rows; the last one may stand out of the array, and is cut off there by a mask."""

    def kernel(x_ref, out_ref):
        exists = (pl.program_id(0) * size + jnp.arange(size) < 10)[:, None]
        plgpu.store(out_ref, plgpu.load(x_ref, mask=exists, other=0.0), mask=exists)
        out_ref[...] = x_ref[...]  # without a mask all of a block counts

    spec = pl.BlockSpec((size, 8), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((10, 8), jnp.float32)
    grid, options = (-(-10 // size),), plgpu.CompilerParams()
    call = pl.pallas_call(kernel, out_shape=shape, grid=grid, in_specs=[spec], out_specs=spec, compiler_params=options)

    def run(x):
        with jax.named_scope("outer"), jax.named_scope("copy(rows)"):
            return call(x)

    return run


@pytest.mark.parametrize(("size", "rows"), [(2, 10), (4, 12), (16, 16)])
def test_what_a_mask_cuts_off_is_not_moved(size, rows):
    counted = traffic.count(copy_rows(size), jax.ShapeDtypeStruct((10, 8), jnp.float32))
    work = counted["copy_rows_"]  # a kernel without a name is called as its scope
    assert (work.bytes_read, work.bytes_written) == (((10 + rows) * 8) * FLOAT,) * 2


def test_decoding_reads_its_cache_once_and_writes_little():
    """One query per head where the kernel's tile has 16 rows."""
    case = Case("small", 256, 8, 8, 128, decode_batch=1)
    splits, lengths = 2, np.asarray([256], np.int32)
    run = kernels.named("pallas_gpu_decode").build(case, blocks=pallas_gpu_decode.Blocks(64, splits))
    for which, codes in (("decode", 2 * 128), ("decode_int8", 128 + FLOAT)):
        q, k, v, _, *scales = cases.decode_inputs(case, which)
        counted = traffic.count(lambda q, k, v, *scales: run(q, k, v, lengths, *scales), q, k, v, *scales)
        (work,) = counted.values()
        integers = 2 * FLOAT * 8 * splits  # where the visible slots of a row begin and end
        assert work.bytes_read == 2 * 8 * 256 * codes + splits * 8 * 128 * 2 + integers
        assert work.bytes_written == splits * 8 * (128 + 1) * FLOAT


@pytest.mark.parametrize(
    "case", [Case("a", 7, 2, 1, 8), Case("b", 7, 2, 1, 8, window=3), Case("c", 5, 1, 1, 8, causal=False)]
)
def test_visible_pairs(case):
    mask = case.mask().visible(case.length, case.length)
    pairs = case.length**2 if mask is None else int(np.sum(mask))
    assert cases.visible_pairs(case) == pairs
    assert cases.least_flops(case, "forward") == 4 * pairs * case.num_heads * 8
    assert cases.least_flops(case, "backward") == 10 * pairs * case.num_heads * 8


def test_least_bytes():
    case = Case("a", 10, 4, 2, 8, decode_batch=3)
    q, k, statistics = 10 * 4 * 8 * 2, 10 * 2 * 8 * 2, 10 * 4 * 4
    assert cases.least_bytes(case, "forward") == 2 * q + 2 * k + statistics
    assert cases.least_bytes(case, "backward") == 4 * q + 4 * k + statistics
    assert cases.least_bytes(case, "decode") == 3 * (2 * 4 * 8 * 2 + 2 * k)
    assert cases.least_bytes(case, "decode_int8") == 3 * (2 * 4 * 8 * 2 + 2 * 10 * 2 * (8 + 4))
    assert cases.least_bytes(case._replace(window=4), "decode") == 3 * (2 * 4 * 8 * 2 + 2 * 4 * 2 * 8 * 2)
