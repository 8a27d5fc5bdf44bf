"""What a checkpoint folder can have wrong with it: one line that names the tensor or the field, and the file."""

import dataclasses
import json
import logging
import shutil
import struct
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import models
from llm_jax.config import ModelConfig, RopeScalingConfig
from llm_jax.errors import UserError
from llm_jax.interop import huggingface, huggingface_config, safetensors_file
from tests.interop.test_torch_zip import archive, dumps, tensor

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=24, max_length=16
)
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    huggingface.save(folder, CONFIG, models.init(CONFIG, jax.random.key(0)))
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A whole checkpoint to be damaged."""
    return shutil.copytree(good, tmp_path / "model")


def change_config(folder, **changes):
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def change_tensors(folder, **changes):
    """Replace tensors, or remove them where the value is ..."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({k: v for k, v in tensors.items() if v is not ...}, folder / "model.safetensors")


def refused(folder, message, **options):
    with pytest.raises(UserError, match=message) as caught:
        huggingface.load(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q: ...}, rf"tensor {Q} is missing from .*model \(.*config\.json says 2 layers\)"),
        ({Q: ..., "model.norm.weight": ...}, r"tensor model\.norm\.weight and 1 more are missing"),
        ({"score.weight": np.zeros((1, 16), np.float32)}, r"tensor score\.weight in .*safetensors is not one of this"),
        (
            {Q: np.zeros((16, 15), np.float32)},
            rf"tensor {Q} in .*model\.safetensors is \[16, 15\], the config makes it \[16, 16\] "
            r"\(num_heads\*head_dim x hidden_size\)",
        ),
        ({Q: np.zeros((16, 16), np.float64)}, rf"tensor {Q} has dtype F64; only F32, F16, BF16 can be read"),
        ({"model.layers.2.mlp.up_proj.weight": np.zeros(1, np.float32)}, r"layers\.2.* is not one of this .*2 layers"),
    ],
)
def test_wrong_tensors(folder, changes, message):
    change_tensors(folder, **changes)
    refused(folder, message)


def test_tables_that_follow_from_the_config_are_ignored(folder, good):
    change_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)})
    want, got = (huggingface.load(path)[1] for path in (good, folder))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"model\.layers\.2.* missing from .*config\.json says 3 layers"),
        ({"num_hidden_layers": 1}, r"tensor model\.layers\.1.*config\.json says 1 layers"),
        (
            {"vocab_size": 40},
            r"embed_tokens\.weight in .* is \[32, 16\], .* makes it \[40, 16\] \(vocab_size x hidden_s",
        ),
        ({"num_key_value_heads": 4}, r"k_proj\.weight in .* \[8, 16\], .* \[16, 16\] \(num_kv_heads\*head_dim x"),
        ({"num_key_value_heads": 3}, r"config\.json: .*num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight in .* is not the embedding, although the config ties them"),
        ({"hidden_size": ...}, r"config\.json has no hidden_size"),
        ({"vocab_size": 2**39}, r"config\.json: vocab_size must be positive and at most 16777216"),
        ({"head_dim": 10**30}, r"config\.json: head_dim must be positive and at most 16777216"),
        ({"num_hidden_layers": 10**7}, r"10000000 layers, more than there are tensors in .*model: 21"),
        ({"hidden_size": "16"}, r"config\.json: hidden_size must be int, got '16'"),
        ({"rms_norm_eps": True}, r"config\.json: rms_norm_eps must be float, got True"),
        ({"hidden_act": "gelu"}, r"config\.json: hidden_act='gelu' is not supported, only 'silu'"),
        ({"attention_bias": True}, r"attention_bias=True is not supported"),
        ({"quantization_config": {"bits": 4}}, r"quantized weights cannot be read"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope_scaling of kind 'yarn' is not supported, only"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling of kind 'linear' lacks a usable 'factor'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        ({"rope_scaling": 3}, r"rope_scaling must be an object, got 3"),
        (
            {"architectures": ["MistralForCausalLM"]},
            r"architecture 'MistralForCausalLM' is not one of LlamaForCausalLM, Qwen2ForCausalLM, BaichuanForCausalLM",
        ),
        ({"architectures": ..., "model_type": "gpt2"}, r"model_type 'gpt2' is not one of Llama"),
        ({"architectures": 3}, r"architecture 3 is not one of"),
    ],
)
def test_configs_that_contradict_the_weights_or_make_no_sense(folder, changes, message):
    change_config(folder, **changes)
    refused(folder, message)


JUNK = [None, True, -1, 0, 7, 10**30, 0.5, float("inf"), float("nan"), "", "x", [], [1], {}, {"a": 1}]
FULL = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "window_sizes": (0, 4)},
    "qwen": {"qkv_bias": True, "num_kv_heads": 4, "log_n": True},
    "baichuan": {"num_kv_heads": 4},
}


@pytest.mark.parametrize("family", FULL)
def test_no_value_of_a_config_ends_in_another_error(family):
    good = huggingface_config.from_model(ModelConfig(**{**vars(CONFIG), **FULL[family]}), family)
    nested = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    nested["original_max_position_embeddings"] = 8192
    cases = [{**good, key: value} for key in [*good, "rope_scaling", "quantization_config"] for value in JUNK]
    cases += [{**good, "rope_parameters": {**nested, key: value}} for key in nested for value in JUNK]
    refusals = 0
    for case in cases:
        try:
            huggingface_config.to_model(case, "here")
        except UserError as error:
            refusals += 1
            assert "here" in str(error) and "\n" not in str(error)
    assert refusals > len(cases) / 3


def test_options_that_contradict_the_folder(folder):
    refused(folder, r"position='alibi' was asked for, but every llama model has 'rope'", position="alibi")
    refused(folder, r"norm_head=True was asked for, but every llama", norm_head=True)
    refused(folder, r"dtype='int8' is not one of float32", dtype="int8")
    refused(folder, r"rope_layout='pairs' is not one of half_split, interleaved", rope_layout="pairs")


def test_missing_and_broken_files(folder, tmp_path):
    refused(tmp_path / "nothing", "no folder")
    (folder / "config.json").rename(folder / "other.json")
    refused(folder, r"no config\.json in .*: is this the folder of a Hugging Face model")
    (folder / "config.json").write_text('{"hidden_size": 16')
    refused(folder, r"config\.json is not valid JSON")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refused(folder, r"config\.json is not valid JSON")
    (folder / "config.json").write_text("[" * 200_000)
    refused(folder, r"config\.json is not valid JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, r"config\.json does not hold a JSON object")
    (folder / "other.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    refused(folder, r"no weights in .*: it has none of model\.safetensors, model\.safetensors\.index\.json, pytorch_")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_file_cut_short(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, r"model\.safetensors is (not a safetensors file, or )?cut short")


def headed(header, size=64):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (headed(b"not JSON"), "is not a safetensors file"),
        (headed([]), "is not a safetensors file: the header is no object"),
        (headed({"a": 3}), "entry of tensor a makes no sense"),
        (headed({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}), "entry of tensor a makes no sense"),
        (
            headed({"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 0]}}),
            "entry of tensor a makes no sense",
        ),
        (headed({"a": {"dtype": "F32", "shape": "12", "data_offsets": [0, 8]}}), "entry of tensor a makes no sense"),
        (headed({"a": {"dtype": "F32", "shape": [], "data_offsets": "04"}}), "entry of tensor a makes no sense"),
        (headed(b"[" * 100_000), "is not a safetensors file"),
        (
            headed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
            r"a has 4 bytes, which its shape \[2\]",
        ),
        (headed({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}), "a has -4 bytes"),
        (headed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), "a has 4 bytes"),
        (headed({"a": {"dtype": "F32", "shape": [99], "data_offsets": [0, 396]}}), "cut short: tensor a ends at byte"),
        (
            headed({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}),
            "a has dtype .*; only F32, F16, BF16",
        ),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a safetensors file"),
    ],
)
def test_damaged_headers(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        safetensors_file.read(path)
    assert "\n" not in str(caught.value)


def test_shards_with_an_index(good, tmp_path):
    config, params = huggingface.load(good)
    folder = tmp_path / "shards"
    huggingface.save(folder, config, params, shard_bytes=4000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][Q]
    tensors = load_file(shard)
    save_file({name: value for name, value in tensors.items() if name != Q}, shard)
    refused(folder, rf"tensor {Q} is missing from .*{shard.name}, where model\.safetensors\.index\.json has it")
    shard.unlink()
    refused(folder, rf"{shard.name} is missing: model\.safetensors\.index\.json names it")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {Q: "../good/model.safetensors"}}))
    refused(folder, r"index\.json names '\.\./good/model\.safetensors', which is not a file beside it")
    path.write_text(json.dumps({"weight_map": [1]}))
    refused(folder, r"has no weight_map from tensors to files")


def test_a_tensor_that_the_index_has_elsewhere(good, tmp_path):
    """What an earlier export left in a shard must not take the place of the tensor that the index means."""
    folder = tmp_path / "shards"
    huggingface.save(folder, *huggingface.load(good), shard_bytes=4000)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = folder / max(set(weight_map.values()) - {weight_map[Q]})
    save_file({**load_file(other), Q: np.zeros((16, 16), np.float32)}, other)
    refused(folder, rf"tensor {Q} is in .*{other.name}, where model\.safetensors\.index\.json does not have it")


def test_torch_files_in_shards(good, tmp_path):
    """The same tensors from `pytorch_model-*.bin`, one of them hostile at last."""
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(good / "config.json", folder)
    tensors = load_file(good / "model.safetensors")
    weight_map = {}
    for number in range(2):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        mine = dict(list(tensors.items())[number::2])
        entries = {name: tensor(name, 0, x.shape, tuple(s // 4 for s in x.strides), x.size) for name, x in mine.items()}
        archive(folder / file, dumps(entries), {name: x.tobytes() for name, x in mine.items()})
        weight_map |= dict.fromkeys(mine, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    want, got = (huggingface.load(path)[1] for path in (good, folder))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    archive(folder / file, b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    refused(folder, r"pytorch_model-00002-of-00002\.bin is refused: it asks for os\.system")


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, None), (-np.inf, "bfloat16"), (1e6, "float16")])
def test_weights_that_are_no_numbers_are_named(folder, caplog, value, dtype):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    embedding[3, 5] = value
    change_tensors(folder, **{"model.embed_tokens.weight": embedding})
    with caplog.at_level(logging.WARNING, "llm_jax"):
        huggingface.load(folder, dtype=dtype)
    assert "1 tensors hold NaN or infinity" in caplog.text and "model.embed_tokens.weight" in caplog.text


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_tied_embeddings(folder, same):
    change_config(folder, tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, **{"lm_head.weight": embedding if same else embedding + 1})
    if same:
        assert "head" not in huggingface.load(folder)[1]
    else:
        refused(folder, "is not the embedding")


def test_baichuans_facts_come_from_the_caller_or_the_sizes(caplog):
    values = {
        "architectures": ["BaichuanForCausalLM"], "vocab_size": 125696, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "intermediate_size": 11008, "rms_norm_eps": 1e-6, "model_max_length": 4096,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING, "llm_jax"):
        _, seven = huggingface_config.to_model(values, "here")
    assert (seven.position, seven.norm_head) == ("rope", True)
    assert "does not state its position: taken to be 'rope' from hidden_size=4096; say position=..." in caplog.text
    assert "norm_head: taken to be True from vocab_size=125696" in caplog.text
    thirteen = values | {"hidden_size": 5120, "num_attention_heads": 40, "vocab_size": 64000}
    _, other = huggingface_config.to_model(thirteen, "here")
    assert (other.position, other.norm_head) == ("alibi", False)
    _, stated = huggingface_config.to_model(thirteen, "here", position="rope", norm_head=True)
    assert (stated.position, stated.norm_head) == ("rope", True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 1e6),
        ("rope_scaling", {"type": "linear", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
        ("tie_word_embeddings", True),
    ],
)
def test_a_baichuan_that_none_of_the_released_ones_is(key, value):
    values = huggingface_config.from_model(dataclasses.replace(CONFIG, num_kv_heads=4), "baichuan")
    assert huggingface_config.to_model({**values, "rope_theta": 10_000, "rope_scaling": None}, "here")
    with pytest.raises(UserError, match=rf"here: {key}=.* is not supported, only"):
        huggingface_config.to_model({**values, key: value}, "here")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"norm_head": True},
            r"a llama checkpoint cannot express this model: norm_head True instead of False",
        ),
        ("llama", {"position": "alibi", "qkv_bias": True}, r"position 'alibi' .*, qkv_bias True instead of False"),
        ("llama", {"window_sizes": (4, 0)}, r"window_sizes \(4, 0\) instead of \(\)"),
        ("qwen2", {"window_sizes": (4, 8), "qkv_bias": True}, r"windows of 2 sizes instead of one"),
        ("qwen2", {"dynamic_ntk": True, "qkv_bias": True}, r"dynamic_ntk True instead of False"),
        ("baichuan", {}, r"num_kv_heads 2 instead of num_heads 4"),
        ("baichuan", {"num_kv_heads": 4, "head_dim": 8}, r"num_heads x head_dim 32 instead of 16"),
        ("qwen", {"num_kv_heads": 4}, r"qkv_bias False instead of True"),
        ("baichuan", {"num_kv_heads": 4, "rope_scaling": RopeScalingConfig("linear", 2.0)}, r"rope_scaling"),
        ("llama", {"quantization": "int4"}, r"quantization 'int4' instead of 'none'"),
        ("lama", {}, r"family='lama' is not one of llama, qwen2, baichuan, qwen"),
    ],
)
def test_what_a_family_cannot_express(tmp_path, family, changes, message):
    config = ModelConfig(**{**vars(CONFIG), **changes})
    with pytest.raises(UserError, match=message) as caught:
        huggingface.save(tmp_path / "export", config, {}, family=family)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_an_export_replaces_nothing(folder):
    with pytest.raises(UserError, match="is not empty: choose another folder"):
        huggingface.save(folder, CONFIG, {})


def test_an_export_that_fails_leaves_nothing(tmp_path):
    params = models.init(CONFIG, jax.random.key(0))
    del params["final_norm"]
    with pytest.raises(KeyError):
        huggingface.save(tmp_path / "export", CONFIG, params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["empty", "link", "."])
def test_an_export_into_an_empty_folder(tmp_path, monkeypatch, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    huggingface.save(place if place == "." else tmp_path / place, CONFIG, models.init(CONFIG, jax.random.key(0)))
    assert huggingface.load(tmp_path / "empty")[0] == CONFIG and (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "link"}


def test_an_export_to_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/sub cannot be written: ") as caught:
        huggingface.save(tmp_path / "file/sub", CONFIG, {"layers": {}})
    assert "\n" not in str(caught.value)


def test_an_export_that_cannot_be_renamed_is_kept(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError("no")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(UserError, match=r"the export is whole in .*\.partial, but cannot be renamed to .*export: no"):
        huggingface.save(tmp_path / "export", CONFIG, models.init(CONFIG, jax.random.key(0)))
    (kept,) = tmp_path.iterdir()
    assert huggingface.load(kept)[0] == CONFIG


KILLED = """
import os, jax
from llm_jax import models
from llm_jax.interop import huggingface, safetensors_file
from tests.interop.test_huggingface_mistakes import CONFIG
write = safetensors_file.write
def write_and_die(path, *arguments):
    write(path, *arguments)
    if path.name.startswith("model-00003"):
        os._exit(9)
safetensors_file.write = write_and_die
huggingface.save({folder!r}, CONFIG, models.init(CONFIG, jax.random.key(0)), shard_bytes=4000)
"""


def test_a_killed_export_is_never_taken_for_a_whole_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED.format(folder=str(tmp_path / "export"))], check=False)
    assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial") and list(left.iterdir())
    refused(left, r"no config\.json in")
