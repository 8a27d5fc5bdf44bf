"""DPO's pairs as tokens by hand, its loss against responses scored alone, and the references that a run keeps."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.alignment import dpo, pair_rows
from llm_jax.alignment.config import DpoLossConfig, PairDataConfig
from llm_jax.alignment.conversations import BadRecordError
from llm_jax.alignment.preferences import Pair
from llm_jax.config import LoraConfig, MeshConfig, ModelConfig
from llm_jax.errors import UserError
from llm_jax.models import lora
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.tokenization.chat import Baichuan2, ChatML, Llama2, Message
from tests.tokenization.chat_tokenizers import Bytes

BYTES = Bytes()
HELLO = (Message("user", "Hi"),)
TALK = (Message("user", "A"), Message("assistant", "B"), Message("user", "Hi"))
MODEL = ModelConfig(
    vocab_size=556, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32, max_length=64,
    init_std=0.3,
)  # fmt: skip
LOSSES = [DpoLossConfig("sigmoid", 0.2, 0.1), DpoLossConfig("ipo", 0.5), DpoLossConfig("normalised", 3.0)]
CHUNK = 24


def ids(text):
    return BYTES.encode(text)


def some_pairs(count=7, seed=0):
    """Plain and chat pairs of many lengths and two sources, of strengths 1 to 4."""
    lengths = np.random.default_rng(seed).integers(2, 9, (count, 2)).tolist()
    return [
        Pair(HELLO * (i % 2), f"{i}".ljust(a, "+"), f"{i}".ljust(b, "-"), 1 + i % 4, source="ab"[i % 3 == 0])
        for i, (a, b) in enumerate(lengths)
    ]


def encoded(pairs, length=64, template=None):
    found, tally = dpo.encode_pairs(pairs, BYTES, template, length)
    assert not tally.counts
    return found


def referenced(pairs, seed=1):
    """The same pairs beside a reference that likes each response as much as chance has it."""
    draw = np.random.default_rng(seed)
    return [pair._replace(references=draw.uniform(-60, -10, 2).astype(np.float32)) for pair in pairs]


def config(**changes):
    return PairDataConfig(**{"sequence_length": 64, "batch_size": 2} | changes)


@functools.cache
def mesh(devices=1):
    return mesh_lib.build(MeshConfig(), jax.devices()[:devices])


@pytest.fixture(scope="module")
def params():
    return models.init(MODEL, jax.random.key(0))


PREFIX = [3, *ids("system\nYou are a helpful assistant."), 4, *ids("\n")]
CASES = {
    "plain": (HELLO, None, [1, *ids("Hi")], [*ids(" A. "), 2]),
    "plain text alone": ((), ChatML(BYTES), [1], [*ids(" A. "), 2]),
    "llama2": (HELLO, Llama2(BYTES), [1, *ids("[INST] Hi [/INST]")], [*ids(" A. "), 2]),
    "baichuan2": (HELLO, Baichuan2(BYTES, 195, 196), [195, *ids("Hi"), 196], [*ids(" A. "), 2]),
    "chatml": (
        HELLO, ChatML(BYTES),
        [*PREFIX, 3, *ids("user\nHi"), 4, *ids("\n"), 3, *ids("assistant\n")], [*ids(" A. "), 4],
    ),
    "only the last reply": (
        TALK, Llama2(BYTES), [1, *ids("[INST] A [/INST] B "), 2, 1, *ids("[INST] Hi [/INST]")], [*ids(" A. "), 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_response_is_and_what_it_comes_after(name):
    prompt, template, before, said = CASES[name]
    sample = dpo.encode_response(prompt, " A. ", BYTES, template, 200)
    assert sample.tokens.tolist() == before + said
    assert sample.weights.tolist() == [0.0] * len(before) + [1.0] * len(said)
    assert dpo.prompt_ids(prompt, BYTES, template) == before


def test_pairs_that_cannot_be_used_are_counted():
    bad = [
        Pair(HELLO, "yes", "no", record="f:1"),
        Pair(HELLO, "y" * 40, "n" * 40, record="f:2"),
        Pair((Message("user", "[INST] x"),), "yes", "no", record="f:3"),
        Pair(HELLO, "y" * 90, "no", record="f:4"),
    ]
    found, tally = dpo.encode_pairs(bad, BYTES, Llama2(BYTES), 64)
    assert [len(kept) for kept in found.values()] == [1]
    assert tally.counts == {
        "too long for 64 tokens": 1, "refused by the chat template": 1, "longer than the context": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match="no pair of responses is left"):
        dpo.encode_pairs(bad[1:], BYTES, Llama2(BYTES), 64)


def test_responses_that_are_the_same_tokens_are_refused():
    class Folding(Bytes):
        def encode(self, text):
            return super().encode(text.lower())

    with pytest.raises(BadRecordError, match="responses of the same tokens"):
        dpo.encode_pair(Pair((), "Yes", "yes"), Folding(), None, 64)


def test_a_row_says_what_belongs_to_whom():
    pairs = referenced(encoded([Pair(HELLO, "ab", "c", 3), Pair((), "d", "ef", 2)])[""])
    batch = dpo.row(pairs, 32, 4)
    tokens = [1, *ids("Hi"), *ids("ab"), 2, 1, *ids("Hi"), *ids("c"), 2, 1, *ids("d"), 2, 1, *ids("ef"), 2]
    assert batch.tokens.tolist() == tokens + [0] * (32 - len(tokens))
    assert batch.segment_ids[: len(tokens)].tolist() == [1] * 6 + [2] * 5 + [3] * 3 + [4] * 4
    learned = np.flatnonzero(batch.loss_weights)
    assert batch.targets[learned].tolist() == [*ids("ab"), 2, *ids("c"), 2, *ids("d"), 2, *ids("ef"), 2]
    assert learned.tolist() == [2, 3, 4, 8, 9, 11, 12, 14, 15, 16]
    assert batch.weights.tolist() == [1, 1, 0, 0] and batch.strengths.tolist() == [3, 2, 0, 0]
    np.testing.assert_array_equal(batch.references[:2], [pair.references for pair in pairs])


@jax.jit
def logits_of(params, tokens):
    return models.logits(params, MODEL, tokens[None])[0]


def alone(params, sample):
    """The log-probability of a response by the logits of its text alone, a token at a time in float64; its length."""
    tokens = np.pad(sample.tokens, (0, 16 - len(sample.tokens)))  # the model is causal: what comes after is not seen
    logits = np.asarray(logits_of(params, tokens), np.float64)
    nats = [
        logits[place - 1, token] - np.log(np.exp(logits[place - 1]).sum())
        for place, token in enumerate(sample.tokens)
        if sample.weights[place]
    ]
    return sum(nats), len(nats)


def oracle(params, pairs, loss):
    """The summed loss of pairs, a formula over numbers of `alone`."""
    total = 0.0
    for pair in pairs:
        gaps = []
        for sample, reference in zip((pair.chosen, pair.rejected), pair.references):
            logprob, length = alone(params, sample)
            gaps.append((logprob - float(reference)) / (length if loss.kind == "normalised" else 1))
        for sign, share in ((1, 1 - loss.label_smoothing), (-1, loss.label_smoothing)):
            gap = sign * (gaps[0] - gaps[1])
            aim = 1 / (2 * loss.beta)
            total += share * ((gap - aim) ** 2 if loss.kind == "ipo" else np.logaddexp(0, -loss.beta * gap))
    return total


@functools.lru_cache
def gradient_function(loss):
    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, batch):
        output = dpo.loss_function(MODEL, loss, CHUNK)(params, batch, None)
        return output.total, output

    return gradient


def summed(params, pairs, loss, **changes):
    """The gradient and the output over all batches."""
    batches = dpo.heldout_batches(pairs, config(**changes))
    return jax.tree.map(lambda *values: sum(values), *(gradient_function(loss)(params, batch) for batch in batches))


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), found, expected)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_packed_is_as_padded_as_shuffled_as_each_response_alone(params, loss):
    pairs = referenced([pair for several in encoded(some_pairs()).values() for pair in several])
    packed = summed(params, pairs, loss)
    assert float(packed[1].weight) == len(pairs)
    np.testing.assert_allclose(packed[1].total, oracle(params, pairs, loss), rtol=1e-4)
    assert_close(summed(params, pairs, loss, packed=False), packed)
    assert_close(summed(params, pairs[::-1], loss), packed)
    if loss.kind == "sigmoid":
        assert_close(summed(params, pairs, loss, sequence_length=63, batch_size=4), packed)


def test_swapping_a_pair_swaps_what_is_said_of_it(params):
    pairs = referenced(encoded(some_pairs(), template=None)["a"])
    back = [p._replace(chosen=p.rejected, rejected=p.chosen, references=p.references[::-1]) for p in pairs]
    there, other = (summed(params, each, LOSSES[0])[1].metrics for each in (pairs, back))
    assert float(there["margin"].total) == pytest.approx(-float(other["margin"].total), abs=1e-3)
    assert float(there["chosen_logprob"].total) == pytest.approx(float(other["rejected_logprob"].total), rel=1e-5)
    assert float(there["chosen_length"].total) == float(other["rejected_length"].total)


def test_the_references_are_those_of_each_response_alone_on_any_mesh(params):
    pairs = [pair for several in encoded(some_pairs()).values() for pair in several]
    expected = [[alone(params, pair.chosen)[0], alone(params, pair.rejected)[0]] for pair in pairs]
    for devices, batch_size in ((1, 2), (8, 8)):
        data = config(batch_size=batch_size)
        found = dpo.reference_logprobs(params, MODEL, pairs, data, CHUNK, mesh(devices))
        assert found.dtype == np.float32 and np.std(expected) > 1
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_heldout_losses_by_source_and_strength(params):
    heldout = {source: referenced(several) for source, several in encoded(some_pairs()).items()}
    found = dpo.heldout_losses(params, MODEL, heldout, config(batch_size=3), LOSSES[0], CHUNK, mesh())
    every = [pair for several in heldout.values() for pair in several]

    def mean(pairs):
        return pytest.approx(oracle(params, pairs, LOSSES[0]) / len(pairs), rel=1e-4)

    assert found["loss"] == mean(every)
    assert {found["loss/a"] == mean(heldout["a"]), found["loss/b"] == mean(heldout["b"])} == {True}
    for strength in range(1, 5):
        assert found[f"loss/strength_{strength}"] == mean([pair for pair in every if pair.strength == strength])
    assert not any(name.endswith("strength_5") for name in found)
    counts = {source: len(pairs) for source, pairs in heldout.items()}
    right = sum(found[f"accuracy/{source}"] * count for source, count in counts.items())
    assert found["accuracy"] == pytest.approx(right / len(every)) and found["accuracy"] not in (0, 1)
    assert {"margin", "chosen_logprob", "rejected_logprob", "chosen_length", "chosen_drift"} <= set(found)
    assert dpo.heldout_losses(params, MODEL, {}, config(), LOSSES[0], CHUNK, mesh()) == {}


def test_references_are_computed_once_and_others_are_refused(params, tmp_path, monkeypatch):
    train, heldout = encoded(some_pairs()), encoded(some_pairs(3, seed=5))
    data = config()

    def attach(params, sets, model=MODEL):
        return dpo.with_references(tmp_path, params, model, sets, data, CHUNK, mesh())

    first = attach(params, [train, heldout])
    for before, after in zip((train, heldout), first):
        assert {source: len(pairs) for source, pairs in before.items()} == {s: len(p) for s, p in after.items()}
        for source, pairs in after.items():
            for pair, old in zip(pairs, before[source]):
                np.testing.assert_array_equal(pair.chosen.tokens, old.chosen.tokens)
                np.testing.assert_allclose(pair.references[0], alone(params, pair.chosen)[0], atol=1e-4)
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *_: pytest.fail("they are there already"))
    jax.tree.map(np.testing.assert_array_equal, attach(params, [train, heldout]), first)
    moved = jax.tree.map(lambda x: x, params)
    moved["final_norm"] = jax.tree.map(lambda x: x.at[(0,) * x.ndim].multiply(1 + 1e-6), params["final_norm"])
    changed = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    for mistaken in (
        (moved, [train, heldout]),
        (params, [train]),
        (params, [heldout, train]),
        (params, [train], changed),
    ):
        with pytest.raises(UserError, match="of another reference model, or of other pairs: choose a new --workdir"):
            attach(*mistaken)
    (tmp_path / dpo.REFERENCES).write_bytes((tmp_path / dpo.REFERENCES).read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        attach(params, [train, heldout])


def test_the_sums_of_weights_do_not_depend_on_the_mesh(params):
    placed = jax.device_put(params, jax.sharding.NamedSharding(mesh(8), jax.sharding.PartitionSpec()))
    jax.tree.map(np.testing.assert_array_equal, dpo.weight_sums(params), dpo.weight_sums(placed))
    kernel = np.array([[1.5, -2.0], [0.25, 3.0]], np.float32)
    bits = kernel.view(np.uint32).astype(object).ravel()
    total, squares = dpo.weight_sums(kernel)
    assert (int(total), int(squares)) == (sum(bits) % 2**32, sum(bits**2) % 2**32)


def test_adapters_that_do_nothing_yet_are_the_reference(params):
    pairs = [pair for several in encoded(some_pairs()).values() for pair in several]
    settings = LoraConfig(rank=2)
    adapted = lora.attach(params, lora.init(MODEL, settings, jax.random.key(3)), settings)
    data = config()
    found = dpo.reference_logprobs(params, MODEL, pairs, data, CHUNK, mesh())
    pairs = [pair._replace(references=reference) for pair, reference in zip(pairs, found)]
    batch = next(dpo.heldout_batches(pairs, data))
    output = jax.jit(dpo.loss_function(MODEL, DpoLossConfig(), CHUNK))(adapted, batch, None)
    assert float(output.total / output.weight) == pytest.approx(np.log(2), abs=1e-5)
    assert abs(float(output.metrics["margin"].mean())) < 1e-4


def test_what_has_no_reference_gives_no_number(params):
    (batch,) = dpo.heldout_batches(encoded(some_pairs(2))["a"], config())
    _, output = gradient_function(LOSSES[0])(params, batch)
    assert np.isnan(output.total)


def test_an_epoch_has_every_pair_once(params):
    pairs = encoded(some_pairs(12))
    packed = dpo.packed(pairs, config())
    batches = [packed.batch(step) for step in range(packed.steps_per_epoch)]
    assert isinstance(packed, pair_rows.PackedPairs) and {batch.tokens.shape for batch in batches} == {(2, 64)}
    rows = packed.rows_per_epoch
    assert sum(float(batch.weights.sum()) for batch in batches) >= 12
    firsts = np.concatenate([batch.weights for batch in batches])[:rows].sum()
    assert firsts == 12
