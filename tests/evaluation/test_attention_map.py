"""Attention probabilities by parts against a model in numpy, and which tokens belong to which part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.alignment.ghost_attention import attach
from llm_jax.errors import UserError
from llm_jax.evaluation import attention_map
from llm_jax.kernels.mask import AttentionMask
from llm_jax.models import positions
from llm_jax.models.layers import Block
from llm_jax.tokenization.chat import ChatML, JinjaTemplate, Llama2, Message
from tests.alignment import base_models
from tests.tokenization.chat_tokenizers import Bytes

MODEL = dataclasses.replace(base_models.MODEL, num_heads=4, num_kv_heads=2, head_dim=4)
TOKENS = np.random.default_rng(0).integers(3, 300, 11)
PARTS = [0, 0, 1, 1, 1, 2, 3, 3, 4, 5, 5]
FILE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


def softmax_of_scores(config, layer, x_TD, window):
    """One layer's probabilities [N,T,S], head by head and token by token."""
    x_TD = x_TD / np.sqrt(np.mean(x_TD**2, axis=1, keepdims=True) + config.norm_eps)
    x_TD = x_TD * layer["attention_norm"]["scale"]
    q_TNH, k_TKH = (np.einsum("td,dnh->tnh", x_TD, layer["attention"][name]["kernel"]) for name in ("query", "key"))
    T, N, H = q_TNH.shape
    if config.position == "rope":
        q_TNH, k_TKH = (turned(x, config.rope_theta) for x in (q_TNH, k_TKH))
    slopes = positions.alibi_slopes(N)
    found = np.zeros((N, T, T))
    for n in range(N):
        for t in range(T):
            first = max(0, t - window + 1) if window else 0
            scores = [q_TNH[t, n] @ k_TKH[s, n * k_TKH.shape[1] // N] / np.sqrt(H) for s in range(first, t + 1)]
            if config.position == "alibi":
                scores = [score - slopes[n] * (t - s) for s, score in enumerate(scores, first)]
            found[n, t, first : t + 1] = np.exp(scores) / np.sum(np.exp(scores))
    return found


def turned(x_TNH, theta):
    """Rotary positions as products of complex numbers: (i, i + H/2) is one."""
    half = x_TNH.shape[-1] // 2
    angles = np.arange(len(x_TNH))[:, None] * theta ** (-np.arange(half) / half)
    z = (x_TNH[..., :half] + 1j * x_TNH[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize(
    "changes", [{}, {"position": "alibi"}, {"window_sizes": (0, 3)}], ids=["rope", "alibi", "windows"]
)
def test_parts_against_a_model_in_numpy(changes):
    config = dataclasses.replace(MODEL, **changes)
    params = models.init(config, jax.random.key(0))
    found = attention_map.by_part(params, config, TOKENS.tolist(), PARTS)
    rotary = positions.rotary_tables(config, jnp.arange(len(TOKENS))[None]) if config.position == "rope" else None
    x_1TD = params["embedding"]["embedding"][TOKENS][None]
    for number in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, i=number: leaf[i], params["layers"])
        window = config.window_sizes[number] if config.window_sizes else 0
        wanted = softmax_of_scores(config, jax.device_get(layer), np.asarray(x_1TD[0], np.float64), window)
        slopes = jnp.asarray(positions.alibi_slopes(4)) if config.position == "alibi" else None
        x_1TD, _ = Block(config).apply({"params": layer}, x_1TD, AttentionMask(window=window, slopes=slopes), rotary)
        for looking in range(6):
            for seen in range(6):
                rows = [t for t, part in enumerate(PARTS) if part == looking]
                columns = [s for s, part in enumerate(PARTS) if part == seen]
                block = wanted[:, rows][:, :, columns]
                place = (number, slice(None), looking, seen)
                np.testing.assert_allclose(found.mass[place], block.sum(axis=2).mean(axis=1), atol=2e-5)
                np.testing.assert_allclose(found.largest[place], block.max(axis=(1, 2)), atol=2e-5)


def test_the_mass_of_a_token_is_one():
    found = attention_map.by_part(models.init(MODEL, jax.random.key(0)), MODEL, TOKENS.tolist(), PARTS)
    np.testing.assert_allclose(found.mass.sum(axis=-1), 1.0, rtol=1e-5)


def test_a_text_beyond_the_context_is_refused():
    with pytest.raises(UserError, match="has 65 tokens, and the model reads 64"):
        attention_map.by_part({}, MODEL, [3] * 65, [0] * 65)


@pytest.mark.parametrize(
    "template", [Llama2(Bytes()), ChatML(Bytes()), JinjaTemplate(Bytes(), FILE)], ids=["llama2", "chatml", "file"]
)
def test_every_part_is_what_was_said(template):
    said = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(["ask", "tell", "why", "so"])]
    told = attach(said, "Shout now.", first_only=True)
    ids, parts = attention_map.parts_of(template, told, said)
    assert ids == template.encode(told, add_generation_prompt=False)[: len(ids)] and len(ids) == len(parts)
    texts = [Bytes().decode([i for i, part in zip(ids, parts) if part == number]) for number in range(max(parts) + 1)]
    assert "Shout" not in texts[0] and texts[1].strip() == "Shout now." and len(texts) == 6
    assert all(word in text for word, text in zip(("ask", "tell", "why", "so"), texts[2:]))
    assert texts[3].strip().startswith("tell") and texts[5].strip().startswith("so") and parts == sorted(parts)


def test_a_template_that_hides_the_instruction_is_refused():
    hiding = JinjaTemplate(Bytes(), FILE.replace("m['content']", "m['content'].split('\\n')[-1]"))
    said = [Message("user", "ask"), Message("assistant", "tell")]
    with pytest.raises(UserError, match="no instruction"):
        attention_map.parts_of(hiding, attach(said, "Shout."), said)
