"""Generation against the plain model without cache or padding, and what must not change a continuation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.config import MeshConfig, ModelConfig, SamplingConfig
from llm_jax.errors import UserError
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import rules
from llm_jax.sampling import steps
from llm_jax.sampling.generate import generate
from llm_jax.sampling.processors import Processors, process

BASE = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    ffn_size=40,
    max_length=32,
    init_std=0.4,
)
VARIANTS = {
    "rope": {},
    "tied": {"tie_embeddings": True},
    "alibi": {"position": "alibi", "window_sizes": (3, 0)},
    "grouped": {"num_kv_heads": 2, "norm_head": True, "qkv_bias": True},
}
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(3, 61, length).tolist() for length in (5, 1, 17, 9, 2)]
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)
WARM = SamplingConfig(max_new_tokens=12, temperature=1.3, top_k=20, top_p=0.9, repetition_penalty=1.1, seed=3)

forward = jax.jit(models.logits, static_argnums=1)


@functools.cache
def build(name: str = "rope"):
    config = dataclasses.replace(BASE, **VARIANTS[name])
    return models.init(config, jax.random.key(1)), config


def without_cache(params, config, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
    """The greedy continuation, from the whole text so far at every step."""
    tokens, logprobs = list(prompt), []
    for _ in range(steps):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        logits_V = np.asarray(forward(params, config, padded), np.float64)[0, len(tokens) - 1]
        token = int(logits_V.argmax())
        logprobs.append(float(logits_V[token] - np.log(np.exp(logits_V).sum())))
        tokens.append(token)
    return tokens[len(prompt) :], logprobs


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_is_the_argmax_of_the_model_without_cache(name):
    params, config = build(name)
    for prompt, ours in zip(PROMPTS, generate(params, config, PROMPTS, GREEDY)):
        tokens, logprobs = without_cache(params, config, prompt, 12)
        assert ours.tokens == tokens
        np.testing.assert_allclose(ours.logprobs, logprobs, rtol=1e-4, atol=1e-4)
        assert ours.finished == "length"


@pytest.mark.parametrize(("name", "sampling"), [("rope", WARM), ("alibi", GREEDY)])
def test_a_prompt_alone_continues_as_in_a_batch(name, sampling):
    params, config = build(name)
    together = generate(params, config, PROMPTS, sampling)
    for i in (0, 2) if name == "rope" else (0,):
        (alone,) = generate(params, config, [PROMPTS[i]], sampling, streams=[i])
        assert alone.tokens == together[i].tokens
        np.testing.assert_allclose(alone.logprobs, together[i].logprobs, rtol=1e-4, atol=1e-4)


def test_what_fills_the_padding_does_not_matter():
    params, config = build()
    sampling = dataclasses.replace(GREEDY, repetition_penalty=1e6)
    expected = generate(params, config, PROMPTS, sampling, pad_id=0)
    for pad_id in {token for row in expected for token in row.tokens}:
        assert generate(params, config, PROMPTS, sampling, pad_id=pad_id) == expected


def test_fewer_new_tokens_are_a_prefix_of_more():
    params, config = build()
    more = generate(params, config, PROMPTS, WARM)
    for count in (1, 2, 7):
        fewer = generate(params, config, PROMPTS, dataclasses.replace(WARM, max_new_tokens=count))
        assert [row.tokens for row in fewer] == [row.tokens[:count] for row in more]


def test_a_row_ends_with_its_first_stop_id():
    params, config = build()
    free = generate(params, config, PROMPTS, GREEDY)
    stop_ids = (free[0].tokens[3], free[2].tokens[5])
    for stopped, row in zip(generate(params, config, PROMPTS, GREEDY, stop_ids=stop_ids), free):
        ends = [i for i, token in enumerate(row.tokens) if token in stop_ids]
        end = ends[0] + 1 if ends else 12
        assert (stopped.tokens, stopped.logprobs) == (row.tokens[:end], row.logprobs[:end])
        assert stopped.finished == ("stop" if ends else "length")


def test_the_loop_ends_when_every_row_is_done(monkeypatch):
    states = []
    compiled = steps.decode
    monkeypatch.setattr(steps, "decode", lambda *args: states.append(compiled(*args)) or states[-1])
    monkeypatch.setattr(steps, "programs", tuple)
    params, config = build()
    free = generate(params, config, PROMPTS, GREEDY)
    stop_ids = [row.tokens[2] for row in free]
    generate(params, config, PROMPTS, GREEDY, stop_ids=stop_ids)
    assert int(states[0].step) == 12
    assert int(states[1].step) <= 3


def test_draws_follow_the_processed_distribution():
    params, config = build()
    prompt, count = PROMPTS[0], 2048
    drawn = generate(params, config, [prompt] * count, WARM)
    counts_V = np.bincount([row.tokens[0] for row in drawn], minlength=61)
    seen_BV = jnp.zeros((1, 61), bool).at[0, jnp.array(prompt)].set(True)
    logits_BV = forward(params, config, np.array([prompt], np.int32))[:, -1]
    expected_V = count * np.asarray(jax.nn.softmax(process(logits_BV, seen_BV, Processors.of(WARM))))[0]
    assert not counts_V[expected_V == 0].any()
    possible = expected_V > 0
    statistic = np.sum((counts_V - expected_V)[possible] ** 2 / expected_V[possible])
    assert statistic < possible.sum() + 5 * np.sqrt(2 * possible.sum())  # chi-squared, five standard deviations


def test_steps_draw_independently():
    params, config = build()
    flat = jax.tree.map(jnp.zeros_like, params)  # every token is equally likely
    rows = generate(flat, config, [[5]] * 2000, WARM)  # equal logits pass every processor unchanged
    tokens_BN = np.array([row.tokens for row in rows])
    assert abs(np.corrcoef(tokens_BN.T) - np.eye(12)).max() < 0.12
    np.testing.assert_allclose([row.logprobs for row in rows], -np.log(61), rtol=1e-5)


def test_the_seed_and_the_stream_choose_the_draws():
    params, config = build()
    prompts = [PROMPTS[2]] * 5
    rows = generate(params, config, prompts, WARM)
    assert len({tuple(row.tokens) for row in rows}) == 5
    assert generate(params, config, prompts, WARM, streams=[1, 0, 3, 2, 4]) == [rows[i] for i in (1, 0, 3, 2, 4)]
    assert generate(params, config, prompts, dataclasses.replace(WARM, seed=4))[0] != rows[0]


def test_the_penalty_looks_at_the_prompt_and_at_every_draw():
    params, config = build()
    rows = generate(params, config, PROMPTS, dataclasses.replace(GREEDY, repetition_penalty=1e6))
    for prompt, row in zip(PROMPTS, rows):
        assert len(set(row.tokens)) == len(row.tokens)
        assert not set(row.tokens) & set(prompt)


def test_an_empty_prompt_starts_from_bos():
    params, config = build()
    rest = PROMPTS[:4]
    assert generate(params, config, [[], *rest], GREEDY, bos_id=7) == generate(params, config, [[7], *rest], GREEDY)
    assert generate(params, config, [], GREEDY) == []


def compiled() -> tuple[int, int]:
    return steps.prefill._cache_size(), steps.decode._cache_size()


def test_only_another_shape_or_processor_compiles_anew_and_the_log_says_so(caplog):
    caplog.set_level("INFO", "llm_jax.sampling.generate")
    jax.clear_caches()
    params, config = build()
    generate(params, config, PROMPTS, WARM)
    before = compiled()
    assert "batch of 8 prompts x 1 samples, prompts up to 32, 16 new tokens" in caplog.text
    caplog.clear()
    other = SamplingConfig(max_new_tokens=9, temperature=0.5, top_k=7, top_p=0.3, repetition_penalty=1.7, seed=5)
    generate(params, config, [[4] * 20, *([[5, 6]] * 7)], other, stop_ids=[1, 2, 3])
    assert compiled() == before and not caplog.text
    generate(params, config, PROMPTS, dataclasses.replace(other, top_k=0))
    assert compiled() == (before[0] + 1, before[1] + 1) and "compiled" in caplog.text
    caplog.clear()
    generate(params, config, PROMPTS, dataclasses.replace(other, top_k=0), stop_ids=[1, 2, 3, 4, 5])
    assert compiled()[1] == before[1] + 2 and "compiled" in caplog.text


class Letters:
    """A tokenizer whose every id is one byte, for the ends that text makes."""

    vocab_size = 60  # one less than the model's

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode_bytes(self, ids):
        return bytes(ids)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_parameters_laid_out_for_decoding_give_the_same(quantization):
    for name in VARIANTS:
        params, config = build(name)
        if quantization != "none":
            config, params = models.quantize(params, config, quantization)
        stacked = generate(params, config, PROMPTS, WARM)
        decoding, laid_out = models.for_decoding(params, config)
        assert decoding.decoding_layout and not models.is_stacked(laid_out)
        shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (laid_out, models.abstract(decoding))]
        assert sum(map(math.prod, shapes[0])) == sum(map(math.prod, shapes[1]))
        apart = generate(laid_out, decoding, PROMPTS, WARM)
        assert [row.tokens for row in apart] == [row.tokens for row in stacked]
        for row, other in zip(apart, stacked):
            np.testing.assert_allclose(row.logprobs, other.logprobs, rtol=1e-4, atol=1e-4)


def test_laying_out_for_decoding_frees_what_it_replaces():
    params, config = build("grouped")
    given = jax.tree.map(jnp.copy, params)
    decoding, laid_out = models.for_decoding(given, config, donate=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given["layers"], given["head"])))
    other, kept = models.for_decoding(params, config)
    assert generate(laid_out, decoding, PROMPTS, GREEDY) == generate(kept, other, PROMPTS, GREEDY)
    with pytest.raises(UserError, match="laid out for decoding already"):
        models.for_decoding(laid_out, decoding)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_prompt_read_in_chunks_continues_the_same(name):
    params, config = build(name)
    whole = generate(params, config, PROMPTS, GREEDY)
    parts = generate(params, config, PROMPTS, dataclasses.replace(GREEDY, prefill_chunk=4))
    assert steps.shape_for(dataclasses.replace(GREEDY, prefill_chunk=4), 17)[1] == 2
    assert [row.tokens for row in parts] == [row.tokens for row in whole]
    for row, other in zip(parts, whole):
        np.testing.assert_allclose(row.logprobs, other.logprobs, rtol=1e-4, atol=1e-4)


def test_samples_of_one_prompt_differ_and_the_first_is_what_one_would_be():
    params, config = build()
    one = generate(params, config, PROMPTS, WARM)
    three = generate(params, config, PROMPTS, dataclasses.replace(WARM, num_samples=3))
    assert [row.tokens for row in three[::3]] == [row.tokens for row in one]
    for i in range(len(PROMPTS)):
        assert len({tuple(row.tokens) for row in three[3 * i : 3 * i + 3]}) == 3
    two = generate(params, config, PROMPTS[1:3], dataclasses.replace(WARM, num_samples=2), streams=[1, 2])
    assert [row.tokens for row in two] == [three[i].tokens for i in (3, 4, 6, 7)]


def test_listening_tells_every_token_once_and_changes_nothing():
    params, config = build()
    silent = generate(params, config, PROMPTS, WARM)
    stop_ids = [silent[0].tokens[5]]
    told: dict[int, list[int]] = {row: [] for row in range(len(PROMPTS))}
    calls = []

    def listen(row: int, tokens: list[int]) -> None:
        told[row] += tokens
        calls.append(row)

    heard = generate(params, config, PROMPTS, WARM, stop_ids=stop_ids, on_tokens=listen)
    assert heard == generate(params, config, PROMPTS, WARM, stop_ids=stop_ids)
    assert [told[row] for row in told] == [row.tokens for row in heard]
    assert calls.count(1) > 1


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it():
    params, config = build()
    free = generate(params, config, PROMPTS, GREEDY)
    chosen = free[0].tokens[3:5]
    stopped = generate(params, config, PROMPTS, GREEDY, stop_strings=[bytes(chosen).decode()], tokenizer=Letters())
    for row, whole in zip(stopped, free):
        ends = [i for i in range(2, 13) if whole.tokens[i - 2 : i] == chosen]
        assert row.tokens == whole.tokens[: ends[0] if ends else 12]
        assert row.finished == ("stop" if ends else "length")
    assert len(stopped[0].tokens) <= 5


def test_an_int8_cache_stays_close_and_is_smaller():
    params, config = build("grouped")
    exact = generate(params, config, PROMPTS, GREEDY)
    rounded = generate(params, config, PROMPTS, dataclasses.replace(GREEDY, cache_dtype="int8"))
    first = np.array([[row.logprobs[0] for row in rows] for rows in (exact, rounded)])
    assert 0 < np.abs(first[0] - first[1]).max() < 0.1
    float_cache, int8_cache = (models.init_cache(config, 2, 64, dtype) for dtype in ("float32", "int8"))
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers)) for cache in (float_cache, int8_cache)]
    assert sizes[1] == sizes[0] * (1 / 4 + 1 / config.head_dim)


def test_int8_keys_and_values_are_rounded_to_a_127th_of_their_largest():
    cache = models.init_cache(BASE, 1, 5, "int8", stacked=False).layers[0]
    k, v = RANDOM.normal(size=(2, 1, 3, 4, 8)).astype(np.float32)
    k[0, 1, 2] = 0
    for written, original in zip(cache.write(k, v, jnp.int32(1)).read(jnp.float32), (k, v)):
        step = np.abs(original).max(-1, keepdims=True) / 127
        difference = np.asarray(written)[:, :, 1:4].transpose(0, 2, 1, 3) - original
        assert (np.abs(difference) <= step / 2 + 1e-6).all()
        assert not np.asarray(written)[:, :, [0, 4]].any()


def test_more_context_than_the_trained_length_where_it_is_asked_for():
    params, config = build()
    short = dataclasses.replace(config, max_length=8)
    sampling = dataclasses.replace(GREEDY, max_context=64)
    assert generate(params, short, PROMPTS, sampling) == generate(params, config, PROMPTS, GREEDY)


def test_sharded_parameters_generate_the_same():
    config = dataclasses.replace(BASE, vocab_size=64, num_kv_heads=2)
    params = models.init(config, jax.random.key(1))
    mesh = mesh_lib.build(MeshConfig(data=4, tensor=2), jax.devices())
    placed = jax.device_put(params, rules.shardings(models.logical_axes(config), models.abstract(config), mesh))
    with jax.set_mesh(mesh):
        sharded = generate(placed, config, PROMPTS, GREEDY)
    for row, other in zip(sharded, generate(params, config, PROMPTS, GREEDY)):
        assert row.tokens == other.tokens
        np.testing.assert_allclose(row.logprobs, other.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[5], [5] * 21], {}, r"prompt 1 has 21 tokens: with 12 new ones it passes the room of 32"),
        ([[5, 61]], {}, r"prompt 0 holds token 61, the model's vocabulary is 61"),
        ([[5], [6]], {"streams": [1]}, r"1 streams for 2 prompts"),
        ([[5]], {"streams": [-1]}, r"streams must be from 0"),
        ([[5]], {"stop_strings": ["x"]}, r"stop strings need the tokenizer"),
        ([[5]], {"stop_strings": [""], "tokenizer": Letters()}, r"a stop string is empty"),
    ],
)
def test_mistakes(prompts, options, message):
    params, config = build()
    with pytest.raises(UserError, match=message):
        generate(params, config, prompts, GREEDY, **options)


def test_the_longest_prompt_that_fits():
    params, config = build()
    assert len(generate(params, config, [[5] * 20, *PROMPTS[:4]], GREEDY)[0].tokens) == 12
