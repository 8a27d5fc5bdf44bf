"""Adapters against the dense matrices that they stand for, qwix's LoRA, and the same on a mesh."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from llm_jax import models
from llm_jax.config import LoraConfig, MeshConfig, ModelConfig, OptimizerConfig, SamplingConfig
from llm_jax.errors import UserError
from llm_jax.models import lora
from llm_jax.models.linear import Adapted, linear
from llm_jax.optim import adamw
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import rules
from llm_jax.sampling.generate import generate

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    ffn_size=40,
    max_length=32,
    init_std=0.2,
)
LORA = LoraConfig(rank=3, alpha=6.0, targets=("attention", "ffn"))
EVERYTHING = dataclasses.replace(LORA, targets=("attention", "ffn", "head"))
SCALE = 2.0
TOKENS = np.random.default_rng(1).integers(0, 48, (6, 4)).astype(np.int32)
# Input and output features of a kernel, by name.
SIDES = {
    "query": (1, 2),
    "key": (1, 2),
    "value": (1, 2),
    "output": (2, 1),
    "gate": (1, 1),
    "up": (1, 1),
    "down": (1, 1),
}

logits = jax.jit(models.logits, static_argnums=1)


@functools.cache
def base(kind="none", **changes):
    config = dataclasses.replace(MODEL, **changes)
    params = jax.jit(models.init, static_argnums=0)(config, jax.random.key(0))
    return (config, params) if kind == "none" else models.quantize(params, config, kind, 0 if kind == "int8" else 8)


@functools.cache
def trained(config, settings):
    """Adapters that do something."""

    @jax.jit
    def make(key):
        fresh = lora.init(config, settings, key)
        return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.fold_in(key, x.size), x.shape), fresh)

    return make(jax.random.key(1))


def adapter_paths(adapters):
    flat, _ = jax.tree_util.tree_flatten_with_path(adapters, is_leaf=lambda x: isinstance(x, lora.Adapter))
    return [(tuple(key.key for key in path), adapter) for path, adapter in flat]


def matrices(path, kernel, adapter):
    """Float64 (kernel [L, I, O], down [L, I, R], up [L, R, O]) of a kernel and its adapter, features flattened."""
    stacked = 1 if path[0] == "layers" else 0
    inputs = SIDES[path[-2]][0] if stacked else 1
    kernel, down, up = (np.asarray(x, np.float64) for x in (kernel, adapter.down, adapter.up))
    if not stacked:
        kernel, down, up = kernel[None], down[None], up[None]
    I = int(np.prod(kernel.shape[1 : 1 + inputs]))
    layers, R = len(kernel), down.shape[-1]
    return kernel.reshape(layers, I, -1), down.reshape(layers, I, R), up.reshape(layers, R, -1)


def at(tree, path):
    return functools.reduce(lambda node, name: node[name], path, tree)


def dense(params, adapters):
    """The parameters with every change written out, in numpy."""
    params = jax.tree.map(np.asarray, params)
    for path, adapter in adapter_paths(adapters):
        kernel = at(params, path)
        kernel_LIO, down_LIR, up_LRO = matrices(path, kernel, adapter)
        changed = kernel_LIO + SCALE * np.einsum("lir,lro->lio", down_LIR, up_LRO)
        at(params, path[:-1])[path[-1]] = changed.reshape(kernel.shape).astype(np.float32)
    return params


def total_loss(params, config):
    return jnp.sum(jnp.sin(models.logits(params, config, TOKENS)))


@functools.partial(jax.jit, static_argnums=(2, 3))
def value_and_gradient(adapters, params, config, settings):
    return jax.value_and_grad(lambda a: total_loss(lora.attach(params, a, settings), config))(adapters)


dense_gradient = jax.jit(jax.value_and_grad(total_loss), static_argnums=1)


def by_the_chain_rule(params, adapters, gradient):
    """What dense gradients make of the factors: d down = scale * G up^T, d up = scale * down^T G."""
    expected = {}
    for path, adapter in adapter_paths(adapters):
        change_LIO, down_LIR, up_LRO = matrices(path, at(gradient, path), adapter)
        expected[path] = (
            SCALE * np.einsum("lio,lro->lir", change_LIO, up_LRO).reshape(adapter.down.shape),
            SCALE * np.einsum("lir,lio->lro", down_LIR, change_LIO).reshape(adapter.up.shape),
        )
    return expected


CASES = {
    "scanned": ({"num_kv_heads": 2}, EVERYTHING),
    "unrolled": ({"scan_layers": False, "position": "alibi", "tie_embeddings": True}, LORA),
    "remat": ({"remat": "full", "norm_head": True}, EVERYTHING),
    "dots": ({"remat": "dots", "qkv_bias": True}, dataclasses.replace(LORA, targets=("value", "down"))),
}


@pytest.mark.parametrize("case", ["scanned", "unrolled", "remat", pytest.param("dots", marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_the_dense_matrices(case):
    changes, settings = CASES[case]
    config, params = base(**changes)
    adapters = trained(config, settings)
    value, gradient = value_and_gradient(adapters, params, config, settings)
    expected_value, expected = dense_gradient(dense(params, adapters), dataclasses.replace(config, remat="none"))
    np.testing.assert_allclose(value, expected_value, rtol=1e-4, atol=1e-3)
    wanted = by_the_chain_rule(params, adapters, expected)
    for path, adapter in adapter_paths(gradient):
        for got, want in zip((adapter.down, adapter.up), wanted[path], strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max(), err_msg=str(path))


@pytest.mark.parametrize(
    ("kind", "blocks"), [("int4", True), ("int8", False), pytest.param("int8", True, marks=pytest.mark.slow)]
)
def test_over_a_quantised_base_they_are_those_of_its_rounded_weights(kind, blocks, monkeypatch):
    monkeypatch.setattr(models.quantized, "_in_blocks", lambda: blocks)
    monkeypatch.setattr(models.quantized, "BLOCK_SIZE", 300)
    config, params = base(kind)
    adapters = trained(config, EVERYTHING)
    compiled_anew = jax.jit(jax.value_and_grad(lambda a: total_loss(lora.attach(params, a, EVERYTHING), config)))
    value, gradient = compiled_anew(adapters)
    float_config, rounded = models.dequantize(params, config)
    assert float_config == MODEL
    expected_value, expected = dense_gradient(dense(rounded, adapters), MODEL)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4, atol=1e-3)
    for path, (down, up) in by_the_chain_rule(rounded, adapters, expected).items():
        np.testing.assert_allclose(at(gradient, path).down, down, atol=2e-4 * np.abs(down).max(), err_msg=str(path))
        np.testing.assert_allclose(at(gradient, path).up, up, atol=2e-4 * np.abs(up).max(), err_msg=str(path))


@pytest.mark.parametrize(("kind", "settings"), [("none", EVERYTHING), ("int4", LORA)])
def test_fresh_adapters_change_nothing_bit_for_bit(kind, settings):
    config, params = base(kind)
    fresh = lora.init(config, settings, jax.random.key(2))
    np.testing.assert_array_equal(
        logits(lora.attach(params, fresh, settings), config, TOKENS), logits(params, config, TOKENS)
    )
    down = fresh["layers"]["ffn"]["down"]["kernel"].down
    np.testing.assert_allclose(jnp.std(down), 40**-0.5, rtol=0.2)
    assert not np.array_equal(down[0], down[1])


def test_one_projection_is_that_of_qwix():
    kernel, down, up, x = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(32, 40), (32, 3), (3, 40), (2, 8, 32)])
    )
    theirs = qwix.apply_lora_to_model(nn.Dense(40, use_bias=False), qwix.LoraProvider(rank=3, alpha=6.0))
    weights = {"kernel": kernel, "kernel_lora_a": down, "kernel_lora_b": up}
    want, pull = jax.vjp(lambda weights, x: theirs.apply({"params": weights}, x), weights, x)
    got, pull_ours = jax.vjp(
        lambda down, up, x: linear(x, Adapted(kernel, down, up, 2.0), ("embed", "ffn")), down, up, x
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    cotangent = jax.random.normal(jax.random.key(9), got.shape)
    wanted_weights, wanted_x = pull(cotangent)
    wanted = (wanted_weights["kernel_lora_a"], wanted_weights["kernel_lora_b"], wanted_x)
    for ours, want in zip(pull_ours(cotangent), wanted, strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-3)


def arrays(compiled, operation=r"[\w-]+"):
    """The shapes of all float arrays that an operation makes in a compiled function."""
    found = re.findall(rf"= (?:f32|bf16)\[([\d,]*)\]\S* {operation}\(", compiled.as_text())
    return {tuple(map(int, filter(None, shape.split(",")))) for shape in found}


def test_no_product_makes_a_gradient_of_the_base():
    """That of gate (plain) and up (adapted) is 32 x 40, that of the head 32 x 48; there are 24 tokens."""
    (config, params), settings = base(), dataclasses.replace(LORA, targets=("query", "up"))
    gradients = {(32, 40), (40, 32), (32, 48), (48, 32)}
    ours = value_and_gradient.lower(trained(config, settings), params, config, settings).compile()
    everything = dense_gradient.lower(params, config).compile()
    assert len(gradients & arrays(everything, "dot")) >= 2
    assert not gradients & arrays(ours, "dot")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_training_over_few_bits_makes_no_float_copy_even_of_one_matrix(kind):
    """What is derived by JAX would keep each as floats for the backward pass."""
    config = dataclasses.replace(MODEL, hidden_size=256, ffn_size=1024)
    described = dataclasses.replace(config, quantization=kind, quantization_group=32)
    compiled = value_and_gradient.lower(
        lora.abstract(config, LORA), models.abstract(described), described, LORA
    ).compile()
    assert max(map(math.prod, arrays(compiled))) == 256 * 1024 / 2  # a block


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
def test_a_kernel_under_an_adapter_gets_a_zero_gradient(kind):
    kernel = base(kind)[1]["layers"]["ffn"]["up"]["kernel"]
    one = Adapted(jax.tree.map(lambda leaf: leaf[0], kernel), jnp.ones((32, 3)), jnp.ones((3, 40)), SCALE)
    total = jax.grad(lambda kernel: linear(jnp.ones((1, 2, 32)), kernel, ("embed", "ffn")).sum(), allow_int=True)
    gradient = total(one)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.kernel) if leaf.dtype != jax.dtypes.float0)
    np.testing.assert_allclose(gradient.up, np.full((3, 40), SCALE * 2 * 32))
    np.testing.assert_allclose(gradient.down, np.full((32, 3), SCALE * 2 * 40))


def mesh_of(*sizes):
    return mesh_lib.build(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def placed(config, params, adapters, settings, mesh):
    layout = rules.shardings(models.logical_axes(config), params, mesh)
    beside = rules.shardings(lora.logical_axes(config, settings), adapters, mesh)
    return jax.device_put(params, layout), jax.device_put(adapters, beside)


@pytest.mark.parametrize("kind", ["none", pytest.param("int8", marks=pytest.mark.slow)])
def test_every_mesh_gives_the_same(kind):
    config, params = base(kind)
    adapters, mesh = trained(config, EVERYTHING), mesh_of(1, 2, 4)
    value, gradient = value_and_gradient(adapters, params, config, EVERYTHING)
    sharded_params, sharded = placed(config, params, adapters, EVERYTHING, mesh)
    with jax.set_mesh(mesh):
        other_value, other = value_and_gradient(sharded, sharded_params, config, EVERYTHING)
    np.testing.assert_allclose(other_value, value, rtol=1e-5, atol=1e-4)
    for (path, got), want, beside in zip(
        jax.tree_util.tree_leaves_with_path(other), jax.tree.leaves(gradient), jax.tree.leaves(sharded), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), err_msg=jax.tree_util.keystr(path))
        assert got.sharding.is_equivalent_to(beside.sharding, got.ndim)
    up = sharded["layers"]["attention"]["query"]["kernel"].up  # [L, R, N, H]: its heads over `tensor`
    assert up.addressable_shards[0].data.shape == (2, 3, 1, 8)
    down = sharded["layers"]["attention"]["query"]["kernel"].down  # [L, D, R]: its features over `data`
    assert down.addressable_shards[0].data.shape == (2, 16, 3)


def test_merged_equals_attached_where_it_is():
    config, params = base(norm_head=True)
    adapters, mesh = trained(config, EVERYTHING), mesh_of(1, 2, 4)
    params, adapters = placed(config, params, adapters, EVERYTHING, mesh)
    merged = lora.merge(params, adapters, EVERYTHING)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for leaf, want, expected in zip(*map(jax.tree.leaves, (merged, params, dense(params, adapters)))):
        assert leaf.dtype == want.dtype and leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
        np.testing.assert_allclose(leaf, expected, atol=1e-6)
    with jax.set_mesh(mesh):
        attached = logits(lora.attach(params, adapters, EVERYTHING), config, TOKENS)
        np.testing.assert_allclose(logits(merged, config, TOKENS), attached, atol=5e-5)
    assert float(jnp.abs(attached - logits(params, config, TOKENS)).max()) > 0.1


def test_generation_follows_the_merged_model():
    config, params = base("int8")
    adapters, prompt = trained(config, EVERYTHING), [1, 2, 3]
    sampling = SamplingConfig(max_new_tokens=5, temperature=0.0)
    (generated,) = generate(lora.attach(params, adapters, EVERYTHING), config, [prompt], sampling)
    float_config, rounded = models.dequantize(params, config)
    text = np.array([[*prompt, *generated.tokens]])
    likeliest = logits(lora.merge(rounded, adapters, EVERYTHING), float_config, text).argmax(-1)
    np.testing.assert_array_equal(text[0, 3:], likeliest[0, 2:-1])


def test_factors_of_bfloat16_compute_have_float32_gradients_that_add_up():
    """4096 equal terms of 1 + 2^-7: a bfloat16 sum would lose the last 32."""
    x = jnp.full((1, 4096, 1), 1 + 2**-7, jnp.bfloat16)
    kernel, down, up = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1))

    def total(down, up):
        return linear(x, Adapted(kernel, down, up, 1.0), ("embed", "ffn")).astype(jnp.float32).sum()

    for gradient in jax.grad(total, (0, 1))(down, up):
        assert gradient.dtype == jnp.float32
        assert float(gradient[0, 0]) == 4096 + 32


def test_adapters_of_a_bfloat16_model_are_float32_and_merging_keeps_its_dtype():
    config, params = base(param_dtype="bfloat16", compute_dtype="bfloat16")
    adapters = trained(config, LORA)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {np.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(lora.merge(params, adapters, LORA))} == {jnp.dtype("bfloat16")}
    gradient = jax.eval_shape(lambda a: value_and_gradient(a, params, config, LORA), adapters)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype("float32")}


def test_the_count_is_that_of_both_sides():
    config = dataclasses.replace(MODEL, num_kv_heads=2)
    attention = (32 + 32) + 2 * (32 + 16) + (32 + 32)  # query, key and value, output
    ffn = 3 * (32 + 40)
    assert lora.count(config, LORA) == 2 * 3 * (attention + ffn)
    assert lora.count(config, EVERYTHING) == 2 * 3 * (attention + ffn) + 3 * (32 + 48)
    assert lora.count(config, LoraConfig(rank=5, targets=("value",))) == 2 * 5 * (32 + 16)
    abstract = lora.abstract(config, EVERYTHING)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == lora.count(config, EVERYTHING)
    quantized = dataclasses.replace(config, quantization="int4", quantization_group=8)
    assert lora.abstract(quantized, EVERYTHING) == abstract


def test_a_plain_array_replaces_its_parameter():
    config, params = base(output="reward")
    adapters = trained(config, LORA)
    head = jax.tree.map(lambda x: x + 1, params["reward_head"])
    for combine in (lora.attach, lora.merge):
        got = combine(params, {**adapters, "reward_head": head}, LORA)
        assert got["reward_head"]["kernel"] is head["kernel"] and got["final_norm"] is params["final_norm"]


def test_weight_decay_knows_the_factors():
    adapters = lora.abstract(MODEL, EVERYTHING)
    assert all(jax.tree.leaves(adamw.decay_mask(adapters)))
    adamw.build(OptimizerConfig(), adamw.decay_mask).init(trained(MODEL, LORA))


def test_mistakes_are_refused_in_one_line():
    key = jax.random.key(0)
    with pytest.raises(UserError, match=r"LoraConfig.targets='atention' is not one of .*; did you mean 'attention'\?"):
        LoraConfig(rank=2, targets=("atention",))
    with pytest.raises(UserError, match=r"LoraConfig.targets is empty"):
        LoraConfig(rank=2, targets=())
    with pytest.raises(UserError, match=r"LoraConfig.rank=-1 must not be negative"):
        LoraConfig(rank=-1)
    with pytest.raises(UserError, match=r"LoraConfig.alpha=0.0 must be positive"):
        LoraConfig(alpha=0.0)
    with pytest.raises(UserError, match=r"LoraConfig.rank=0 means no adapters: set a rank"):
        lora.init(MODEL, LoraConfig(), key)
    narrow = dataclasses.replace(MODEL, num_kv_heads=1)
    with pytest.raises(
        UserError, match=r"rank=9 is above the smaller side of layers/attention/key/kernel, 32 x 8: .* 8"
    ):
        lora.init(narrow, LoraConfig(rank=9), key)
    for changes in ({"tie_embeddings": True}, {"output": "reward"}):
        with pytest.raises(UserError, match="this model has no 'head' of its own"):
            lora.init(dataclasses.replace(MODEL, **changes), EVERYTHING, key)
    config, params = base("int8")
    adapters = trained(config, LORA)
    with pytest.raises(UserError, match=r"not merged into quantised weights: models.dequantize them first"):
        lora.merge(params, adapters, LORA)
    config, params = base()
    with pytest.raises(UserError, match=r"merge a model's adapters .* before it is laid out for decoding"):
        models.for_decoding(lora.attach(params, adapters, LORA), config)
    decoding, laid_out = models.for_decoding(params, config)
    with pytest.raises(UserError, match="before they are laid out for decoding"):
        lora.attach(laid_out, adapters, LORA)
    with pytest.raises(UserError, match="not laid out for decoding"):
        lora.init(decoding, LORA, key)
