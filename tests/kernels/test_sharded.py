"""Kernels run per device of a mesh, on simulated devices: the same numbers as on one, and refusals that say why."""

import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.errors import UserError
from llm_jax.kernels import sharded
from llm_jax.kernels.attention import attention
from llm_jax.kernels.mask import AttentionMask
from tests.kernels import oracle
from tests.kernels.forms import QUANTITIES, inputs, output_and_gradients, relative_error, small_tiles

BATCH, LENGTH, HEADS = 4, 20, 16
SHAPE = (BATCH, LENGTH, LENGTH, HEADS, 8, 32)
SEGMENTS = jnp.asarray([[1] * 20, [1] * 7 + [2] * 13, [3] * 18 + [0] * 2, [1] * 2 + [2] * 2 + [3] * 16], jnp.int32)
MASK = AttentionMask(
    window=jnp.int32(11),
    query_segment_ids=SEGMENTS,
    key_segment_ids=SEGMENTS,
    query_offset=jnp.asarray([0, 1, 2, 3], jnp.int32),
    key_lengths=jnp.asarray([20, 19, 20, 15], jnp.int32),
    slopes=jnp.asarray(2.0 ** -np.linspace(1, 6, HEADS), jnp.float32),
    query_scale=jnp.linspace(0.5, 1.5, BATCH * LENGTH).reshape(BATCH, LENGTH),
)


def mesh(replica, data, tensor):
    return jax.make_mesh((replica, data, tensor), ("replica", "data", "tensor"), axis_types=(AxisType.Auto,) * 3)


def laid_out(arrays, on):
    """Queries, keys, values and the cotangent where the model's constraints put them."""
    return jax.device_put(arrays, NamedSharding(on, P(("replica", "data"), None, "tensor", None)))


@pytest.mark.parametrize(
    ("form", "sizes"),
    [("pallas_gpu", (1, 1, 8)), ("pallas_gpu", (1, 2, 4)), ("pallas_gpu", (2, 2, 2)), ("pallas_tpu", (1, 4, 2))],
)
def test_output_and_gradients_are_those_of_the_oracle(form, sizes):
    """Every field of the mask differs by row or head, so that a wrong cut of any shows."""
    arrays = inputs(*SHAPE)
    on = mesh(*sizes)
    with jax.set_mesh(on):
        actual = output_and_gradients(*laid_out(arrays, on)[:3], MASK, laid_out(arrays, on)[3], form)
    for name, a, e in zip(QUANTITIES, actual, oracle.attention(*arrays[:3], MASK, arrays[3]), strict=True):
        assert relative_error(a, e) < 4e-6, name
        heads, rows = sizes[2], sizes[0] * sizes[1]
        assert a.sharding.shard_shape(a.shape)[::2] == (BATCH // rows, a.shape[2] // heads), "left where it was made"


def error_of_output(changes):
    """Relative error on a 2x4 mesh with another layout of the mask."""
    arrays = inputs(*SHAPE)
    on = mesh(1, 2, 4)
    with small_tiles(), mock.patch.dict(sharded.MASK_AXES, changes), jax.set_mesh(on):
        run = jax.jit(lambda q, k, v: attention(q, k, v, MASK, implementation="pallas_gpu"))
        return relative_error(run(*laid_out(arrays[:3], on)), oracle.attention(*arrays[:3], MASK, arrays[3])[0])


def test_slopes_that_are_not_cut_with_the_heads_are_caught():
    """The kernel runs, and every group of heads but the first has the slopes of others."""
    assert error_of_output({"slopes": ()}) > 1e-2


def of_mask(field):
    """A stand-in for a kernel that gives back what it knows of the mask, in the place of its heads."""

    def run(q_BTNH, k_BSKH, v_BSKH, mask):
        return q_BTNH * 0 + getattr(mask, field)[None, None, :, None]

    return run


def test_inside_a_shard_map_the_kernel_runs_on_what_is_there():
    """The surrounding function has cut the arrays already; only the axes that it left are cut over."""
    arrays = inputs(*SHAPE)[:3]
    run = sharded.per_shard(of_mask("slopes"))
    expected = np.broadcast_to(MASK.slopes[None, None, :, None], arrays[0].shape)
    heads, rows = P(None, None, "tensor", None), P(("replica", "data"))

    def inside(q, k, v, slopes):
        assert q.shape[2] == slopes.shape[0] == HEADS // 4
        return run(q, k, v, AttentionMask(slopes=slopes))

    with jax.set_mesh(mesh(1, 2, 4)):
        for names, spec in (({"replica", "data", "tensor"}, P(*rows, None, "tensor")), ({"tensor"}, heads)):
            mapped = jax.shard_map(
                inside,
                in_specs=(spec, spec, spec, P("tensor")),
                out_specs=spec,
                axis_names=names,
                check_vma=False,
            )
            np.testing.assert_array_equal(jax.jit(mapped)(*arrays, MASK.slopes), expected)


def test_numbers_stay_static_and_trees_are_cut_by_their_leading_axes():
    """As a kernel with a static window needs it, and decoding with its cache of codes and scales."""
    seen = []

    def run(q_BTNH, cache, mask):
        seen.append((mask.window, cache["codes"].shape, cache["scales"].shape, mask.query_offset.shape))
        return q_BTNH

    q, k, v = inputs(*SHAPE)[:3]
    cache = {"codes": k.swapaxes(1, 2), "scales": v.swapaxes(1, 2)[..., :1]}
    with jax.set_mesh(mesh(1, 2, 4)):
        cut = sharded.per_shard(run, (sharded.QUERY_AXES, ("batch", "kv_heads")))
        jax.eval_shape(lambda *x: cut(*x, AttentionMask(window=7, query_offset=jnp.int32(3))), q, cache)
    assert seen == [(7, (2, 2, LENGTH, 32), (2, 2, LENGTH, 1), ())]


def test_one_device_is_not_cut():
    run = mock.Mock(__name__="run")
    for sizes in ((), (1, 1, 1)):
        with jax.set_mesh(mesh(*sizes)) if sizes else contextlib.nullcontext():
            assert sharded.per_shard(run)(1, 2, 3, MASK) is run.return_value
    run.assert_called_with(1, 2, 3, MASK)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8, 8, 8, 8, 32), "3 sequences do not divide over 2 devices .replica x data."),
        ((2, 8, 8, 8, 2, 32), "2 key/value heads do not divide over 4 devices .tensor."),
    ],
)
def test_what_does_not_divide_is_refused_in_one_line(shape, message):
    with small_tiles(), jax.set_mesh(mesh(1, 2, 4)), pytest.raises(UserError, match=message) as error:
        attention(*inputs(*shape)[:3], AttentionMask(), implementation="pallas_gpu")
    assert "\n" not in str(error.value)


def test_a_mesh_with_explicit_axes_is_refused_in_one_line():
    explicit = jax.make_mesh((1, 2, 4), ("replica", "data", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    arrays = inputs(*SHAPE)[:3]
    with small_tiles(), jax.set_mesh(explicit):
        with pytest.raises(UserError, match="cannot serve: the mesh's axis 'replica' is explicit") as error:
            attention(*arrays, AttentionMask(), implementation="pallas_gpu")
        with pytest.raises(UserError, match="axis 'replica' is explicit"):
            sharded.per_shard(of_mask("slopes"))(*arrays, MASK)
    assert "\n" not in str(error.value)


def test_a_kernel_is_asked_about_the_problem_of_one_device():
    asked = []
    kernel = sharded.Implementation(of_mask("slopes"), asked.append)
    with small_tiles(), jax.set_mesh(mesh(1, 2, 4)):
        table = {"pallas_gpu": sharded.on_shards(kernel)}
        with mock.patch.dict("llm_jax.kernels.attention.IMPLEMENTATIONS", table):
            mask = dataclasses.replace(MASK, window=5)
            jax.eval_shape(lambda *x: attention(*x, mask, implementation="pallas_gpu"), *inputs(*SHAPE)[:3])
    (problem,) = asked
    assert (problem.batch, problem.num_heads, problem.num_kv_heads, problem.static_window) == (2, 4, 2, 5)
