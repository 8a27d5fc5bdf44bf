"""GGUF files written by the `gguf` package: what is loaded gives the logits of a numpy decoder on the same weights."""

import dataclasses
import logging
import struct

import gguf
import jax
import numpy as np
import pytest

from llm_jax import gguf_file, models
from llm_jax.config import MeshConfig, ModelConfig, RopeScalingConfig
from llm_jax.errors import UserError
from llm_jax.interop import gguf as interop
from llm_jax.parallel import mesh as meshes
from tests.models import oracle

Kind = gguf.GGMLQuantizationType
CONFIG = ModelConfig(
    vocab_size=40, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96, max_length=32,
    rope_theta=500.0, norm_eps=1e-5,
)  # fmt: skip
WIDE = dataclasses.replace(CONFIG, hidden_size=256, ffn_size=256, num_heads=4, head_dim=64)  # of whole k-quant blocks
K_QUANTS = [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 39]


def random_weights(config, seed=0):
    """Matrices as torch has them, [out, in], with rotary features in halves, under the names of a GGUF file."""
    generator = np.random.default_rng(seed)

    def matrix(*shape):
        return (generator.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    d, f, q, kv = config.hidden_size, config.ffn_size, config.num_heads, config.num_kv_heads
    weights = {"token_embd.weight": matrix(config.vocab_size, d) * 8, "output_norm.weight": 1 + matrix(d)}
    if not config.tie_embeddings:
        weights["output.weight"] = matrix(config.vocab_size, d)
    for layer in range(config.num_layers):
        for name, shape in {
            "attn_norm": (d,), "attn_q": (q * config.head_dim, d), "attn_k": (kv * config.head_dim, d),
            "attn_v": (kv * config.head_dim, d), "attn_output": (d, q * config.head_dim), "ffn_norm": (d,),
            "ffn_gate": (f, d), "ffn_up": (f, d), "ffn_down": (d, f),
        }.items():  # fmt: skip
            weights[f"blk.{layer}.{name}.weight"] = matrix(*shape) + (len(shape) == 1)
            if config.qkv_bias and name in ("attn_q", "attn_k", "attn_v"):
                weights[f"blk.{layer}.{name}.bias"] = matrix(shape[0]) * 8
    return weights


def paired(array, heads):
    """Rows of every head from halves to pairs, as llama.cpp's converter does it."""
    halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def quantized(array, kind):
    """The bytes of an array in a kind; of k-quants, which the package cannot make, random blocks of a fair size."""
    if array.ndim == 1 or kind == Kind.F32:
        return array, Kind.F32
    if kind == Kind.F16:
        return array.astype(np.float16), kind
    if kind not in K_QUANTS:
        return gguf.quantize(array, kind), kind
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(array.size).integers(0, 256, (len(array), array.shape[1] // block, size), np.uint8)
    scales = {Kind.Q2_K: (80, 84), Kind.Q3_K: (108, 110), Kind.Q6_K: (208, 210)}.get(kind, (0, 4))
    scale = np.full((scales[1] - scales[0]) // 2, 3e-4, np.float16).view(np.uint8)
    blocks[:, :, slice(*scales)] = scale
    return blocks.reshape(len(array), -1), kind


def write(path, config, weights, kind=Kind.F32, metadata=(), **changes):
    """Write a model, with tensors replaced or (None) left out by name; returns the weights as they can be read."""
    writer = gguf.GGUFWriter(path, "llama")
    facts = {
        "block_count": config.num_layers, "context_length": config.max_length, "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size, "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta, "rope.dimension_count": config.head_dim,
    } | dict(metadata)  # fmt: skip
    for key, value in facts.items():
        kinds = {int: "uint32", float: "float32", str: "string", list: "array"}
        if value is not None:
            getattr(writer, f"add_{kinds[type(value)]}")(f"llama.{key}", value)
    read = {}
    for name, array in weights.items():
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2])
        data, stored = quantized(array, kind)
        read[name] = data if stored in (Kind.F32, Kind.F16) else gguf.dequantize(data, stored)
        if changes.get(name, True) is not None:
            data = changes.get(name, paired(data, heads) if heads else data)
            writer.add_tensor(name, data, raw_dtype=None if stored in (Kind.F32, Kind.F16) else stored)
    for name in changes.keys() - weights.keys():
        writer.add_tensor(name, changes[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def our_params(config, weights):
    """The parameters of the numpy decoder."""
    weights = {name: array.astype(np.float64) for name, array in weights.items()}

    def stacked(name):
        return np.array([weights[f"blk.{layer}.{name}"] for layer in range(config.num_layers)])

    def heads(name, count):
        kernel = stacked(f"{name}.weight").swapaxes(1, 2)
        part = {"kernel": kernel.reshape(*kernel.shape[:2], count, config.head_dim)}
        if config.qkv_bias:
            part["bias"] = stacked(f"{name}.bias").reshape(-1, count, config.head_dim)
        return part

    output = stacked("attn_output.weight").swapaxes(1, 2)
    params = {
        "embedding": {"embedding": weights["token_embd.weight"]},
        "layers": {
            "attention_norm": {"scale": stacked("attn_norm.weight")},
            "attention": {
                "query": heads("attn_q", config.num_heads),
                "key": heads("attn_k", config.num_kv_heads),
                "value": heads("attn_v", config.num_kv_heads),
                "output": {"kernel": output.reshape(-1, config.num_heads, config.head_dim, config.hidden_size)},
            },
            "ffn_norm": {"scale": stacked("ffn_norm.weight")},
            "ffn": {n: {"kernel": stacked(f"ffn_{n}.weight").swapaxes(1, 2)} for n in ("gate", "up", "down")},
        },
        "final_norm": {"scale": weights["output_norm.weight"]},
    }
    if not config.tie_embeddings:
        params["head"] = {"kernel": weights["output.weight"]}
    return params


def check_logits(path, config, weights):
    loaded, params = interop.load(path, dtype="float32")
    assert loaded == config
    ours = models.logits(params, loaded, np.array([TOKENS]))[0]
    np.testing.assert_allclose(ours, oracle.logits(our_params(config, weights), config, TOKENS), atol=1e-4)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, *K_QUANTS])
def test_logits_are_those_of_the_stored_weights(tmp_path, kind):
    config = WIDE if kind in K_QUANTS else CONFIG
    path = tmp_path / "model.gguf"
    check_logits(path, config, write(path, config, random_weights(config), kind))


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"qkv_bias": True},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1, "head_dim": 24, "num_heads": 3},
        {"norm_eps": 1e-6, "rope_theta": 1e6},
    ],
)
def test_every_variant_of_the_architecture(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    path = tmp_path / "model.gguf"
    check_logits(path, config, write(path, config, random_weights(config)))


def test_what_metadata_leaves_out_has_defaults(tmp_path):
    config = dataclasses.replace(CONFIG, num_kv_heads=4, rope_theta=1e4)
    absent = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base")
    path = tmp_path / "model.gguf"
    write(path, config, random_weights(config), metadata=dict.fromkeys((*absent, "rope.dimension_count")))
    assert interop.model_config(gguf_file.read(path)) == config


@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [
        (Kind.F32, ("float32", "float32")),
        (Kind.F16, ("float16", "float32")),
        (Kind.BF16, ("bfloat16", "bfloat16")),
        (Kind.Q8_0, ("float32", "float32")),
    ],
)
def test_the_dtype_is_the_stored_one_unless_it_is_given(tmp_path, kind, dtypes):
    path = tmp_path / "model.gguf"
    read = write(path, CONFIG, random_weights(CONFIG), kind)
    config, params = interop.load(path)
    assert (config.param_dtype, config.compute_dtype) == dtypes
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtypes[0]}
    np.testing.assert_array_equal(params["embedding"]["embedding"], read["token_embd.weight"])
    assert interop.load(path, dtype="bfloat16")[0].param_dtype == "bfloat16"


def test_a_mesh_gets_the_same_parameters(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, CONFIG, random_weights(CONFIG), Kind.Q8_0)
    _, alone = interop.load(path)
    mesh = meshes.build(MeshConfig(data=4, tensor=2))
    _, sharded = interop.load(path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, sharded, alone)
    kernel = sharded["layers"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 64 // 4, 4 // 2, 16)


def test_rope_scaling(tmp_path):
    path = tmp_path / "model.gguf"
    weights = random_weights(CONFIG)
    write(path, CONFIG, weights, metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert interop.load(path)[0].rope_scaling == RopeScalingConfig("linear", factor=4.0)
    write(path, CONFIG, weights, metadata={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})
    with pytest.raises(UserError, match="rope scaling 'yarn' is not supported"):
        interop.load(path)


def llama3_divisors(theta, size, factor):
    """What llama.cpp's converter divides rotary frequencies by, for Llama 3.1 and later."""
    divisors = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * theta ** (i / size)
        if wavelength < 8192 / 4:
            divisors.append(1)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama_3_scaling_is_recognised_by_its_divisors(tmp_path):
    config = dataclasses.replace(CONFIG, rope_theta=500_000.0, head_dim=64)
    divisors = llama3_divisors(config.rope_theta, config.head_dim, 32.0)
    path, weights = tmp_path / "model.gguf", random_weights(config)
    write(path, config, weights, **{"rope_freqs.weight": divisors})
    assert interop.load(path)[0].rope_scaling == RopeScalingConfig("llama3", 32.0, 1.0, 4.0, 8192)
    write(path, config, weights, **{"rope_freqs.weight": divisors**2})
    with pytest.raises(UserError, match=r"rope_freqs\.weight does not follow Llama 3's rule"):
        interop.load(path)


def test_the_chat_template_is_the_files(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_chat_template("{{ messages }} 你")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert interop.chat_template(tmp_path / "model.gguf") == "{{ messages }} 你"
    write(tmp_path / "model.gguf", CONFIG, random_weights(CONFIG))
    assert interop.chat_template(tmp_path / "model.gguf") == ""


def test_metadata_is_what_the_package_reads(tmp_path):
    path = tmp_path / "model.gguf"
    values = {"a": ["x", "ÿ", ""], "b": [1, -2], "c": [0.5], "d": 7, "e": 0.25, "f": "text"}
    write(path, CONFIG, random_weights(CONFIG), Kind.Q8_0, metadata=values)
    file, reader = gguf_file.read(path), gguf.GGUFReader(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == theirs
    assert [t.name for t in reader.tensors] == list(file.tensors)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.tensors[tensor.name].read(), values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"tensor blk\.1\.ffn_up\.weight is missing"),
        ({"token_embd.weight": None}, r"tensor token_embd\.weight is missing"),
        (
            {"output_norm.weight": np.ones(65, np.float32)},
            r"output_norm\.weight is \[65\], the metadata makes it \[64\]",
        ),
        (
            {"blk.0.ffn_down.weight": np.ones((96, 64), np.float32)},
            r"blk\.0\.ffn_down\.weight is \[96, 64\], the metadata makes it \[64, 96\]",
        ),
        (
            {"blk.2.attn_norm.weight": np.ones(64, np.float32)},
            r"blk\.2\.attn_norm\.weight is not one of a Llama with 2",
        ),
        ({"blk.0.attn_q.weight": np.ones((64, 64), np.int8)}, r"tensor blk\.0\.attn_q\.weight is of type I8, which"),
        ({"blk.0.attn_q.weight": np.ones((64, 64), np.int32)}, r"tensor blk\.0\.attn_q\.weight is of type I32, which"),
        ({"blk.0.attn_q.bias": np.ones(64, np.float32)}, r"tensor blk\.1\.attn_q\.bias is missing"),
    ],
)
def test_tensors_that_contradict_the_metadata(tmp_path, changes, message):
    path = tmp_path / "model.gguf"
    write(path, CONFIG, random_weights(CONFIG), **changes)
    with pytest.raises(UserError, match=message) as caught:
        interop.load(path)
    assert "\n" not in str(caught.value) and "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"block_count": None}, r"does not state llama\.block_count"),
        ({"embedding_length": "wide"}, r"llama\.embedding_length is wide, not a single number"),
        ({"attention.head_count_kv": [2, 1]}, r"attention\.head_count_kv is \[2, 1\], not a single number"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, r"rms_epsilon is nan, not a single number"),
        ({"rope.dimension_count": 8}, r"llama\.rope\.dimension_count is 8, and only the head size 16 is supported"),
        ({"expert_count": 8}, r"is no plain Llama: it has llama\.expert_count"),
        ({"attention.sliding_window": 16}, r"is no plain Llama: it has llama\.attention\.sliding_window"),
        ({"attention.head_count": 0}, r"llama\.attention\.head_count is 0, not a positive whole number"),
        ({"block_count": 2.5}, r"llama\.block_count is 2\.5, not a positive whole number"),
        ({"attention.head_count": 3}, "num_heads=3 is not a multiple of num_kv_heads=2"),
        ({"block_count": 3}, r"tensor blk\.2\.attn_norm\.weight is missing"),
    ],
)
def test_metadata_that_no_model_can_have(tmp_path, metadata, message):
    path = tmp_path / "model.gguf"
    write(path, CONFIG, random_weights(CONFIG), metadata=metadata)
    with pytest.raises(UserError, match=message):
        interop.load(path)


def test_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="has the architecture 'mamba'; only llama can be loaded"):
        interop.load(tmp_path / "model.gguf")


def test_weights_that_are_not_finite_are_named(tmp_path, caplog):
    path, weights = tmp_path / "model.gguf", random_weights(CONFIG)
    weights["blk.1.ffn_up.weight"][3, 5] = np.nan
    weights["output_norm.weight"][0] = np.inf
    write(path, CONFIG, weights)
    with caplog.at_level(logging.WARNING):
        interop.load(path)
    assert "blk.1.ffn_up.weight" in caplog.text and "output_norm.weight" in caplog.text
    assert "ffn_down" not in caplog.text


def test_a_file_that_is_cut_short_anywhere(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, CONFIG, random_weights(CONFIG), Kind.Q8_0)
    whole = path.read_bytes()
    for size in [0, 1, 3, 4, 7, 8, 20, 24, 60, 200, 700, 2000, len(whole) // 2, len(whole) - 33]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"is cut short|is not a GGUF file") as caught:
            interop.load(path)
        assert "\n" not in str(caught.value)


def header(*, magic=b"GGUF", version=3, tensors=0, pairs=0, rest=b""):
    return magic + struct.pack("<IQQ", version, tensors, pairs) + rest


KEY = struct.pack("<Q", 1) + b"a"
TENSOR = KEY + struct.pack("<I", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(magic=b"GGML"), "is not a GGUF file"),
        (b"PK\x03\x04" * 20, "is not a GGUF file"),
        (header(version=1), "has version 1 of the GGUF format"),
        (header(version=3 << 24), "has version 50331648"),
        (header(pairs=2**60), "cut short"),
        (header(tensors=2**60), "cut short"),
        (header(pairs=1, rest=struct.pack("<Q", 2**62) + b"a"), "cut short"),
        (header(pairs=1, rest=KEY + struct.pack("<IIQ", 9, 0, 2**60)), "cut short"),
        (header(pairs=1, rest=KEY + struct.pack("<IIQ", 9, 8, 2**60)), "cut short"),
        (header(pairs=1, rest=KEY + struct.pack("<IIQ", 9, 9, 2**60)), "value of unknown type 9"),
        (header(pairs=1, rest=KEY + struct.pack("<I", 77)), "value of unknown type 77"),
        (header(tensors=1, rest=KEY + struct.pack("<I", 2**31)), "has 2147483648 dimensions"),
        (header(tensors=1, rest=TENSOR + struct.pack("<QIQ", 2**62, 0, 0)), "cut short: tensor a ends at"),
        (header(tensors=2, rest=(TENSOR + struct.pack("<QIQ", 1, 0, 0)) * 2 + bytes(64)), "have the same name"),
        (header(pairs=1, rest=struct.pack("<Q", 11) + b"split.count" + struct.pack("<IH", 2, 3)), "is one of 3 files"),
        (header(tensors=1, rest=TENSOR + struct.pack("<QIQ", 32, 999, 0)), "tensor a has the unknown type 999"),
        (
            header(tensors=1, rest=TENSOR + struct.pack("<QIQ", 33, 8, 0)),
            r"tensor a \[33\] has rows that are no multiple",
        ),
    ],
)
def test_damaged_or_hostile_headers(tmp_path, content, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        interop.load(path)
    assert "\n" not in str(caught.value) and "model.gguf" in str(caught.value)


def test_a_missing_file_and_an_unknown_dtype(tmp_path):
    with pytest.raises(UserError, match=r"no GGUF file at .*nothing\.gguf"):
        interop.load(tmp_path / "nothing.gguf")
    with pytest.raises(UserError, match="dtype='int8' is not one of"):
        interop.load(tmp_path / "nothing.gguf", dtype="int8")


def test_a_changed_file_is_read_again(tmp_path):
    path, weights = tmp_path / "model.gguf", random_weights(CONFIG)
    write(path, CONFIG, weights)
    first = gguf_file.read(path)
    assert gguf_file.read(path) is first
    write(path, CONFIG, weights, metadata={"context_length": 64})
    assert interop.load(path)[0].max_length == 64
