"""Rollouts against full forward passes and a brute-force sampler, and what must not change a response."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.alignment import rollout
from llm_jax.alignment.policy_config import RolloutConfig
from llm_jax.alignment.prompts import Prompt
from llm_jax.config import MeshConfig, ModelConfig, SamplingConfig
from llm_jax.errors import UserError
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import rules

MODEL = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, ffn_size=24, max_length=32,
    init_std=0.4,
)  # fmt: skip
RANDOM = np.random.default_rng(0)
PROMPTS = [Prompt((), tuple(RANDOM.integers(3, 32, length).tolist())) for length in (5, 1, 9, 3, 7, 2, 4)]
STOP = (1, 2, 3, 4)
SAMPLING = SamplingConfig(max_new_tokens=10, temperature=0.8, top_p=0.9, num_samples=2, seed=3)
SETTINGS = RolloutConfig(prompts=7, max_prompt_tokens=10, sampling=SAMPLING)
REFILL = dataclasses.replace(SETTINGS, rows=4)

forward = jax.jit(models.logits, static_argnums=1)


@functools.cache
def params():
    return models.init(MODEL, jax.random.key(1))


@functools.cache
def rolled(rows: int = 0):
    settings = dataclasses.replace(SETTINGS, rows=rows)
    return rollout.roll(params(), MODEL, PROMPTS, settings, stop_ids=STOP)


def log_softmax(tokens, temperature=SAMPLING.temperature):
    """Float64 [T,V] of a text's logits over the temperature, from one forward pass without padding or cache."""
    padded = np.zeros((1, 20), np.int32)
    padded[0, : len(tokens)] = tokens
    logits_TV = np.asarray(forward(params(), MODEL, padded), np.float64)[0, : len(tokens)] / temperature
    return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


def nucleus(logprobs_V, p=SAMPLING.top_p):
    """Which tokens top-p keeps, in float64."""
    order = np.argsort(-logprobs_V)
    before = np.cumsum(np.exp(logprobs_V[order])) - np.exp(logprobs_V[order])
    kept_V = np.zeros(len(logprobs_V), bool)
    kept_V[order[before < p]] = True
    return kept_V


def by_hand(prompt, stream, sample):
    """(tokens, logprobs, kept mass) of a response, drawn token by token from the whole text so far."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SAMPLING.seed), stream), sample)
    tokens, logprobs, masses = list(prompt), [], []
    for step in range(SAMPLING.max_new_tokens):
        logprobs_V = log_softmax(tokens)[-1]
        kept_V = nucleus(logprobs_V)
        logits_V = jnp.where(jnp.asarray(kept_V), jnp.asarray(logprobs_V, jnp.float32), -jnp.inf)
        token = int(jax.random.categorical(jax.random.fold_in(key, step), logits_V))
        tokens.append(token)
        logprobs.append(logprobs_V[token])
        masses.append(np.exp(logprobs_V[kept_V]).sum())
        if token in STOP:
            break
    return tokens[len(prompt) :], logprobs, masses


@pytest.mark.parametrize("rows", [0, 4])
def test_responses_are_those_drawn_by_hand(rows):
    found = rolled(rows)
    assert found.prompt_B.tolist() == [i for i in range(7) for _ in range(2)]
    for row in range(14):
        prompt = PROMPTS[row // 2].tokens
        tokens, logprobs, masses = by_hand(prompt, row // 2, row % 2)
        assert found.response_tokens(row) == tokens
        assert found.lengths_B[row] == len(tokens)
        assert found.ended_B[row] == (tokens[-1] in STOP)
        drawn = slice(len(prompt) - 1, len(prompt) - 1 + len(tokens))
        np.testing.assert_allclose(found.logprobs_BT[row, drawn], logprobs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.kept_mass_BT[row, drawn], masses, rtol=1e-4, atol=1e-4)
    assert 0 < found.ended_B.sum() < 14 and len(set(found.lengths_B.tolist())) > 3


@pytest.mark.parametrize("rows", [0, 4])
def test_a_row_holds_its_prompt_then_its_response_then_nothing(rows):
    found = rolled(rows)
    for row in range(14):
        prompt = PROMPTS[row // 2].tokens
        text = [*prompt, *found.response_tokens(row)]
        end, batch = len(text), type(found.batch)(*(field[row] for field in found.batch))
        assert batch.tokens[:end].tolist() == text and not batch.tokens[end:].any()
        assert batch.targets[: end - 1].tolist() == text[1:] and not batch.targets[end - 1 :].any()
        assert batch.segment_ids.tolist() == [1] * end + [0] * (20 - end)
        assert batch.positions.tolist() == [*range(end), *[0] * (20 - end)]
        expected = [len(prompt) - 1 <= t < end - 1 for t in range(20)]
        assert batch.loss_weights.tolist() == expected
        assert (found.logprobs_BT[row] < 0).tolist() == expected
        assert (found.kept_mass_BT[row] > 0).tolist() == expected
    assert found.logprobs_BT.dtype == found.kept_mass_BT.dtype == found.batch.loss_weights.dtype == np.float32


def test_logprobs_are_those_of_the_trainers_forward():
    found = rolled(4)
    logprobs_BT = np.zeros((14, 20))
    for row in range(14):
        text = [*PROMPTS[row // 2].tokens, *found.response_tokens(row)]
        logprobs_BT[row, : len(text) - 1] = log_softmax(text)[np.arange(len(text) - 1), text[1:]]
    assert rollout.check_logprobs(found, logprobs_BT, tolerance=1e-4) < 1e-4
    place = tuple(np.argwhere(found.batch.loss_weights > 0)[5])
    for wrong in (0.5, np.nan):
        logprobs_BT[place] += wrong
        with pytest.raises(UserError, match=f"row {place[0]}, place {place[1]} the logprob was .* 0.001 is allowed"):
            rollout.check_logprobs(found, logprobs_BT, tolerance=0.001)


def same(found, other):
    for name in ("ended_B", "lengths_B", "prompt_B"):
        np.testing.assert_array_equal(getattr(found, name), getattr(other, name))
    for mine, theirs in zip(found.batch, other.batch):
        np.testing.assert_array_equal(mine, theirs)
    for name in ("logprobs_BT", "kept_mass_BT"):
        np.testing.assert_allclose(getattr(found, name), getattr(other, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 8])
def test_rows_taken_over_change_no_response(rows):
    same(rolled(rows), rolled())
