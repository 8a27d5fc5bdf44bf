"""Opening a model from wherever it is, and what can be asked for beside its path."""

import json

import jax
import pytest

from llm_jax import models
from llm_jax.config import ModelConfig, TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.interop import huggingface, pretrained
from llm_jax.tokenization.train import train_on_texts
from llm_jax.training import checkpoint

MODEL = ModelConfig(
    vocab_size=296, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, ffn_size=24, max_length=32
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    (root / "tokenizer.model").write_bytes(train_on_texts(["one two three\n" * 9], TokenizerConfig(vocab_size=280)))
    params = models.init(MODEL, jax.random.key(0))
    huggingface.save(root / "model", MODEL, params, files=[root / "tokenizer.model"])
    return root / "model"


def test_fields_that_leave_the_weights_alone_can_be_overridden(folder):
    windows = (0, 8)
    loaded = pretrained.load(folder, dtype="bfloat16", attention="reference", window_sizes=windows, max_length=64)
    config = loaded.config
    assert (config.param_dtype, config.attention, config.window_sizes) == ("bfloat16", "reference", windows)
    assert config.max_length == 64
    assert (loaded.tokenizer.vocab_size, loaded.chat_template) == (280, "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_layers": 3}, r"'num_layers' of a trained model cannot be overridden: dtype, max_length, .* can be"),
        ({"compute_dtyp": "float32"}, r"'compute_dtyp' .* cannot be overridden; did you mean 'compute_dtype'\?"),
        ({"param_dtype": "float32"}, r"'param_dtype' of a trained model cannot be overridden"),
        ({"compute_dtype": "int4"}, r"compute_dtype='int4' is not one of"),
        ({"norm_head": True}, r"norm_head=True was asked for, but every llama model has False"),
    ],
)
def test_other_overrides_are_refused(folder, overrides, message):
    with pytest.raises(UserError, match=message):
        pretrained.load(folder, **overrides)


def test_only_a_hugging_face_folder_leaves_facts_open(folder, tmp_path):
    checkpoint.save_model(tmp_path, *pretrained.load_model(folder))
    with pytest.raises(UserError, match=r"position: .* states it, only for a Hugging Face folder it can be given"):
        pretrained.load_model(tmp_path, position="alibi")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"no model at .*: name a run folder, a Hugging Face folder, a \.gguf file or"):
        pretrained.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, ""),
        ({"tokenizer_config.json": "{}"}, ""),
        ({"tokenizer_config.json": json.dumps({"chat_template": None})}, ""),
        ({"tokenizer_config.json": json.dumps({"chat_template": "a"})}, "a"),
        ({"tokenizer_config.json": json.dumps({"chat_template": "a"}), "chat_template.jinja": "b"}, "b"),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}
                )
            },
            "d",
        ),
    ],
)
def test_the_files_of_a_chat_template(tmp_path, files, template):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert pretrained.chat_template(tmp_path) == template


def test_a_template_with_a_senseless_name_is_passed_over(tmp_path):
    named = [{"name": ["tool"], "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert pretrained.chat_template(tmp_path) == "d"


def test_a_template_that_is_no_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not a text in UTF-8"):
        pretrained.chat_template(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", "[" * 200_000, json.dumps({"chat_template": 3})])
def test_broken_chat_templates(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        pretrained.chat_template(tmp_path)
