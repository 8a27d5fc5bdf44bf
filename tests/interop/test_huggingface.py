"""Checkpoints of other people's code: the same logits and continuations as theirs, and back without a bit changed."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_jax import models
from llm_jax.config import MeshConfig, ModelConfig, RopeScalingConfig, SamplingConfig
from llm_jax.interop import huggingface, placement
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import rules
from llm_jax.sampling.generate import generate
from tests.golden import make_transformers
from tests.models import oracle

GOLDEN = np.load(Path(make_transformers.__file__).parent / "transformers.npz")
CASES = make_transformers.CASES
SMALL = ModelConfig(
    vocab_size=48, hidden_size=24, num_layers=2, num_heads=3, num_kv_heads=3, head_dim=8, ffn_size=20, max_length=16,
    norm_eps=1e-6,
)  # fmt: skip


def write(folder, config, tensors):
    """A Hugging Face folder, written by other code than ours."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def released(config, dtype=np.float32, **axes):
    """The tensors of a LLaMA or Qwen2 config by the names of its released checkpoints, random."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in (f"model.layers.{i}" for i in range(config["num_hidden_layers"])):
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {name: make_transformers.values(name, shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint folder for every golden case."""
    root = tmp_path_factory.mktemp("transformers")
    return {case: write(root / case, config, released(config)) for case, config in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_also_past_the_trained_length(folders, case):
    config, params = huggingface.load(folders[case])
    got = models.logits(params, config, jnp.asarray(make_transformers.long_ids()))
    np.testing.assert_allclose(got, GOLDEN[f"{case}/long"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_left_padding_changes_nothing(folders, case):
    config, params = huggingface.load(folders[case])
    ids, mask = make_transformers.padded()
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    got = models.logits(params, config, jnp.asarray(ids), positions=positions, segment_ids=jnp.asarray(mask))
    real = mask > 0
    np.testing.assert_allclose(np.asarray(got)[real], GOLDEN[f"{case}/padded"][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuations_are_those_of_transformers(folders, case):
    config, params = huggingface.load(folders[case])
    new_tokens = make_transformers.NEW_TOKENS
    sampling = SamplingConfig(max_new_tokens=new_tokens, temperature=0.0, max_context=64)
    continued = generate(params, config, make_transformers.PROMPTS, sampling)
    assert [c.tokens for c in continued] == GOLDEN[f"{case}/greedy"].tolist()


@pytest.mark.parametrize("case", ["llama_gqa_tied", "llama3", "qwen2_tied_windows"])
def test_a_cache_gives_the_same_logits(folders, case):
    config, params = huggingface.load(folders[case])
    ids = jnp.asarray(make_transformers.long_ids())
    cache = models.init_cache(config, 2, ids.shape[1])
    parts = []
    for start, stop in ((0, 17), (17, 18), (18, 40)):
        logits, cache = models.logits(params, config, ids[:, start:stop], cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), GOLDEN[f"{case}/long"], atol=1e-4, rtol=0)


def baichuan_names(config, seed=0):
    """A Baichuan checkpoint's tensors as the released ones have them: one matrix for queries, keys and values."""
    rng = np.random.default_rng(seed)

    def random(*shape):
        return (rng.standard_normal(shape) / 4).astype(np.float32)

    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    tensors = {
        "model.embed_tokens.weight": random(config["vocab_size"], hidden),
        "model.norm.weight": 1 + random(hidden),
        "lm_head.weight": random(config["vocab_size"], hidden),
    }
    for layer in (f"model.layers.{i}" for i in range(config["num_hidden_layers"])):
        tensors[f"{layer}.self_attn.W_pack.weight"] = random(3 * hidden, hidden)
        tensors[f"{layer}.self_attn.o_proj.weight"] = random(hidden, hidden)
        tensors[f"{layer}.self_attn.rotary_emb.inv_freq"] = random(4)
        tensors[f"{layer}.mlp.gate_proj.weight"] = random(ffn, hidden)
        tensors[f"{layer}.mlp.up_proj.weight"] = random(ffn, hidden)
        tensors[f"{layer}.mlp.down_proj.weight"] = random(hidden, ffn)
        tensors[f"{layer}.input_layernorm.weight"] = 1 + random(hidden)
        tensors[f"{layer}.post_attention_layernorm.weight"] = 1 + random(hidden)
    return tensors


def qwen_names(config, seed=0):
    """A Qwen (version 1) checkpoint's tensors as the released ones have them."""
    rng = np.random.default_rng(seed)

    def random(*shape):
        return (rng.standard_normal(shape) / 4).astype(np.float32)

    hidden, ffn = config["n_embd"], config["ffn_hidden_size"] // 2
    tensors = {
        "transformer.wte.weight": random(config["padded_vocab_size"], hidden),
        "transformer.ln_f.weight": 1 + random(hidden),
        "lm_head.weight": random(config["padded_vocab_size"], hidden),
    }
    for layer in (f"transformer.h.{i}" for i in range(config["n_layer"])):
        tensors[f"{layer}.ln_1.weight"] = 1 + random(hidden)
        tensors[f"{layer}.ln_2.weight"] = 1 + random(hidden)
        tensors[f"{layer}.attn.c_attn.weight"] = random(3 * hidden, hidden)
        tensors[f"{layer}.attn.c_attn.bias"] = random(3 * hidden)
        tensors[f"{layer}.attn.c_proj.weight"] = random(hidden, hidden)
        tensors[f"{layer}.mlp.w1.weight"] = random(ffn, hidden)
        tensors[f"{layer}.mlp.w2.weight"] = random(ffn, hidden)
        tensors[f"{layer}.mlp.c_proj.weight"] = random(hidden, ffn)
    return tensors


def oracle_layer(config, packed, bias, output, gate, up, down, norms):
    """One layer in the oracle's terms, from matrices that map rows to outputs."""
    heads, hidden = config.num_heads, config.hidden_size
    attention = {"output": {"kernel": output.T.reshape(heads, -1, hidden)}}
    for index, name in enumerate(("query", "key", "value")):
        rows = packed[index * hidden : (index + 1) * hidden]
        attention[name] = {"kernel": np.stack([r.T for r in np.split(rows, heads)], axis=1)}
        if bias is not None:
            attention[name]["bias"] = bias[index * hidden : (index + 1) * hidden].reshape(heads, -1)
    ffn = {"gate": {"kernel": gate.T}, "up": {"kernel": up.T}, "down": {"kernel": down.T}}
    scales = {"attention_norm": {"scale": norms[0]}, "ffn_norm": {"scale": norms[1]}}
    return {"attention": attention, "ffn": ffn, **scales}


def oracle_params(config, tensors, layers, embedding, norm):
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float64), *layers)
    parts = {"embedding": {"embedding": embedding}, "final_norm": {"scale": norm}}
    parts["head"] = {"kernel": tensors["lm_head.weight"]}
    return {**jax.tree.map(np.float64, parts), "layers": stacked}


def baichuan_oracle(config, t):
    layers = [
        oracle_layer(
            config,
            t[f"{p}.self_attn.W_pack.weight"],
            None,
            t[f"{p}.self_attn.o_proj.weight"],
            *(t[f"{p}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")),
            [t[f"{p}.{name}_layernorm.weight"] for name in ("input", "post_attention")],
        )
        for p in (f"model.layers.{i}" for i in range(config.num_layers))
    ]
    return oracle_params(config, t, layers, t["model.embed_tokens.weight"], t["model.norm.weight"])


def qwen_oracle(config, t):
    layers = [
        oracle_layer(
            config,
            t[f"{p}.attn.c_attn.weight"],
            t[f"{p}.attn.c_attn.bias"],
            t[f"{p}.attn.c_proj.weight"],
            *(t[f"{p}.mlp.{name}.weight"] for name in ("w2", "w1", "c_proj")),  # c_proj(w1(x) * silu(w2(x)))
            [t[f"{p}.ln_{i}.weight"] for i in (1, 2)],
        )
        for p in (f"transformer.h.{i}" for i in range(config.num_layers))
    ]
    return oracle_params(config, t, layers, t["transformer.wte.weight"], t["transformer.ln_f.weight"])


BAICHUAN = {
    "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "vocab_size": 48, "hidden_size": 24,
    "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3, "rms_norm_eps": 1e-6,
    "model_max_length": 16, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "padded_vocab_size": 48, "n_embd": 24, "n_layer": 2,
    "n_head": 3, "ffn_hidden_size": 40, "n_positions": 16, "layer_norm_epsilon": 1e-6, "kv_channels": 8,
    "rotary_emb_base": 10000, "use_dynamic_ntk": False, "use_logn_attn": True, "no_bias": True, "rotary_pct": 1.0,
}  # fmt: skip
OTHERS = {
    "baichuan_7b": (BAICHUAN, {"position": "rope"}, SMALL),
    "baichuan_13b": (BAICHUAN, {}, dataclasses.replace(SMALL, position="alibi")),
    "baichuan2_7b": (
        {k: v for k, v in BAICHUAN.items() if k != "model_max_length"} | {"max_position_embeddings": 16},
        {"position": "rope", "norm_head": True},
        dataclasses.replace(SMALL, norm_head=True),
    ),
    "baichuan2_13b": (BAICHUAN, {"norm_head": True}, dataclasses.replace(SMALL, position="alibi", norm_head=True)),
    "qwen": (QWEN, {}, dataclasses.replace(SMALL, qkv_bias=True, log_n=True)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_logits_are_those_of_the_oracle(tmp_path, case):
    stated, facts, expected = OTHERS[case]
    names, params_for = (qwen_names, qwen_oracle) if stated is QWEN else (baichuan_names, baichuan_oracle)
    tensors = names(stated)
    config, params = huggingface.load(write(tmp_path / case, stated, tensors), **facts)
    assert config == expected
    ids = np.random.default_rng(1).integers(0, 48, 20)  # past the trained length of 16
    want = oracle.logits(params_for(config, tensors), config, ids.tolist())
    got = models.logits(params, config, jnp.asarray(ids)[None])[0]
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_every_device_gets_its_own_part(folders, mesh):
    stated = {**CASES["llama"], "vocab_size": 64}
    whole = huggingface.load(folders["llama"])[1]
    built = mesh_lib.build(MeshConfig(*mesh))
    config, params = huggingface.load(folders["llama"], mesh=built)
    assert config.vocab_size == stated["vocab_size"]
    layout = rules.shardings(models.logical_axes(config), models.abstract(config), built)
    for got, want, sharding in zip(*map(jax.tree.leaves, (params, whole, layout)), strict=True):
        assert got.sharding == sharding
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mesh", [None, MeshConfig(1, 2, 4)])
def test_devices_with_memory_of_their_own_are_filled_layer_by_layer(folders, mesh, monkeypatch):
    """What happens on accelerators, here on CPU devices: the same arrays in the same places."""
    built = mesh_lib.build(mesh) if mesh else None
    want = huggingface.load(folders["llama"], mesh=built)[1]
    monkeypatch.setattr(placement, "takes_over_host_memory", lambda: False)
    got = huggingface.load(folders["llama"], mesh=built)[1]
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(lambda x: x.sharding, want)


def test_metas_own_order_of_features(tmp_path, folders):
    """Rows of queries and keys in pairs, as Meta's files have them, give the model that rows in halves give."""
    stated = CASES["qwen2"]
    tensors = released(stated)
    for name in tensors:
        if "q_proj" in name or "k_proj" in name:
            halves = tensors[name].reshape(-1, 2, 4, *tensors[name].shape[1:])  # heads of 8 features
            tensors[name] = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensors[name].shape))
    folder = write(tmp_path / "meta", stated, tensors)
    want = huggingface.load(folders["qwen2"])[1]
    got = huggingface.load(folder, rope_layout="interleaved")[1]
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(tmp_path, dtype):
    stated = CASES["llama"]
    stored = np.dtype(ml_dtypes.bfloat16)
    folder = write(tmp_path / "bf16", stated, released(stated, stored))
    config, params = huggingface.load(folder, dtype=dtype)
    plain, kept = huggingface.load(folder)
    assert (config.param_dtype, plain.param_dtype, plain.compute_dtype) == (dtype, "bfloat16", "bfloat16")
    assert config.compute_dtype == ("float32" if dtype == "float16" else dtype)
    want = released(stated, stored)["model.embed_tokens.weight"].astype(dtype)
    np.testing.assert_array_equal(params["embedding"]["embedding"], want)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {"bfloat16"}


VARIANTS = {
    "llama": {"num_kv_heads": 1, "rope_theta": 5e5},
    "llama, tied": {"tie_embeddings": True},
    "qwen2": {"qkv_bias": True, "window_sizes": (0, 7)},
    "baichuan, NormHead": {"norm_head": True},
    "baichuan, ALiBi": {"position": "alibi"},
    "qwen": {"qkv_bias": True, "log_n": True, "dynamic_ntk": True, "head_dim": 4},
}


def randomized(config):
    """Parameters without ones and zeros."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) / 4, x.dtype), models.abstract(config))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_saving_and_loading_changes_no_bit(tmp_path, variant, shard_bytes):
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    params = randomized(config)
    huggingface.save(tmp_path / "export", config, params, shard_bytes=shard_bytes)
    again, loaded = huggingface.load(tmp_path / "export")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    family = json.loads((tmp_path / "export/config.json").read_text())["model_type"]
    assert family == variant.split(",")[0]


def test_a_sharded_model_is_saved_whole(tmp_path, folders):
    built = mesh_lib.build(MeshConfig(1, 2, 4))
    config, params = huggingface.load(folders["llama"], mesh=built)
    huggingface.save(tmp_path / "export", config, params, dtype="bfloat16")
    again, loaded = huggingface.load(tmp_path / "export")
    assert again.param_dtype == "bfloat16"
    want = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, want)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama", "llama, tied", "llama3", "qwen2"])
def test_transformers_reads_what_we_write(tmp_path, variant):
    """The exported folder as transformers sees it: the same logits, with nothing said beside the folder's name."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    llama3 = {"rope_scaling": RopeScalingConfig("llama3", 4.0, original_length=8), "num_kv_heads": 1}
    config = dataclasses.replace(SMALL, **(llama3 if variant == "llama3" else VARIANTS[variant]))
    params = randomized(config)
    huggingface.save(tmp_path / "export", config, params, shard_bytes=5000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager")
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    ours = models.logits(params, config, jnp.asarray(ids))
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


MEASURED = """
import sys
import jax
from llm_jax.interop import huggingface, placement
def mebibytes(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
jax.numpy.zeros(1).block_until_ready()
before = mebibytes("VmRSS:")
config, params = huggingface.load(sys.argv[1])
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20
print(size, mebibytes("VmHWM:") - before - size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of a process's peak memory")
def test_loading_needs_no_memory_beside_the_parameters(tmp_path):
    """For 480 MiB of parameters, whose largest tensor has 64 MiB and whose largest parameter 137 MiB."""
    config = dataclasses.replace(
        SMALL, vocab_size=32768, hidden_size=1024, num_layers=16, num_heads=8, num_kv_heads=8, head_dim=128,
        ffn_size=4096, param_dtype="bfloat16",
    )  # fmt: skip
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), models.abstract(config))
    huggingface.save(tmp_path / "export", config, params, shard_bytes=10**8)
    environment = {**os.environ, "XLA_FLAGS": ""}
    output = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path / "export"],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    size, beside = map(float, output.split())
    assert size > 470
    assert beside < 1.1 * 64
