"""Quantised weights against a brute-force rounding, and the products with them against plain floats."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llm_jax import config as config_lib
from llm_jax import models
from llm_jax.config import MeshConfig, ModelConfig, TrainConfig
from llm_jax.errors import UserError
from llm_jax.models import quantized
from llm_jax.models.quantized import PackedArray, Quantized
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import rules
from llm_jax.training import checkpoint

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=96,
    max_length=32,
    init_std=0.2,
)
KINDS = [("int8", 0), ("int8", 32), ("int4", 0), ("int4", 16)]
VARIANTS = [{"qkv_bias": True}, {"norm_head": True}, {"tie_embeddings": True, "position": "alibi"}]


def tokens(rows=2, length=8):
    return jax.random.randint(jax.random.key(1), (rows, length), 0, MODEL.vocab_size)


@functools.cache
def float_model(**changes):
    config = dataclasses.replace(MODEL, **changes)

    @jax.jit
    def init(key):  # with biases and norms that are not the same everywhere
        noise = functools.partial(jax.random.normal, key)
        return jax.tree.map(lambda x: x + 0.05 * noise(x.shape), models.init(config, key))

    return config, init(jax.random.key(0))


@functools.cache
def quantized_model(kind, group=None, **changes):
    config, params = float_model(**changes)
    return models.quantize(params, config, kind, group)


logits = jax.jit(models.logits, static_argnums=1)


def is_quantized(leaf):
    return isinstance(leaf, Quantized)


def values_of(weight):
    """What the stored bits mean, in numpy, without a function of the library."""
    values, scales = np.asarray(weight.qvalue).astype(np.int64), np.asarray(weight.scale).astype(np.float64)
    if isinstance(weight, PackedArray):
        axis = weight.axis % values.ndim
        bits = values % 256
        nibbles = np.stack([bits % 16, bits // 16], axis + 1)
        nibbles = np.where(nibbles > 7, nibbles - 16, nibbles)
        values = nibbles.reshape([n * 2 if i == axis else n for i, n in enumerate(values.shape)])
    for axis, (size, count) in enumerate(zip(values.shape, scales.shape)):
        scales = np.repeat(scales, size // count, axis)
    return values * scales


def to_float(params):
    return jax.tree.map(
        lambda leaf: jnp.asarray(values_of(leaf), jnp.float32) if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )


def brute_force(weight_KN, group, lowest, scale_dtype):
    """One group of one column after the other: the greatest weight becomes `lowest`, the others multiples."""
    result = np.zeros_like(weight_KN)
    for start, column in itertools.product(range(0, len(weight_KN), group), range(weight_KN.shape[1])):
        part = weight_KN[start : start + group, column]
        greatest = max(part, key=abs)
        scale = np.asarray(np.float32(greatest) / np.float32(lowest), scale_dtype).astype(np.float32) if greatest else 1
        result[start : start + group, column] = np.clip(np.round(part / scale), lowest, -lowest - 1) * scale
    return result


@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int8", 8), ("int4", 0), ("int4", 8)])
def test_rounding_is_that_of_a_loop_over_groups(kind, group):
    weight_KN = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
    weight_KN[8:16, 2] = 0  # a group without any weight
    tiles = quantized.tile_shape(weight_KN.shape, (0,), kind, group)
    dtype = jnp.dtype("bfloat16" if group else "float32")
    array = quantized.quantize_array(jnp.asarray(weight_KN), tiles, -2 if kind == "int4" else None, dtype)
    expected = brute_force(weight_KN, group or 24, -8 if kind == "int4" else -128, dtype)
    np.testing.assert_allclose(values_of(array), expected, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(quantized.dequantize(array)), values_of(array).astype(np.float32))


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_no_weight_moves_by_more_than_half_a_step(kind, group):
    weight = np.asarray(float_model()[1]["layers"]["attention"]["output"]["kernel"])
    kernel = quantized_model(kind, group)[1]["layers"]["attention"]["output"]["kernel"]
    assert kernel.scale.shape == (2, *({0: (1, 1), 16: (4, 1), 32: (4, 1)}[group]), 64)
    steps = np.broadcast_to(np.abs(np.asarray(kernel.scale, np.float64)), weight.shape)
    moved = np.abs(values_of(kernel) - weight)
    # A weight opposite to its group's greatest, and nearly as great, is cut off by up to another half.
    cut = np.abs(weight) > steps * (7.5 if kind == "int4" else 127.5)
    assert np.all(moved <= np.where(cut, 1.01, 0.5001) * steps) and np.mean(cut) < 0.2
    assert np.mean(moved) > 0.05 * np.mean(steps)


@pytest.mark.parametrize(
    ("changes", "kind"), [*(({}, kind) for kind in KINDS), *((changes, KINDS[-1]) for changes in VARIANTS)], ids=str
)
def test_logits_are_those_of_the_dequantised_weights(changes, kind):
    config, params = float_model(**changes)
    new_config, rounded = quantized_model(*kind, **changes)
    expected = logits(to_float(rounded), config, tokens())
    np.testing.assert_allclose(logits(rounded, new_config, tokens()), expected, atol=2e-5)
    assert np.max(np.abs(expected - logits(params, config, tokens()))) > 1e-3


@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int4", 16)])
def test_blocks_of_any_size_and_no_blocks_agree(kind, group, monkeypatch):
    config, params = quantized_model(kind, group)
    expected = logits(params, config, tokens())

    def again(**changes):  # compiled anew
        return jax.jit(lambda: models.logits(params, dataclasses.replace(config, **changes), tokens()))()

    monkeypatch.setattr(quantized, "BLOCK_SIZE", 200)
    np.testing.assert_allclose(again(), expected, atol=2e-5)
    monkeypatch.setattr(quantized, "_in_blocks", lambda: False)
    np.testing.assert_allclose(again(), expected, atol=2e-5)
    np.testing.assert_allclose(again(compute_dtype="bfloat16"), expected, atol=0.3)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_decoding_with_a_cache_gives_the_same_logits(kind):
    config, params = quantized_model(kind, 0 if kind == "int8" else 16)
    expected = logits(params, config, tokens())
    config, params = models.for_decoding(params, config)
    cache = models.init_cache(config, 2, 8, stacked=False)
    step = jax.jit(lambda token_B1, cache: models.logits(params, config, token_B1, cache=cache))
    steps = []
    for token_B1 in jnp.split(tokens(), 8, axis=1):
        logits_B1V, cache = step(token_B1, cache)
        steps.append(logits_B1V)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_loop_makes_no_float_copy_of_the_weights(kind):
    config = dataclasses.replace(MODEL, hidden_size=256, ffn_size=1024, num_layers=4, decoding_layout=True)
    float_bytes = 4 * models.count_parameters(config)
    config = dataclasses.replace(config, quantization=kind, quantization_group=32)
    stacked = models.abstract(config)
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked["layers"])

    @jax.jit
    def loop(params, tokens):
        def step(_, tokens):
            return jnp.argmax(models.logits(params, config, tokens), axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, 4, step, tokens)

    compiled = loop.lower({**stacked, "layers": (layer,) * 4}, tokens(1, 1)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < float_bytes / 6


def test_bytes_are_halved_and_quartered():
    matrices, tables, norms = 64 * (4 * 16 * 2 + 2 * 16 * 2) + 3 * 64 * 96, 2 * 48 * 64, 5 * 64
    scales_of_columns, scales_of_rows = 4 * 16 + 2 * 2 * 16 + 64 + 2 * 96 + 64, 2 * 48
    assert models.weight_bytes(float_model()[1]) == 4 * (2 * matrices + tables + norms)
    int8 = 2 * matrices + tables + 4 * (norms + 2 * scales_of_columns + scales_of_rows)
    assert models.weight_bytes(quantized_model("int8", 0)[1]) == int8
    int4 = 2 * (matrices / 2 + 2 * matrices / 16) + tables + 4 * (norms + scales_of_rows)
    assert models.weight_bytes(quantized_model("int4", 16)[1]) == int4


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_the_config_describes_the_parameters(kind, group):
    config, params = quantized_model(kind, group)
    described = models.abstract(config)
    assert jax.tree.structure(described) == jax.tree.structure(params)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(described)):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    assert models.count_parameters(config) == models.count_parameters(MODEL)


def test_donated_weights_are_freed():
    config, params = float_model()
    params = jax.tree.map(jnp.copy, params)
    models.quantize(params, config, "int4", 16, donate=True)
    assert params["layers"]["ffn"]["up"]["kernel"].is_deleted() and params["head"]["kernel"].is_deleted()


def mesh_of(*sizes):
    return mesh_lib.build(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


@pytest.mark.parametrize(("kind", "group", "sizes"), [("int8", 0, (1, 8, 1)), ("int4", 16, (1, 4, 2))], ids=str)
def test_sharded_weights_give_the_same_logits(kind, group, sizes):
    changes = {"hidden_size": 128, "ffn_size": 128, "init_std": 0.1}
    (config, params), mesh = float_model(**changes), mesh_of(*sizes)
    new_config, rounded = quantized_model(kind, group, **changes)
    layout = rules.shardings(models.logical_axes(config), params, mesh)
    _, sharded = models.quantize(jax.device_put(params, layout), config, kind, group)
    for leaf, wanted in zip(jax.tree.leaves(sharded), jax.tree.leaves(rounded)):
        np.testing.assert_array_equal(leaf, wanted)
    up = sharded["layers"]["ffn"]["up"]["kernel"]
    assert up.qvalue.addressable_shards[0].data.nbytes * 8 == up.qvalue.nbytes
    scale_axes = (None, "embed" if group else None, "ffn")
    assert up.scale.sharding.is_equivalent_to(NamedSharding(mesh, rules.partition_spec(scale_axes)), 3)
    expected = logits(rounded, new_config, tokens(8))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(sharded, new_config, tokens(8)), expected, atol=5e-5)


def test_groups_that_a_mesh_would_cut_are_refused():
    config, params = float_model()
    params = jax.device_put(params, rules.shardings(models.logical_axes(config), params, mesh_of(1, 8, 1)))
    with pytest.raises(UserError, match="kernel/scale: its 'embed' axis of size 4 does not divide over 8"):
        models.quantize(params, config, "int4", 16)


@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int4", 16)])
@pytest.mark.parametrize("sizes", [None, (1, 2, 2)], ids=str)
def test_checkpoints_restore_bit_for_bit(kind, group, sizes, tmp_path):
    config, params = quantized_model(kind, group)
    checkpoint.save_model(tmp_path, config, params)
    mesh = sizes and mesh_of(*sizes)
    loaded_config, loaded, _ = checkpoint.load_model(tmp_path, mesh=mesh)
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for leaf, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(params)):
        assert leaf.dtype == wanted.dtype
        np.testing.assert_array_equal(leaf, wanted)
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert stored < models.weight_bytes(params) + 60_000  # with all of the metadata


@pytest.mark.parametrize("features", [(576, 128, 96), (64, 128, 64), (11008, 128, 128), (10, 4, 2), (9, 9, 9)])
def test_a_group_is_the_largest_that_divides_the_features(features):
    size, group, expected = features
    assert quantized.group_size(size, group, "int8" if size % 2 else "int4") == expected


def test_mistakes_are_refused_in_one_line():
    config, params = float_model()
    with pytest.raises(UserError, match="quantize='int3' is not one of int8, int4"):
        models.quantize(params, config, "int3")
    with pytest.raises(UserError, match=r"int4 groups of up to 8 do not divide 62 input features \(the nearest is 2\)"):
        models.abstract(dataclasses.replace(MODEL, hidden_size=62, quantization="int4", quantization_group=8))
    new_config, rounded = quantized_model("int8", 0)
    with pytest.raises(UserError, match="weights are int8 already"):
        models.quantize(rounded, new_config, "int4")
    with pytest.raises(UserError, match="laid out for decoding"):
        models.quantize(models.for_decoding(params, config)[1], config, "int4")
    with pytest.raises(
        UserError, match=r"TrainConfig\.model\.quantization='int8': quantised weights cannot be trained"
    ):
        TrainConfig(model=new_config)
    with pytest.raises(UserError, match="did you mean 'int8'"):
        config_lib.from_config_dict(ModelConfig, {"quantization": "int"})
    with pytest.raises(TypeError, match="grad requires"):
        jax.grad(lambda params: models.logits(params, new_config, tokens()).sum())(rounded)
