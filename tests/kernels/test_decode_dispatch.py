"""Decoding's one entry: what it chooses and refuses, on a mesh, for devices that are not here, and inside the model."""

import dataclasses
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import models
from llm_jax.config import ModelConfig, SamplingConfig
from llm_jax.errors import UserError
from llm_jax.kernels import attention as attention_entry
from llm_jax.kernels import choice, decode, flash_decoding, pallas_gpu_decode, pallas_tpu_decode
from llm_jax.kernels.attention import attention
from llm_jax.kernels.decode import decode_attention
from llm_jax.kernels.flash_decoding import Slots
from llm_jax.kernels.mask import AttentionMask
from llm_jax.kernels.sharded import QUERY_AXES, on_shards
from llm_jax.sampling.generate import generate
from tests.kernels.decoding import SHAPE, everything, expected, in_int8, inputs, interpreted

LAST = AttentionMask(query_offset=jnp.int32(39))


def served_by(form):
    """The table with one platform's kernel interpreted, as it would run on each device of a mesh."""
    kernel = on_shards(choice.Implementation(interpreted(form), choice.never), (QUERY_AXES, decode.SLOT_AXES))
    return mock.patch.dict(decode.IMPLEMENTATIONS, {f"pallas_{form}": kernel})


def abstract_mesh(kind, platform):
    device = AbstractDevice(device_kind=kind, num_cores=None if platform == "gpu" else 2, platform=platform)
    axes = ("replica", "data", "tensor")
    return AbstractMesh((1, 1, 1), axes, axis_types=(AxisType.Auto,) * 3, abstract_device=device)


DEVICES = {"gpu": abstract_mesh("NVIDIA A100-SXM4-80GB", "gpu"), "tpu": abstract_mesh("TPU v5", "tpu")}


def test_the_plain_form_agrees_with_the_definition():
    q, slots = inputs(*SHAPE)
    run = jax.jit(decode_attention)
    for seed in range(8):
        mask = everything(np.random.default_rng(seed), SHAPE[0], SHAPE[1], SHAPE[2])
        np.testing.assert_allclose(run(q, slots, mask), expected(q, slots, mask), rtol=2e-5, atol=2e-6)


def test_decoding_is_attention_with_one_query():
    q, slots = inputs(*SHAPE)
    mask = everything(np.random.default_rng(1), SHAPE[0], SHAPE[1], SHAPE[2])
    k_BSKH, v_BSKH = (array.transpose(0, 2, 1, 3) for array in slots.read(q.dtype))
    ours, theirs = jax.jit(decode_attention)(q, slots, mask), jax.jit(attention)(q, k_BSKH, v_BSKH, mask)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def chosen(q, slots, mask, **options):
    """Every choice that is logged."""
    with mock.patch.object(choice, "_announced", set()), mock.patch.object(choice.logger, "info") as info:
        jax.make_jaxpr(lambda *x: decode_attention(*x, **options))(q, slots, mask)
    return [call.args[0] % call.args[1:] for call in info.call_args_list]


def test_auto_takes_the_platforms_kernel_and_says_so():
    q, slots = inputs(1, 40, 2, 1, 32, jnp.bfloat16)
    assert chosen(q, slots, LAST) == ["decoding: reference (40 slots on cpu)"]
    for platform, mesh in DEVICES.items():
        with jax.sharding.use_abstract_mesh(mesh):
            (said,) = chosen(q, slots, LAST)
        assert said.startswith(f"decoding: pallas_{platform} (")


def test_auto_falls_back_where_the_kernel_cannot_serve_and_says_why():
    q, slots = inputs(1, 40, 2, 1, 32, jnp.float16)
    with jax.sharding.use_abstract_mesh(DEVICES["tpu"]):
        (said,) = chosen(q, slots, LAST)
    assert "reference (40 slots on tpu; not pallas_tpu: queries must be one of bfloat16, float32, got float16)" in said


def test_a_kernel_of_attention_goes_with_one_of_decoding():
    q, slots = inputs(1, 40, 2, 1, 32)
    assert chosen(q, slots, LAST, implementation="chunked") == ["decoding: reference (asked for by name)"]
    with pytest.raises(UserError, match="'pallas_gpu' cannot serve: it runs on gpu"):
        decode_attention(q, slots, LAST, implementation="mosaic_gpu")
    assert set(decode.AKIN) | set(decode.IMPLEMENTATIONS) >= set(attention_entry.IMPLEMENTATIONS)


def test_a_kernel_is_told_the_dtype_of_the_cache():
    q, slots = inputs(1, 40, 2, 1, 32)
    asked = []
    kernel = choice.Implementation(lambda q, slots, mask: q, asked.append)
    with mock.patch.dict(decode.IMPLEMENTATIONS, kernel=kernel):
        decode_attention(q.astype(jnp.bfloat16), in_int8(slots), LAST, implementation="kernel")
    assert [(problem.dtype, problem.cache_dtype) for problem in asked] == [("bfloat16", "int8")]


def wrong(**change):
    q, slots = inputs(2, 40, 2, 1, 32)
    return q, slots._replace(**change)


CODES, SCALES = jnp.zeros((2, 1, 40, 32), jnp.int8), jnp.zeros((2, 1, 40, 1))
MISTAKES = {
    "differ in shape": (*wrong(key=jnp.zeros((2, 1, 39, 32))), LAST, "auto"),
    "2 query heads are not a multiple of 3": (inputs(2, 40, 2, 1, 32)[0], inputs(2, 40, 3, 3, 32)[1], LAST, "auto"),
    "key_scale of int8 slots has shape None, expected": (*wrong(key=CODES, value=CODES), LAST, "auto"),
    "value_scale of float32 slots has shape": (*wrong(value_scale=jnp.zeros((2, 1, 40, 1))), LAST, "auto"),
    "value_scale must be float32, got int32": (
        *wrong(key=CODES, value=CODES, key_scale=SCALES, value_scale=SCALES.astype(jnp.int32)),
        LAST,
        "auto",
    ),
    "keys are float32 and values bfloat16": (*wrong(value=CODES.astype(jnp.bfloat16)), LAST, "auto"),
    "must be at least 1 in every dimension": (inputs(2, 40, 2, 1, 32)[0], Slots(*[CODES[:, :0]] * 2), LAST, "auto"),
    "must be int8 or floating point, got int32": (*wrong(key=CODES.astype(jnp.int32)), LAST, "auto"),
    "mask.slopes has shape": (*wrong(), AttentionMask(slopes=jnp.ones(3)), "auto"),
    "did you mean 'pallas_gpu'": (*wrong(), LAST, "palas_gpu"),
    "'pallas_tpu' cannot serve: it runs on tpu": (*wrong(), LAST, "pallas_tpu"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_line(message):
    *arguments, implementation = MISTAKES[message]
    with pytest.raises(UserError, match=message) as error:
        decode_attention(*arguments, implementation=implementation)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["gpu", "tpu"])
def test_on_a_mesh_each_device_decodes_its_own_rows_and_heads(form):
    """Batch over data, heads (with their slopes) over tensor, an int8 cache: the same numbers, nothing gathered."""
    mesh = jax.make_mesh((1, 2, 2), ("replica", "data", "tensor"), axis_types=(AxisType.Auto,) * 3)
    q, slots = inputs(4, 40, 8, 4, 32)
    slots = in_int8(slots)
    mask = everything(np.random.default_rng(0), 4, 40, 8)
    heads = NamedSharding(mesh, P("data", None, "tensor"))
    shards = jax.device_put(q, heads), jax.device_put(slots, NamedSharding(mesh, P("data", "tensor")))

    def run(q, slots, mask):
        return decode_attention(q, slots, mask, implementation=f"pallas_{form}")

    with served_by(form), jax.set_mesh(mesh):
        program = jax.jit(run, out_shardings=heads).lower(*shards, mask).compile()
        actual = program(*shards, mask)
    np.testing.assert_allclose(actual, expected(q, slots, mask), rtol=2e-5, atol=2e-6)
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()


def arguments(dtype, B=8, S=4096, N=64, K=8, H=128):
    array = jax.ShapeDtypeStruct
    scales = array((B, K, S, 1), jnp.float32) if dtype == jnp.int8 else None
    slots = Slots(array((B, K, S, H), dtype), array((B, K, S, H), dtype), scales, scales)
    mask = AttentionMask(
        window=array((), jnp.int32),
        query_segment_ids=array((B, 1), jnp.int32),
        key_segment_ids=array((B, S), jnp.int32),
        query_offset=array((), jnp.int32),
        slopes=array((N,), jnp.float32),
        query_scale=array((B, 1), jnp.float32),
    )
    return array((B, 1, N, H), jnp.bfloat16), slots, mask


def largest_arrays(jaxpr):
    """The sizes of what a program computes outside its kernels."""
    for equation in jaxpr.eqns:
        yield from (math.prod(result.aval.shape) for result in equation.outvars)
        if equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                yield from largest_arrays(inner)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("form", ["gpu", "tpu"])
def test_lowers_for_absent_devices_and_copies_no_cache(form, dtype):
    given = arguments(dtype)
    with jax.sharding.use_abstract_mesh(DEVICES[form]):
        traced = jax.jit(decode_attention).trace(*given)
        platforms = {"gpu": ("cuda",), "tpu": ("tpu",)}[form]
        text = traced.lower(lowering_platforms=platforms).as_text()
    assert {"gpu": "triton", "tpu": "tpu_custom_call"}[form] in text and "decode_attention" in text
    assert max(largest_arrays(traced.jaxpr.jaxpr)) < math.prod(given[1].key.shape) // 16


# Query heads, key/value heads and cache of the reports' models.
MODELS = {"7B": (32, 32, 4096), "13B": (40, 40, 4096), "Qwen-7B": (32, 32, 8192), "70B": (64, 8, 4096)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("name", MODELS)
def test_one_row_fills_a_gpu_and_eight_do_not_write_much(name, dtype):
    N, K, S = MODELS[name]
    for B in (1, 8):
        _, slots, _ = arguments(dtype, B, S, N, K)
        splits = pallas_gpu_decode.default_blocks(slots).splits
        assert B * K * splits >= 2 * 108, "two programs for each multiprocessor of an A100"
        written = B * N * splits * 4 * (128 + 1)
        assert written < (0.13 if B == 1 else 0.07) * sum(array.size * array.dtype.itemsize for array in slots[:2])


def test_the_tpus_blocks_fit_its_vector_memory():
    for N, K, S in MODELS.values():
        _, slots, _ = arguments(jnp.bfloat16, 1, S, N, K)
        blocks = pallas_tpu_decode.default_blocks(slots)
        assert K % blocks.heads == 0 and 4 * blocks.heads * blocks.keys * 128 * 2 <= 4 * 2**20
        assert K // blocks.heads * blocks.splits >= 2, "work for both cores of a chip"


CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=40,
    max_length=48,
    init_std=0.4,
    position="alibi",
    window_sizes=(9, 0),
)


@pytest.mark.parametrize(
    ("form", "name", "reader"), [("gpu", "mosaic_gpu", "mosaic_gpu"), ("tpu", "splash", "pallas_tpu")]
)
def test_the_model_generates_the_same_with_the_kernel(form, name, reader):
    """Left-padded prompts, ALiBi, a window in one layer, grouped heads, a scan over the layers, codes in the cache.

    The names are those of implementations without a form for decoding; splash could not read the prompts either, so
    that another one does.
    """
    params = models.init(CONFIG, jax.random.key(1))
    prompts = [np.random.default_rng(i).integers(3, 61, length).tolist() for i, length in enumerate((5, 1, 17))]
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0, cache_dtype="int8")
    plain = generate(params, CONFIG, prompts, sampling)
    prefill = mock.patch.dict(attention_entry.IMPLEMENTATIONS, {reader: attention_entry.IMPLEMENTATIONS["reference"]})
    config = dataclasses.replace(CONFIG, attention=name)
    with served_by(form), prefill, mock.patch.object(flash_decoding, "combine", wraps=flash_decoding.combine) as used:
        ours = generate(params, config, prompts, sampling)
    assert used.called
    for a, b in zip(ours, plain, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-4)
