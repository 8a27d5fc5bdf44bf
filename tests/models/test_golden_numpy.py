"""What transformers lacks against stored results of plain formulas: logits within 1e-4, greedy continuations equal."""

import functools

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.config import SamplingConfig
from llm_jax.sampling.generate import generate
from tests.golden import make_numpy

GREEDY = SamplingConfig(max_new_tokens=make_numpy.NEW_TOKENS, temperature=0.0, max_context=64)

forward = jax.jit(models.logits, static_argnums=1)


@functools.cache
def case(name):
    """Config, parameters and, for each prompt, its length, all tokens and their logits."""
    config = make_numpy.config(name)
    seed = list(make_numpy.CASES).index(name)
    with np.load(make_numpy.FILE) as stored:
        rows = [
            (len(prompt), stored[f"{name}/{row}/tokens"], stored[f"{name}/{row}/logits"])
            for row, prompt in enumerate(make_numpy.prompts(seed))
        ]
    return config, jax.tree.map(jax.numpy.asarray, make_numpy.parameters(config, seed)), rows


@pytest.mark.parametrize("name", make_numpy.CASES)
def test_prompts_packed_into_one_row_without_a_cache(name):
    config, params, rows = case(name)
    tokens = np.concatenate([tokens[:length] for length, tokens, _ in rows])[None]
    segments = np.concatenate([np.full(length, row + 1) for row, (length, _, _) in enumerate(rows)])[None]
    positions = np.concatenate([np.arange(length) for length, _, _ in rows])[None]
    got = forward(params, config, tokens, positions=positions, segment_ids=segments)[0]
    want = np.concatenate([logits[:length] for length, _, logits in rows])
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name", make_numpy.CASES)
def test_a_padded_batch_with_a_cache(name):
    config, params, rows = case(name)
    width = max(length for length, _, _ in rows)
    tokens, segments = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    for row, (length, stored, _) in enumerate(rows):
        tokens[row, width - length :], segments[row, width - length :] = stored[:length], 1
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    cache = models.init_cache(config, len(rows), 32)
    part, cache = forward(params, config, tokens, positions=positions, segment_ids=segments, cache=cache)
    parts = [part]
    for step in range(make_numpy.NEW_TOKENS):
        token = np.array([stored[length + step] for length, stored, _ in rows])[:, None]
        part, cache = forward(params, config, token, positions=positions[:, -1:] + 1 + step, cache=cache)
        parts.append(part)
    got = np.concatenate(parts, axis=1)
    for row, (length, _, logits) in enumerate(rows):
        np.testing.assert_allclose(got[row, width - length :], logits, atol=1e-4)


@pytest.mark.parametrize("name", make_numpy.CASES)
def test_greedy_continuations(name):
    config, params, rows = case(name)
    prompts = [tokens[:length].tolist() for length, tokens, _ in rows]
    decoding, laid_out = models.for_decoding(params, config)
    got = generate(laid_out, decoding, prompts, GREEDY)
    assert [result.tokens for result in got] == [tokens[length:].tolist() for length, tokens, _ in rows]


def test_a_prompt_alone_and_read_in_chunks():
    config, params, rows = case("qwen")
    length, tokens, _ = rows[-1]
    for chunk in (512, 4):
        sampling = SamplingConfig(make_numpy.NEW_TOKENS, temperature=0.0, max_context=64, prefill_chunk=chunk)
        (got,) = generate(params, config, [tokens[:length].tolist()], sampling)
        assert got.tokens == tokens[length:].tolist()
