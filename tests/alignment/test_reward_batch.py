"""Batches of pairs: their tokens by hand, the rewards of a model that reads them packed and alone, and their order."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.alignment import reward_batch
from llm_jax.alignment.config import RewardDataConfig, RewardLossConfig
from llm_jax.alignment.preferences import Pair
from llm_jax.alignment.reward_batch import PackedPairs, ResponseEncoder, RewardBatch
from llm_jax.config import ModelConfig
from llm_jax.errors import UserError
from llm_jax.losses.preference import reward_loss
from llm_jax.tokenization.chat import Baichuan2, ChatML, JinjaTemplate, Llama2, Message
from tests.tokenization.chat_tokenizers import Bytes

BYTES = Bytes()
ENCODE = ResponseEncoder(BYTES)
HELLO = (Message("user", "Hi"),)
NO_END = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
ONLY_USERS_END = """{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}</s>{% endif %}{% endfor %}"""


def ids(text):
    return BYTES.encode(text)


def pair(number, chosen_length, rejected_length, strength=1, source="a", **fields):
    """Plain texts that begin with a number of their own; with bos and eos, two tokens longer than said."""
    chosen, rejected = (f"{number:02}".ljust(length, letter) for length, letter in
                        ((chosen_length, "+"), (rejected_length, "-")))  # fmt: skip
    return Pair((), chosen, rejected, strength, source=source, record=f"f.jsonl:{number}", **fields)


def some_pairs(count, source="a", seed=0):
    lengths = np.random.default_rng(seed).integers(3, 12, (count, 2)).tolist()
    return [pair(i, *both, strength=1 + i % 4, source=source) for i, both in enumerate(lengths)]


def encoded(pairs, length=32):
    found, tally = reward_batch.encode_pairs(pairs, ENCODE, length)
    assert not tally.counts
    return found


def config(**changes):
    return RewardDataConfig(**{"sequence_length": 32, "batch_size": 2} | changes)


def responses(batch, row):
    """The texts of a row's pairs, [(chosen, rejected)], read back through segments, positions and ends."""
    found = []
    for (chosen, rejected), weight in zip(batch.ends[row], batch.weights[row]):
        if weight:
            texts = []
            for end in (chosen, rejected):
                start = end - batch.positions[row, end]
                assert len(set(batch.segment_ids[row, start : end + 1])) == 1
                assert batch.positions[row, start : end + 1].tolist() == list(range(end + 1 - start))
                texts.append(BYTES.decode(batch.tokens[row, start : end + 1]))
            found.append(tuple(texts))
    return found


def everything(batches):
    return [texts for batch in batches for row in range(len(batch.tokens)) for texts in responses(batch, row)]


# Prompt and response as ids; what is scored at "end" is the last of them, and "last" has none of the control tokens
# after the response.
TEMPLATES = {
    "plain": (None, [1, *ids("Hi"), *ids(" A. ")], [2]),
    "llama2": (Llama2(BYTES), [1, *ids("[INST] Hi [/INST]"), *ids(" A. ")], [2]),
    "baichuan2": (Baichuan2(BYTES, 195, 196), [195, *ids("Hi"), 196, *ids(" A. ")], [2]),
    "chatml": (
        ChatML(BYTES),
        [3, *ids("system\nYou are a helpful assistant."), 4, *ids("\n"), 3, *ids("user\nHi"), 4, *ids("\n"),
         3, *ids("assistant\n A. ")],
        [4],
    ),
    "a file's without an end": (JinjaTemplate(BYTES, NO_END), [3, *ids("Hi"), 3, *ids(" A. ")], [2]),
    "a file's that ends others only": (JinjaTemplate(BYTES, ONLY_USERS_END), [*ids("Hi"), 2, *ids(" A. ")], [2]),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_id_is_the_one_to_score(name):
    template, words, end = TEMPLATES[name]
    assert ResponseEncoder(BYTES, template, "end")(HELLO, " A. ").tolist() == words + end
    assert ResponseEncoder(BYTES, template, "last")(HELLO, " A. ").tolist() == words


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_reply_that_ended_at_once_has_a_score_too(name):
    template, _, end = TEMPLATES[name]
    found = ResponseEncoder(BYTES, template, "end")(HELLO, "").tolist()
    assert found[-1:] == end and found[-2] != end[0]


def test_an_empty_prompt_is_plain_text_whatever_the_template():
    assert ResponseEncoder(BYTES, ChatML(BYTES))((), "text").tolist() == [1, *ids("text"), 2]


def test_a_pair_as_a_batch():
    safe = pair(7, 3, 4, strength=3, chosen_safe=True, rejected_safe=False)
    unknown = pair(8, 5, 2, strength=2)
    (batch,) = reward_batch.heldout_batches(encoded([safe, unknown])["a"], config(batch_size=1))
    # Which of the two comes first in the row does not matter.
    first, second = (0, 1) if responses(batch, 0)[0][0].startswith("07") else (1, 0)
    assert responses(batch, 0)[first] == ("07+", "07--")
    assert responses(batch, 0)[second] == ("08+++", "08")
    assert batch.strengths[0, [first, second]].tolist() == [3, 2]
    assert batch.weights.tolist() == [[1, 1]]
    assert batch.safety_labels[0, first].tolist() == [0, 1]
    assert batch.safety_weights[0].sum(-1)[[first, second]].tolist() == [2, 0]
    for end in batch.ends.flat:
        assert batch.tokens[0, end] == BYTES.eos_id
    used = 5 + 6 + 7 + 4
    assert sorted(set(batch.segment_ids[0].tolist())) == [0, 1, 2, 3, 4]
    assert (batch.segment_ids[0] > 0).sum() == used
    for name, field in batch._asdict().items():
        assert field.dtype == (np.float32 if name in ("weights", "safety_labels", "safety_weights") else np.int32), name


def test_an_epoch_has_every_pair_once_packed_and_padded():
    pairs = encoded(some_pairs(40))
    wanted = collections.Counter((BYTES.decode(p.chosen), BYTES.decode(p.rejected)) for p in pairs["a"])
    padded = PackedPairs(pairs, config(packed=False))
    assert (padded.rows_per_epoch, padded.pairs_per_row) == (40, 1)
    assert all(len(responses(padded.batch(step), row)) == 1 for step in range(3) for row in range(2))
    packed = PackedPairs(pairs, config(sequence_length=64, batch_size=1))
    tokens = sum(p.length for p in pairs["a"])
    assert -(-tokens // 64) <= packed.rows_per_epoch <= 1.25 * tokens / 64
    assert packed.pairs_per_row == 40 / packed.rows_per_epoch
    for found in (padded, packed):
        steps = found.steps_per_epoch
        for epoch in range(3):
            batches = [found.batch(step) for step in range(epoch * steps, (epoch + 1) * steps)]
            assert collections.Counter(everything(batches)) == wanted
    assert len({batch.ends.shape for batch in batches}) == 1


def test_the_batch_of_a_step_depends_on_seed_and_step_alone():
    pairs = encoded([*some_pairs(30), *some_pairs(20, "b", 1)])
    whole = PackedPairs(pairs, config(batch_size=4, weights={"a": 1, "b": 2}))
    again = PackedPairs(dict(reversed(pairs.items())), config(batch_size=4, weights={"b": 2, "a": 1}))
    late = list(itertools.islice(again.train_batches(start_step=5), 3))
    parts = [
        list(itertools.islice(whole.train_batches(start_step=5, process_index=i, process_count=2), 3)) for i in (0, 1)
    ]
    for i, expected in enumerate(whole.batch(step) for step in (5, 6, 7)):
        jax.tree.map(np.testing.assert_array_equal, expected, late[i])
        rows = RewardBatch(*(np.concatenate(fields) for fields in zip(parts[0][i], parts[1][i])))
        jax.tree.map(np.testing.assert_array_equal, expected, rows)
    other = PackedPairs(pairs, config(batch_size=4, weights={"a": 1, "b": 2}, seed=1))
    assert not np.array_equal(other.batch(5).tokens, whole.batch(5).tokens)
    assert not np.array_equal(whole.batch(0).tokens, whole.batch(1).tokens)


def test_weights_are_shares_of_the_pairs_and_no_pair_comes_twice_in_an_epoch():
    """Though the pairs of one source are several times as long."""
    long = [pair(i, 20, 20, source="long") for i in range(24)]
    short = [pair(i, 4, 4, source="short") for i in range(90)]
    found = PackedPairs(
        encoded([*long, *short], 48), config(sequence_length=48, batch_size=1, weights={"long": 1, "short": 2})
    )
    texts = everything(found.batch(step) for step in range(found.steps_per_epoch))
    counts = collections.Counter(len(chosen) > 10 for chosen, _ in texts)
    assert len(texts) == len(set(texts))
    assert counts[True] == pytest.approx(24, abs=1) and counts[False] == pytest.approx(48, abs=4)
    assert found.pairs_per_row == pytest.approx(len(texts) / found.rows_per_epoch, rel=0.05)


@pytest.mark.parametrize("processes", [1, 2])
def test_heldout_batches_have_every_pair_once(processes):
    pairs = encoded(some_pairs(9))["a"]
    parts = [list(reward_batch.heldout_batches(pairs, config(batch_size=4), i, processes)) for i in range(processes)]
    assert len({len(part) for part in parts}) == 1 and parts[0][0].tokens.shape == (4 // processes, 32)
    found = collections.Counter(itertools.chain(*map(everything, parts)))
    assert found == collections.Counter((BYTES.decode(p.chosen), BYTES.decode(p.rejected)) for p in pairs)


MODEL = ModelConfig(
    vocab_size=BYTES.vocab_size, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, ffn_size=32,
    max_length=64, output="reward", init_std=0.3,
)  # fmt: skip


def rewards_of(params, tokens, positions, segment_ids, ends):
    hidden = models.hidden_states(params, MODEL, tokens, positions=positions, segment_ids=segment_ids)
    scored = jnp.take_along_axis(hidden, ends.reshape(len(ends), -1)[..., None], axis=1)
    return models.rewards(params, MODEL, scored).reshape(ends.shape)


def loss(params, batch):
    found = rewards_of(params, batch.tokens, batch.positions, batch.segment_ids, batch.ends)
    labels = (batch.strengths, batch.weights, batch.safety_labels, batch.safety_weights)
    return reward_loss(found, *labels, margins=RewardLossConfig(margin="small").margins, safety_coefficient=0.3)


@pytest.fixture(scope="module")
def params():
    return models.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def rated():
    """Pairs of which some have labels of safety."""
    pairs = some_pairs(7)
    return [
        dataclasses.replace(p, chosen_safe=True, rejected_safe=i % 4 > 0) if i % 2 else p for i, p in enumerate(pairs)
    ]


def test_packed_pairs_have_the_rewards_of_responses_alone(params, rated):
    pairs = encoded(rated, 64)["a"]
    score = jax.jit(rewards_of)
    alone = {}
    for response in (response for p in pairs for response in (p.chosen, p.rejected)):
        tokens = np.pad(response, (0, 16 - len(response)))[None]  # the model is causal, so what comes after is not seen
        positions, ends = np.arange(16)[None], np.array([[len(response) - 1]])
        alone[BYTES.decode(response)] = float(score(params, tokens, positions, None, ends)[0, 0])
    assert len({round(value, 3) for value in alone.values()}) > 10, "the rewards tell responses apart"
    for batch in reward_batch.heldout_batches(pairs, config(sequence_length=64)):
        assert (batch.weights.sum(axis=1) > 1).any()
        found = score(params, batch.tokens, batch.positions, batch.segment_ids, batch.ends)
        for row in range(len(found)):
            for place, texts in enumerate(responses(batch, row)):
                np.testing.assert_allclose(found[row, place], [alone[text] for text in texts], rtol=1e-5, atol=1e-5)


def test_packed_and_padded_pairs_have_one_loss_and_gradient(params, rated):
    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, batch):
        output = loss(params, batch)
        return output.total, output

    def summed(packed):
        batches = reward_batch.heldout_batches(pairs, config(sequence_length=64, packed=packed))
        return jax.tree.map(lambda *values: sum(values), *(gradient(params, batch) for batch in batches))

    pairs = encoded(rated, 64)["a"]
    both = [summed(packed) for packed in (True, False)]
    assert float(both[0][1].weight) == 7
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *both)


def test_swapping_a_pairs_order_flips_its_gap(params, rated):
    there = encoded(rated, 64)["a"]
    back = encoded([dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen) for p in rated], 64)["a"]
    gaps = []
    for pairs in (there, back):
        batches = reward_batch.heldout_batches(pairs, config(sequence_length=64, packed=False))
        gaps.append([float(jax.jit(loss)(params, batch).metrics["reward_gap"].total) for batch in batches])
    np.testing.assert_allclose(gaps[0], np.negative(gaps[1]), rtol=1e-4, atol=1e-5)
    assert np.abs(gaps[0]).min() > 1e-3


@pytest.mark.parametrize("packed", [True, False])
def test_responses_alone_are_all_there_once_and_scored_where_they_end(packed):
    sequences = [ENCODE((), f"{i}".ljust(2 + i % 5, "x")) for i in range(21)]
    batches = list(reward_batch.response_batches(sequences, 24, 3, packed))
    seen = []
    for batch in batches:
        assert batch.tokens.shape == (3, 24) and batch.ends.shape == batch.places.shape == (3, 8 if packed else 1)
        for row, place in zip(*np.nonzero(batch.places >= 0)):
            end = batch.ends[row, place]
            start = end - batch.positions[row, end]
            number = batch.places[row, place]
            np.testing.assert_array_equal(batch.tokens[row, start : end + 1], sequences[number])
            seen.append(int(number))
    assert sorted(seen) == list(range(21))
    assert len(batches) < 7 if packed else len(batches) == 7


class NoEnd(Bytes):
    bos_id = eos_id = -1


class Folding(Bytes):
    """Knows no capital letters."""

    def encode(self, text):
        return super().encode(text.lower())


def test_pairs_that_cannot_be_used_are_counted():
    bad = [
        Pair(HELLO, "yes", "no", record="f:1"),
        Pair(HELLO, "yes" * 20, "no", record="f:2"),
        Pair((Message("user", "x" * 70),), "yes", "no", record="f:3"),
        Pair((Message("user", "[INST] x"),), "yes", "no", record="f:4"),
        Pair(HELLO, "Yes", "yes", record="f:5"),
    ]
    found, tally = reward_batch.encode_pairs(bad, ResponseEncoder(Folding(), Llama2(Folding())), 64)
    assert [len(kept) for kept in found.values()] == [1]
    assert tally.counts == {"too long for 64 tokens": 2, "not encodable": 1, "responses of the same tokens": 1}
    assert tally.first["too long for 64 tokens"].startswith("f:2: ")
    assert "reserves" in tally.first["not encodable"]


def test_responses_that_only_people_can_tell_apart_are_counted():
    with pytest.raises(UserError, match=r"no pair .* is left .*1 responses of the same tokens \(first f:5: 'Yes'\)"):
        reward_batch.encode_pairs([Pair((), "Yes", "yes", record="f:5")], ResponseEncoder(Folding()), 64)


def test_mistakes_are_one_clear_line():
    pairs = encoded(some_pairs(5))
    with pytest.raises(UserError, match="no source 'A'; did you mean 'a'"):
        PackedPairs(pairs, config(weights={"A": 1.0}))
    with pytest.raises(UserError, match=r"a sample of .* tokens does not fit into a row of 8"):
        PackedPairs(pairs, config(sequence_length=8))
    with pytest.raises(UserError, match="fewer than a batch of 16: lower RewardDataConfig"):
        PackedPairs(pairs, config(batch_size=16))
    with pytest.raises(UserError, match="batch_size=2 is not divisible by the 3 processes"):
        next(PackedPairs(pairs, config()).train_batches(process_count=3))
    with pytest.raises(UserError, match="response 2 of 2 has 12 tokens with its prompt, and there is room for 8"):
        next(reward_batch.response_batches([ENCODE((), "a"), ENCODE((), "a" * 10)], 8, 1))
    with pytest.raises(UserError, match="no token that ends a text"):
        ResponseEncoder(NoEnd())((), "x")
    assert ResponseEncoder(NoEnd(), pooling="last")((), "x").tolist() == ids("x")
    with pytest.raises(UserError, match="nothing to score"):
        ResponseEncoder(NoEnd(), pooling="last")((), "")
    with pytest.raises(UserError, match="pooling='mean'"):
        ResponseEncoder(BYTES, pooling="mean")
    with pytest.raises(UserError, match="there were none"):
        reward_batch.encode_pairs([], ENCODE, 32)


def test_strengths_without_a_margin_are_refused_before_training():
    pairs = encoded([pair(1, 3, 4, strength=5)])
    reward_batch.check_strengths(pairs, RewardLossConfig())
    with pytest.raises(UserError, match=r"source 'a' has preferences of strength 5, .* 4 steps"):
        reward_batch.check_strengths(pairs, RewardLossConfig(margin="small"))
