"""The experiment on a checkpoint of random parameters: its output, its file, and the mistakes one can make."""

import dataclasses
import json

import jax
import pytest

from experiments import generate, runner
from llm_jax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig, SamplingConfig, TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.optim import adamw
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.sampling.text import complete, describe
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.tokenization.train import train_on_texts
from llm_jax.training import checkpoint
from llm_jax.training.state import init_state

MODEL = ModelConfig(
    vocab_size=290, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_size=16, max_length=64,
    init_std=0.5,
)  # fmt: skip
CONFIG = generate.GenerateConfig(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's folder with random parameters at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    model = train_on_texts(["one two three 一二三\n" * 9], TokenizerConfig(vocab_size=285))
    (folder / "tokenizer.model").write_bytes(model)
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:1])
    with checkpoint.Checkpointer(folder, CheckpointConfig(), MODEL, 1) as checkpointer:
        optimizer = adamw.build(OptimizerConfig(warmup_steps=0), adamw.decay_mask)
        for step in (1, 2):
            checkpointer.save(init_state(MODEL, optimizer, mesh, jax.random.key(step)), step)
    return folder


def test_it_prints_and_saves_what_the_model_continues(workdir, tmp_path, capsys):
    output = tmp_path / "new" / "samples.json"
    samples = generate.run(CONFIG, workdir, ("one", "一"), str(output))
    _, params, step = checkpoint.load_model(workdir)
    tokenizer = tokenizers.load(workdir / "tokenizer.model")
    expected = complete(params, MODEL, tokenizer, ["one", "一"], SamplingConfig(max_new_tokens=8, temperature=0.0))
    assert (samples, step) == (expected, 2)
    saved = json.loads(output.read_text())
    assert [(s["prompt"], s["completion"]) for s in saved] == [(s.prompt, s.completion) for s in samples]
    assert saved[0]["settings"] == "greedy"
    assert "one" + samples[0].completion.splitlines()[0] in capsys.readouterr().out


def test_a_step_and_the_configs_prompts(workdir):
    config = dataclasses.replace(CONFIG, step=1, prompts=("two",))
    assert [s.prompt for s in generate.run(config, workdir)] == ["two"]
    assert generate.run(config, workdir) != generate.run(dataclasses.replace(config, step=2), workdir)


@pytest.mark.parametrize(
    ("config", "prompts", "message"),
    [
        (CONFIG, (), r'nothing to continue: give a --prompt="\.\.\."'),
        (dataclasses.replace(CONFIG, step=7), ("one",), r"no checkpoint of step 7; it has 1, 2"),
        (dataclasses.replace(CONFIG, max_new_tokens=99), ("one",), r"passes the room of 64"),
    ],
)
def test_mistakes(workdir, config, prompts, message):
    with pytest.raises(UserError, match=message):
        generate.run(config, workdir, prompts)


def test_a_wrong_workdir(tmp_path, workdir):
    with pytest.raises(UserError, match="is neither a run folder"):
        generate.run(CONFIG, tmp_path, ("one",))


def test_a_run_without_its_tokenizer(tmp_path, workdir):
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    with pytest.raises(UserError, match="no tokenizer in"):
        generate.run(CONFIG, tmp_path, ("one",))


@pytest.mark.parametrize("name", ["demo", "greedy"])
def test_the_configs_are_valid(name):
    config = runner.load_config(f"configs/generate/{name}.py", generate.GenerateConfig)
    assert config.max_new_tokens == 96


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (SamplingConfig(temperature=0.0, top_k=5, repetition_penalty=1.2), "greedy, repetition penalty 1.2"),
        (SamplingConfig(temperature=0.8, top_k=5, top_p=0.9), "temperature 0.8, top-k 5, top-p 0.9"),
    ],
)
def test_settings_in_words(sampling, words):
    assert describe(sampling) == words
