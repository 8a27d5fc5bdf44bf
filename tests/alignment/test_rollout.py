"""Rollouts against full forward passes and a brute-force sampler, and what must not change a response."""

import dataclasses
import functools
import types

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
from llm_jax.training.language_model import logprobs_function
from tests.processes import run_together

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


@pytest.mark.parametrize("rows", [4, 8])
def test_rows_taken_over_change_no_response(rows):
    same(rolled(rows), rolled())


def test_a_prompt_alone_is_answered_as_among_others():
    whole = rolled(4)
    alone = rollout.roll(params(), MODEL, PROMPTS[2:3], SETTINGS, stop_ids=STOP, streams=[2])
    same(alone._replace(prompt_B=alone.prompt_B + 2), rollout.Rollouts(*jax.tree.map(lambda x: x[4:6], tuple(whole))))
    other = rollout.roll(params(), MODEL, PROMPTS[2:3], SETTINGS, stop_ids=STOP, streams=[9])
    assert other.response_tokens(0) != alone.response_tokens(0)


def test_rows_are_moved_back_when_all_columns_are_drawn(monkeypatch):
    shifts, real = [], rollout.steps.compact
    monkeypatch.setattr(rollout.steps, "programs", tuple)
    monkeypatch.setattr(rollout.steps, "compact", lambda state, shift: shifts.append(int(shift)) or real(state, shift))
    prompts = PROMPTS * 3
    found = rollout.roll(params(), MODEL, prompts, REFILL, stop_ids=())
    assert len(shifts) > 2 and min(shifts) >= SAMPLING.max_new_tokens
    assert not found.ended_B.any() and (found.lengths_B == 10).all()
    same(found, rollout.roll(params(), MODEL, prompts, SETTINGS, stop_ids=()))


def test_fewer_steps_are_drawn_when_rows_end_early_and_are_taken_over(monkeypatch):
    columns, real = [], rollout.steps.decode

    def counted(*args):
        before = int(args[3].step)
        state = real(*args)
        columns.append(int(state.step) - before)
        return state

    monkeypatch.setattr(rollout.steps, "programs", tuple)
    monkeypatch.setattr(rollout.steps, "decode", counted)
    prompts = PROMPTS * 4
    lengths_B = rollout.roll(params(), MODEL, prompts, REFILL, stop_ids=STOP).lengths_B
    refilled = sum(columns)
    batches = lengths_B.reshape(-1, 4).max(axis=1)  # four rows at a time, each as long as its longest
    columns.clear()
    rollout.roll(params(), MODEL, prompts[:2], SETTINGS, stop_ids=STOP)
    assert sum(columns) == batches[0] - 1  # the first token comes with the prompt
    assert refilled < 0.9 * batches.sum()


def test_eight_devices_give_what_one_does():
    mesh = mesh_lib.build(MeshConfig(data=4, tensor=2), jax.devices())
    shardings = rules.shardings(models.logical_axes(MODEL), models.abstract(MODEL), mesh)
    placed = jax.device_put(params(), shardings)
    with rollout.generation_layout(placed, MODEL) as (config, laid_out):
        kernel = laid_out["layers"][0]["ffn"]["down"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (12, 16)  # whole but for the tensor axis
        same(rollout.roll(laid_out, config, PROMPTS, REFILL, stop_ids=STOP), rolled())
    assert kernel.is_deleted() and not any(leaf.is_deleted() for leaf in jax.tree.leaves(placed))


def test_generation_reads_the_compute_dtype_and_leaves_the_given_weights_alone():
    config = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    given = jax.tree.map(jnp.copy, params())
    with rollout.generation_layout(given, config) as (decoding, laid_out):
        leaves = jax.tree.leaves(laid_out)
        assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}
        found = rollout.roll(laid_out, decoding, PROMPTS, SETTINGS, stop_ids=STOP)
    assert all(leaf.is_deleted() for leaf in leaves)
    for mine, theirs in zip(jax.tree.leaves(given), jax.tree.leaves(params())):
        np.testing.assert_array_equal(mine, theirs)
    of_trainer = logprobs_function(config, temperature=0.8, chunk_size=8)(given, found.batch).logprobs_BT
    assert rollout.check_logprobs(found, of_trainer) < 0.1  # of bfloat16's rounding
    cold = logprobs_function(config, temperature=1.0, chunk_size=8)(given, found.batch).logprobs_BT
    assert rollout.check_logprobs(found, cold) > 0.3


def test_all_mass_is_kept_without_top_p():
    settings = dataclasses.replace(SETTINGS, sampling=dataclasses.replace(SAMPLING, top_p=1.0))
    found = rollout.roll(params(), MODEL, PROMPTS, settings, stop_ids=STOP)
    assert found.kept_mass() == (1.0, 1.0)
    mean, smallest = rolled().kept_mass()
    assert 0.9 <= smallest < mean < 1


class Letters:
    """A tokenizer whose every id is one letter; 1 ends a text."""

    vocab_size, eos_id = 31, 1  # one less than the model's

    def decode_bytes(self, ids):
        return bytes(96 + token for token in ids)


def test_rewards_read_texts_without_end_tokens():
    found = rollout.roll(params(), MODEL, PROMPTS, SETTINGS, stop_ids=(1,))
    responses = rollout.responses(found, PROMPTS, Letters(), None)
    for row, response in enumerate(responses):
        ids = found.response_tokens(row)
        assert response.text == "".join(chr(96 + token) for token in ids if token not in (1, 31))
        assert (response.ended, response.tokens) == (ids[-1] == 1, len(ids))
    assert {response.ended for response in responses} == {True, False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0: greedy responses have no alternatives"),
        ({"top_k": 5}, "top_k=5: the update's logprobs are those of the whole vocabulary"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1: it draws from other logits"),
        ({"cache_dtype": "int8"}, "cache_dtype='int8': rounded keys and values give other logprobs"),
    ],
)
def test_settings_that_would_make_the_update_wrong_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        RolloutConfig(sampling=dataclasses.replace(SAMPLING, **changes))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts"),
        ([Prompt((), ())], {}, "prompt 0 has no tokens"),
        ([Prompt((), (5,) * 11, record="a.jsonl:3")], {}, r"prompt 0 \(a.jsonl:3\) has 11 tokens, more than"),
        ([Prompt((), (5, 40))], {}, "prompt 0 holds token 40, the model's vocabulary is 32"),
        ([Prompt((), (5,))], {"streams": [1, 2]}, "2 streams for 1 prompts"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(prompts, options, message):
    with pytest.raises(UserError, match=message):
        rollout.roll(params(), MODEL, prompts, SETTINGS, stop_ids=STOP, **options)


def test_rows_hold_whole_groups():
    with pytest.raises(UserError, match=r"rows=3 must be a multiple of sampling\.num_samples=2"):
        dataclasses.replace(SETTINGS, rows=3)


def differing(distance):
    """One response of two tokens, and logprobs of it of which one is so far off."""
    rollouts = types.SimpleNamespace(
        batch=types.SimpleNamespace(loss_weights=np.array([[0, 1, 1]])), logprobs_BT=np.array([[0.0, -1.0, -2.0]])
    )
    return rollouts, rollouts.logprobs_BT - np.array([[9.0, 0.0, distance]])


WORKER = """
import jax
from llm_jax.parallel import distributed
distributed.initialize()
from tests.alignment.test_rollout import *
from llm_jax.alignment.prompts import PromptStream

mesh = mesh_lib.build(MeshConfig(data=4, tensor=2))
shardings = rules.shardings(models.logical_axes(MODEL), models.abstract(MODEL), mesh)
place = lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])
placed = jax.tree.map(place, jax.device_get(params()), shardings)
assert not any(leaf.is_fully_addressable for leaf in jax.tree.leaves(placed))
index = jax.process_index()
mine, whole = PromptStream(PROMPTS[:6], 6, 0, index, 2), PromptStream(PROMPTS[:6], 6)
drawn = rollout.roll(placed, MODEL, mine.batch(1), REFILL, stop_ids=STOP, streams=mine.streams(1))
other = rollout.roll(params(), MODEL, whole.batch(1), REFILL, stop_ids=STOP, streams=whole.streams(1))
responses = [other.response_tokens(row) for row in range(12)]
assert [drawn.response_tokens(row) for row in range(6)] == responses[6 * index :][:6], index
"""


@pytest.mark.slow
def test_each_process_draws_for_its_own_prompts():
    run_together(["-c", WORKER])
