"""Converting as a user does it: from a folder to a run and back, with the check of the logits and its refusals."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import convert, runner
from llm_jax import models
from llm_jax.config import MeshConfig, ModelConfig, TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.interop import huggingface, pretrained
from llm_jax.tokenization.train import train_on_texts
from llm_jax.training import checkpoint

MODEL = ModelConfig(
    vocab_size=296, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4, ffn_size=24, max_length=32,
    init_std=0.3,
)  # fmt: skip
ONE = MeshConfig(1, 8, 1)
TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def params():
    return models.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory, params):
    """A Hugging Face folder with everything that belongs to one."""
    root = tmp_path_factory.mktemp("source")
    (root / "tokenizer.model").write_bytes(train_on_texts(["one two three\n" * 9], TokenizerConfig(vocab_size=280)))
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (root / "generation_config.json").write_text("{}")
    huggingface.save(root / "model", MODEL, params, files=[p for p in root.iterdir() if p.is_file()])
    return root / "model"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, source):
    """The folder of a run that it was imported into."""
    folder = tmp_path_factory.mktemp("imported") / "run"
    config = convert.ConvertConfig(source=str(source), mesh=ONE)
    assert convert.run(config, folder) == convert.Difference(0.0, 0.0)
    return folder


def test_import_makes_a_run_that_anything_here_can_use(run_folder, params):
    loaded = pretrained.load(run_folder, compute_dtype="bfloat16")
    assert loaded.config == dataclasses.replace(MODEL, compute_dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert loaded.chat_template == TEMPLATE and loaded.tokenizer.encode("one two")
    assert checkpoint.load_model(run_folder)[2] == 0
    half = pretrained.load(run_folder, dtype="bfloat16").params
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


def test_export_is_the_folder_that_was_imported(run_folder, source, tmp_path, capsys):
    config = convert.ConvertConfig(source=str(run_folder), to="huggingface", shard_gigabytes=1e-5, mesh=ONE)
    convert.run(config, tmp_path / "export")
    output = capsys.readouterr().out
    assert "largest logit difference 0, mean KL 0 nats" in output and "parameters in float32" in output
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) > 1
    want, got = (huggingface.load(path)[1] for path in (source, tmp_path / "export"))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (source / name).read_bytes()
    stated = json.loads((tmp_path / "export/config.json").read_text())
    assert (stated["bos_token_id"], stated["eos_token_id"]) == (1, 2)


@pytest.fixture
def reference(tmp_path, params):
    """Logits of the model, off by a known amount."""
    ids = np.random.default_rng(3).integers(0, MODEL.vocab_size, (3, 9))
    logits = np.array(models.logits(params, MODEL, jnp.asarray(ids)))
    logits[1, 4, 7] += 0.25
    np.savez(tmp_path / "reference.npz", ids=ids, logits=logits)
    return tmp_path / "reference.npz"


def test_a_reference_is_held_to_the_tolerance(source, tmp_path, reference):
    config = convert.ConvertConfig(source=str(source), reference=str(reference), tolerance=0.3, mesh=ONE)
    difference = convert.run(config, tmp_path / "loose")
    assert difference.largest == pytest.approx(0.25, abs=1e-4)
    with pytest.raises(
        UserError, match=r"up to 0\.25 away from those of .*reference\.npz, more than .*tolerance=0\.2;"
    ):
        convert.run(dataclasses.replace(config, tolerance=0.2), tmp_path / "strict")


def test_a_wrong_layout_shows_in_the_check(source, tmp_path, reference):
    config = convert.ConvertConfig(
        source=str(source), reference=str(reference), tolerance=0.3, rope_layout="interleaved", mesh=ONE
    )
    with pytest.raises(UserError, match="away from those of"):
        convert.run(config, tmp_path / "run")


def test_a_difference_in_two_numbers():
    expected = np.log(np.array([[[0.5, 0.25, 0.25]]]))
    actual = np.log(np.array([[[0.25, 0.5, 0.25]]])) + 2  # a constant moves logits but no probability
    difference = convert.compare(actual, expected)
    assert difference.kl == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert difference.largest == pytest.approx(2 + np.log(2))
    nothing = np.full((1, 1, 3), np.nan)
    assert np.isnan(convert.compare(nothing, expected).largest) and np.isnan(convert.compare(expected, nothing).largest)
    assert convert.compare(nothing, nothing) == convert.Difference(0.0, 0.0)


def test_weights_that_are_no_numbers_are_copied_like_others(tmp_path, params):
    broken = {**params, "final_norm": {"scale": params["final_norm"]["scale"].at[3].set(np.nan)}}
    huggingface.save(tmp_path / "model", MODEL, broken)
    config = convert.ConvertConfig(source=str(tmp_path / "model"), mesh=ONE)
    assert convert.run(config, tmp_path / "run") == convert.Difference(0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, r"set --config\.source to what"),
        ({"source": "nowhere"}, r"no model at nowhere: name a run folder, a Hugging Face folder, a \.gguf file or"),
        ({"to": "gguf"}, r"config\.to='gguf' is not one of run, huggingface"),
        ({"norm_head": "maybe"}, r"norm_head='maybe' is neither yes nor no"),
        ({"position": "alibi"}, r"position='alibi' was asked for, but every llama model has 'rope'"),
        (
            {"family": "baichuan2", "to": "huggingface"},
            r"family='baichuan2' is not one of llama, qwen2, baichuan, qwen",
        ),
        ({"family": "qwen", "to": "huggingface"}, r"a qwen checkpoint cannot express this model: qkv_bias False"),
        ({"reference": "nothing.npz"}, r"no reference nothing\.npz"),
        ({"shard_gigabytes": 0.0}, r"shard_gigabytes=0\.0 must be positive"),
        ({"shard_gigabytes": float("inf")}, r"shard_gigabytes=inf must be positive and finite"),
        ({"step": 3}, r"config\.step=3: .*model is no run folder"),
        ({"check_tokens": 0}, r"check_tokens=0 must be positive"),
    ],
)
def test_mistakes(source, tmp_path, changes, message):
    config = dataclasses.replace(convert.ConvertConfig(source=str(source), mesh=ONE), **changes)
    with pytest.raises(UserError, match=message) as caught:
        convert.run(config, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_nothing_is_overwritten(source, run_folder):
    for to in convert.TARGETS:
        with pytest.raises(UserError, match=r"is not empty: choose another --workdir for the"):
            convert.run(convert.ConvertConfig(source=str(source), to=to), run_folder)
    with pytest.raises(UserError, match="has checkpoints already"):
        checkpoint.save_model(run_folder, MODEL, {})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.zeros((1, 2), int)}, "is not an .npz file with ids"),
        ({"ids": np.zeros((1, 2), int), "logits": np.zeros((1, 2, 9))}, r"ids \[1, 2\] and logits \[1, 2, 9\]; with"),
        ({"ids": np.full((1, 1), 296), "logits": np.zeros((1, 1, 296))}, "ids outside the vocabulary of 296"),
        ({"ids": np.zeros((1, 1)), "logits": np.zeros((1, 1, 296))}, "ids of float64, not whole numbers"),
        ({"ids": np.zeros((0, 4), int), "logits": np.zeros((0, 4, 296))}, "must be .* and not empty"),
        ({"ids": np.zeros((1, 2), int), "logits": np.zeros((1, 3, 296))}, r"must be \[B, T\] and \[B, T, V\]"),
        ({"ids": np.zeros((1, 1), int), "logits": np.full((1, 1, 296), np.nan)}, "no finite real numbers"),
        ({"ids": np.zeros((1, 1), int), "logits": np.full((1, 1, 296), "a")}, "no finite real numbers"),
        (np.zeros(3), "is not an .npz file with ids"),
        ({"ids": np.array([[object()]]), "logits": np.zeros((1, 1, 296))}, "is not an .npz file with ids"),
        (None, "is not an .npz file with ids"),
    ],
)
def test_unusable_references(tmp_path, arrays, message):
    path = tmp_path / "reference.npz"
    path.write_bytes(b"PK no zip")
    if isinstance(arrays, np.ndarray):
        with path.open("wb") as file:
            np.save(file, arrays)
    elif arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as caught:
        convert.check_reference(path, *convert.read_reference(path), MODEL)
    assert "\n" not in str(caught.value)


def test_an_unusable_reference_is_found_before_anything_is_loaded(source, tmp_path, monkeypatch):
    monkeypatch.delattr(pretrained, "load_model")
    (tmp_path / "empty.npz").touch()
    config = convert.ConvertConfig(source=str(source), reference=str(tmp_path / "empty.npz"), mesh=ONE)
    with pytest.raises(UserError, match=r"is not an \.npz file with ids"):
        convert.run(config, tmp_path / "run")


def test_other_files_make_no_tokenizer(source, tmp_path, params, caplog):
    huggingface.save(tmp_path / "bare", MODEL, params, files=[source / "generation_config.json"])
    convert.run(convert.ConvertConfig(source=str(tmp_path / "bare"), mesh=ONE), tmp_path / "run")
    assert "has no tokenizer: the result will have none" in caplog.text
    assert (tmp_path / "run/generation_config.json").is_file()


def test_a_folder_without_tokenizer_and_a_tokenizer_of_another_model(source, tmp_path, params, caplog):
    huggingface.save(tmp_path / "bare", MODEL, params)
    convert.run(convert.ConvertConfig(source=str(tmp_path / "bare"), mesh=ONE), tmp_path / "run")
    assert "has no tokenizer: the result will have none" in caplog.text
    small = dataclasses.replace(MODEL, vocab_size=272)
    huggingface.save(
        tmp_path / "small", small, models.init(small, jax.random.key(0)), files=[source / "tokenizer.model"]
    )
    with pytest.raises(
        UserError, match=r"the tokenizer does not belong to .*small: it has 280 ids, the model only 272"
    ):
        convert.run(convert.ConvertConfig(source=str(tmp_path / "small"), mesh=ONE), tmp_path / "other")


@pytest.mark.parametrize("name", ["import", "export"])
def test_the_configs_are_valid(name):
    config = runner.load_config(f"configs/convert/{name}.py", convert.ConvertConfig)
    assert config.to == {"import": "run", "export": "huggingface"}[name]


def test_the_command_fails_in_one_line(source, tmp_path, reference):
    command = [sys.executable, "-m", "experiments.convert", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.source={source}", f"--config.reference={reference}", "--config.mesh.data=8"]
    done = subprocess.run(command, cwd=runner.REPOSITORY, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the logits of ")
    assert "Traceback" not in done.stderr and "largest logit difference 0.25" in done.stdout
