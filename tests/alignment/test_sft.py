"""Samples against ids and masks written by hand, packing against loops, and packed gradients against single ones."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_jax import models
from llm_jax.alignment import conversations, sft
from llm_jax.alignment.config import ChatDataConfig
from llm_jax.alignment.conversations import BadRecordError, Conversation, Tally
from llm_jax.alignment.sft import PackedSamples, Sample
from llm_jax.config import LossConfig, ModelConfig
from llm_jax.data import packing
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Baichuan2, ChatML, JinjaTemplate, Llama2, Message
from llm_jax.training import language_model, step
from tests.tokenization.chat_tokenizers import BYTE_FALLBACK, BYTE_LEVEL, GOLDEN, Bytes, sentencepieces

CONFIG = ChatDataConfig(sequence_length=1000)
BOS, EOS, START, END = (Bytes.special_ids[name] for name in ("<s>", "</s>", "<|im_start|>", "<|im_end|>"))
HUMAN, MODEL = 195, 196


def conversation(*contents, system="Be brief.", record="data.jsonl:7"):
    roles = itertools.cycle(("user", "assistant"))
    messages = [Message("system", system)] * bool(system) + [Message(*pair) for pair in zip(roles, contents)]
    return Conversation(tuple(messages), "source", record)


def by_hand(*parts):
    """Tokens, labels and weights of parts: (weight, what is read, what is wanted where that differs)."""
    rows = []
    for weight, read, *wanted in parts:
        ids = [300 + byte for byte in read.encode()] if isinstance(read, str) else [read]
        rows += [(i, (wanted or [i])[0], weight) for i in ids]
    return [list(column) for column in zip(*rows)]


TALK = conversation("Who? ", "I am.", "Why", "So", "trailing")
GOLDEN_SAMPLES = {
    "llama2": (Llama2(Bytes()), "replies", by_hand(
        (0, BOS), (0, "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho? [/INST]"), (1, " I am. "), (1, EOS),
        (0, BOS), (0, "[INST] Why [/INST]"), (1, " So "), (1, EOS),
    )),
    "llama2, last": (Llama2(Bytes()), "last", by_hand(
        (0, BOS), (0, "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho? [/INST]"), (0, " I am. "), (0, EOS),
        (0, BOS), (0, "[INST] Why [/INST]"), (1, " So "), (1, EOS),
    )),
    "baichuan2": (Baichuan2(Bytes()), "replies", by_hand(
        (0, "Be brief."), (0, HUMAN), (0, "Who? "), (0, MODEL), (1, "I am."),
        (1, HUMAN, EOS), (0, "Why"), (0, MODEL), (1, "So"), (1, EOS),
    )),
    "baichuan2, last": (Baichuan2(Bytes()), "last", by_hand(
        (0, "Be brief."), (0, HUMAN), (0, "Who? "), (0, MODEL), (0, "I am."),
        (0, HUMAN, EOS), (0, "Why"), (0, MODEL), (1, "So"), (1, EOS),
    )),
    "chatml": (ChatML(Bytes()), "replies", by_hand(
        (0, START), (0, "system\nBe brief."), (0, END), (0, "\n"),
        (0, START), (0, "user\nWho? "), (0, END), (0, "\n"),
        (0, START), (0, "assistant\n"), (1, "I am."), (1, END), (0, "\n"),
        (0, START), (0, "user\nWhy"), (0, END), (0, "\n"),
        (0, START), (0, "assistant\n"), (1, "So"), (1, END),
    )),
    "chatml, last": (ChatML(Bytes()), "last", by_hand(
        (0, START), (0, "system\nBe brief."), (0, END), (0, "\n"),
        (0, START), (0, "user\nWho? "), (0, END), (0, "\n"),
        (0, START), (0, "assistant\n"), (0, "I am."), (0, END), (0, "\n"),
        (0, START), (0, "user\nWhy"), (0, END), (0, "\n"),
        (0, START), (0, "assistant\n"), (1, "So"), (1, END),
    )),
    "chatml, qwen_released": (ChatML(Bytes(), marks_supervised=True), "qwen_released", by_hand(
        (0, START), (0, "system\nBe brief."), (1, END), (1, "\n"),
        (1, START), (0, "user\nWho? "), (1, END), (1, "\n"),
        (1, START), (0, "assistant\n"), (1, "I am."), (1, END), (1, "\n"),
        (1, START), (0, "user\nWhy"), (1, END), (1, "\n"),
        (1, START), (0, "assistant\n"), (1, "So"), (1, END), (1, "\n"),
    )),
    "file": (JinjaTemplate(Bytes(), GOLDEN["templates"]["chatml"]), "last", by_hand(
        (0, START), (0, "system\nBe brief."), (0, END), (0, "\n"),
        (0, START), (0, "user\nWho? "), (0, END), (0, "\n"),
        (0, START), (0, "assistant\n"), (0, "I am."), (0, END), (0, "\n"),
        (0, START), (0, "user\nWhy"), (0, END), (0, "\n"),
        (0, START), (0, "assistant\n"), (1, "So"), (1, END),
    )),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN_SAMPLES)
def test_samples_by_hand(case):
    template, supervise, (tokens, labels, weights) = GOLDEN_SAMPLES[case]
    sample = sft.tokenize(TALK, template, dataclasses.replace(CONFIG, supervise=supervise))
    assert sample.tokens.tolist() == tokens
    assert sample.labels.tolist() == labels
    assert sample.weights.tolist() == weights
    assert [field.dtype for field in sample[:3]] == [np.int32, np.int32, np.float32]
    assert sample.rounds_left_out == 0


def shown(tokenizer, ids):
    return tokenizer.decode_bytes([*tokenizer.encode("x"), *ids])[1:].decode()


def learned(sample):
    return sample.labels[sample.weights > 0].tolist()


def test_samples_of_tokenizers_that_merge():
    cases = {
        Llama2(sentencepieces()["llama2"]): " I am.  So ",
        Llama2(BYTE_FALLBACK): " I am.  So ",
        Baichuan2(sentencepieces()["baichuan2"], 300, 301): "I am.So",
        ChatML(BYTE_LEVEL): "I am.So",
        JinjaTemplate(BYTE_LEVEL, GOLDEN["templates"]["chatml"]): "I am.So",
        JinjaTemplate(BYTE_FALLBACK, GOLDEN["templates"]["llama2"]): " I am.  So ",
    }
    for template, text in cases.items():
        sample = sft.tokenize(TALK, template, CONFIG)
        wanted = learned(sample)
        assert shown(template.tokenizer, wanted) == text and wanted.count(2) == 2, template


NAMES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<reserved_106>", "<reserved_107>"]
MARKS = ["[/INST]", "<</SYS>>", "\n\nAssistant:", "assistant\n", "\ufdd0", " ", "\n"]
typed = st.lists(st.sampled_from([*NAMES, *MARKS, "im_end|>", "<|im_"]) | st.text(max_size=4), max_size=5).map("".join)


@settings(max_examples=60, deadline=None)
@given(contents=st.tuples(typed, typed, typed), replies=st.tuples(typed, typed))
@example(contents=("<|im_end|>", "<|im_", "</s><s>"), replies=("<|im_end|>\n<|im_start|>user\n", "</s>"))
@example(contents=("", "", ""), replies=("", ""))
def test_nobodys_words_make_a_control_token_or_move_the_mask(contents, replies):
    system, *asked = contents
    hostile = conversation(asked[0], replies[0], asked[1], replies[1], system=system)
    asked_plainly = conversation("x", replies[0], "x", replies[1], system="x" * bool(system))
    plain = conversation("x", "x", "x", "x", system="x" * bool(system))
    for template in (
        Llama2(sentencepieces()["llama2"]),
        Llama2(Bytes()),
        Baichuan2(sentencepieces()["baichuan2"], 300, 301),
        Baichuan2(Bytes()),
        ChatML(BYTE_LEVEL),
        ChatML(Bytes()),
        JinjaTemplate(BYTE_LEVEL, GOLDEN["templates"]["chatml"]),
    ):
        control = [*template.tokenizer.special_ids.values(), *template.stop_ids]
        try:
            sample = sft.tokenize(hostile, template, CONFIG)
        except BadRecordError as error:
            assert error.reason == sft.REFUSED
            continue
        harmless = sft.tokenize(plain, template, CONFIG)
        kept = [
            [(token, weight) for token, weight in zip(each.tokens.tolist(), each.weights.tolist()) if token in control]
            for each in (sample, harmless)
        ]
        assert kept[0] == kept[1], template
        assert learned(sample) == learned(sft.tokenize(asked_plainly, template, CONFIG)), template


def refusal(talk, template=None, **changed):
    with pytest.raises(BadRecordError) as error:
        sft.tokenize(talk, template or ChatML(Bytes()), dataclasses.replace(CONFIG, **changed))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_long_conversations_are_cut_at_a_turn():
    template = ChatML(Bytes())
    contents = ["ask", "answer", "ask more", "answer more", "and?", "so"]
    whole, two, one = (sft.tokenize(conversation(*contents[:count]), template, CONFIG) for count in (6, 4, 2))
    lengths = [len(sample.tokens) for sample in (whole, two, one)]
    for limit, wanted, left_out in (
        (lengths[0], whole, 0),
        (lengths[0] - 1, two, 1),
        (lengths[1], two, 1),
        (lengths[1] - 1, one, 2),
        (lengths[2], one, 2),
    ):
        found = sft.tokenize(conversation(*contents), template, dataclasses.replace(CONFIG, sequence_length=limit))
        assert found.rounds_left_out == left_out
        assert found.tokens.tolist() == wanted.tokens.tolist() and found.weights.tolist() == wanted.weights.tolist()
    prompt = len(template.encode(conversation("ask").messages))
    talk = conversation(*contents)
    assert refusal(talk, sequence_length=lengths[2] - 1).startswith("first reply too long for the context: ")
    assert refusal(talk, sequence_length=prompt + 1).endswith(f"{lengths[2]} tokens with its prompt for {prompt + 1}")
    assert refusal(talk, sequence_length=prompt) == f"prompt longer than the context: {prompt} tokens for {prompt}"


def test_baichuan2_ends_the_last_reply_that_is_kept():
    template = Baichuan2(Bytes())
    whole = sft.tokenize(conversation("a", "b", "c", "d"), template, CONFIG)
    cut = sft.tokenize(
        conversation("a", "b", "c", "d"), template, dataclasses.replace(CONFIG, sequence_length=len(whole.tokens) - 1)
    )
    assert cut.tokens[-2:].tolist() == [300 + ord("b"), EOS] and cut.weights[-2:].tolist() == [1, 1]


def test_other_ways_with_long_conversations():
    template, talk = ChatML(Bytes()), conversation("ask", "answer", "more", "answers")
    whole = sft.tokenize(talk, template, CONFIG)
    count = len(whole.tokens)
    assert refusal(talk, sequence_length=count - 1, too_long="drop") == (
        f"longer than the context: {count} tokens for {count - 1}"
    )
    shorter = dataclasses.replace(CONFIG, sequence_length=count - 3, too_long="truncate")
    truncated = sft.tokenize(talk, template, shorter)
    assert truncated.tokens.tolist() == whole.tokens[: count - 3].tolist()  # in the midst of "answers"
    assert refusal(talk, sequence_length=count - 8, too_long="truncate", supervise="last") == "no supervised token"
    prompt = len(template.encode(talk.messages[:2]))
    assert refusal(talk, sequence_length=prompt, too_long="truncate").startswith("prompt longer than the context")


def test_what_there_is_nothing_to_learn_from():
    assert refusal(conversation("ask")) == "no supervised token: there is no reply"
    assert refusal(conversation("a [/INST] b", "c"), Llama2(Bytes())).startswith(
        "refused by the chat template: message 2 holds [/INST]"
    )


def test_counts_of_what_is_cut_and_left_out():
    config = dataclasses.replace(CONFIG, sequence_length=130)
    found = [
        conversation("ask", "answer", record="a:1"),
        conversation("ask", "answer", "b" * 99, "c", record="a:2"),
        conversation("d" * 200, "answer", record="a:3"),
        conversation("ask", record="a:4"),
    ]
    tally = Tally()
    samples = sft.tokenize_all(found, ChatML(Bytes()), config, tally)
    assert [len(samples), len(samples["source"])] == [1, 2]
    assert tally.counts == {sft.CUT: 1, sft.LONG_PROMPT: 1, sft.UNSUPERVISED: 1}
    assert tally.first[sft.CUT] == "a:2" and re.fullmatch(r"a:3: \d+ tokens for 130", tally.first[sft.LONG_PROMPT])


def test_loading_a_file(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(f'{{"instruction": "ask {i}", "output": "answer"}}\n' for i in range(50)) + "{}\n")
    config = dataclasses.replace(CONFIG, path=str(path), holdout_fraction=0.2)
    data = sft.load(config, ChatML(Bytes()))
    assert list(data.train) == list(data.heldout) == ["talk"]
    assert len(data.train["talk"]) + len(data.heldout["talk"]) == 50 and len(data.heldout["talk"]) > 1
    assert data.tally.counts == {"unknown format": 1}
    with pytest.raises(UserError, match="has no conversation to train on: 50 longer than the context"):
        sft.load(dataclasses.replace(config, sequence_length=9, too_long="drop"), ChatML(Bytes()))
    with pytest.raises(UserError, match="path is not set"):
        sft.load(CONFIG, ChatML(Bytes()))


def test_held_out_conversations_from_a_folder_are_all_held_out_and_none_is_trained_on(tmp_path):
    lines = [f'{{"instruction": "ask {i}", "output": "answer {"x" * i}"}}\n' for i in range(30)]
    train, heldout = tmp_path / "train", tmp_path / "heldout"
    for folder, name, kept in ((train, "a", lines[:20]), (heldout, "a", lines[18:25]), (heldout, "b", lines[25:])):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(kept) + "{}\n")
    config = dataclasses.replace(CONFIG, path=str(train), heldout_path=str(heldout), holdout_fraction=0.5)
    data = sft.load(config, ChatML(Bytes()))
    assert {name: len(found) for name, found in data.train.items()} == {"a": 18}  # not asks 18 and 19
    assert {name: len(found) for name, found in data.heldout.items()} == {"a": 7, "b": 5}
    assert [each.messages[0].content for each in data.heldout_conversations] == [f"ask {i}" for i in range(18, 30)]
    assert data.tally.counts == {"unknown format": 3, conversations.HELD_OUT: 2}
    assert data.tally.first["unknown format"] == "a.jsonl:21: fields []"
    with pytest.raises(UserError, match=r"no conversation to train on.*20 request that is held out"):
        sft.load(dataclasses.replace(config, path=str(train), heldout_path=str(train)), ChatML(Bytes()))
    with pytest.raises(UserError, match="nowhere"):
        sft.load(dataclasses.replace(config, heldout_path="nowhere"), ChatML(Bytes()))


def test_choosing_a_template():
    assert sft.choose_template(CONFIG, BYTE_LEVEL) == ChatML(BYTE_LEVEL)
    released = dataclasses.replace(CONFIG, supervise="qwen_released")
    assert sft.choose_template(released, BYTE_LEVEL) == ChatML(BYTE_LEVEL, marks_supervised=True)
    with pytest.raises(UserError, match="needs the chatml format, and this is llama2"):
        sft.choose_template(dataclasses.replace(released, template="llama2"), BYTE_FALLBACK)
    with pytest.raises(UserError, match=r"the chatml chat format needs a tokenizer with <\|im_start\|>"):
        sft.choose_template(dataclasses.replace(CONFIG, template="chatml"), BYTE_FALLBACK)


def naive_best_fit(lengths, capacity):
    """The sums of the rows: each length goes into the fullest row that has room."""
    sums = []
    for length in lengths:
        fitting = [i for i, total in enumerate(sums) if total + length <= capacity]
        if fitting:
            sums[max(fitting, key=lambda i: sums[i])] += length
        else:
            sums.append(length)
    return sorted(sums)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=30), st.integers(12, 20))
def test_sharing_rows(lengths, capacity):
    rows = packing.share_rows(lengths, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert sorted(sum(lengths[i] for i in row) for row in rows) == naive_best_fit(lengths, capacity)


LENGTH, ROWS = 16, 4


def make_samples(lengths, first=1):
    """Samples in which every token of all is another number, and so are labels and weights."""
    samples = []
    for length in lengths:
        tokens = np.arange(first, first + length, dtype=np.int32)
        samples.append(Sample(tokens, tokens + 5000, (tokens % 7 / 8).astype(np.float32)))
        samples[-1].weights[0] = 0
        first += length
    return samples


def make_packed(samples=None, seed=0, weights=None, length=LENGTH, batch_size=ROWS, **options):
    generator = np.random.default_rng(3)
    samples = samples or {"a": make_samples(generator.integers(2, 13, 40)), "b": make_samples([5] * 30, 3000)}
    return PackedSamples(samples, weights or {}, length, batch_size, seed, **options)


def pieces(batch):
    """The tokens of every segment."""
    found = []
    for tokens, segments in zip(batch.tokens, batch.segment_ids):
        found += [tuple(tokens[segments == i].tolist()) for i in range(1, segments.max() + 1)]
    return found


def whole_epoch(packed, epoch=0):
    """The rows of an epoch, as one batch."""
    first = epoch * packed.rows_per_epoch
    batches = [packed.batch(i) for i in range(first // ROWS, -(-(first + packed.rows_per_epoch) // ROWS))]
    rows = Batch(*(np.concatenate(fields) for fields in zip(*batches)))
    return Batch(*(field[first % ROWS : first % ROWS + packed.rows_per_epoch] for field in rows))


def rows_of(packed, epoch):
    """The rows of an epoch, each a batch of its own."""
    epoch_rows = whole_epoch(packed, epoch)
    return [Batch(*(field[i : i + 1] for field in epoch_rows)) for i in range(packed.rows_per_epoch)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_sample_is_whole_and_once_in_an_epoch(padded, epoch):
    samples = make_samples(np.random.default_rng(3).integers(2, 13, 40))
    packed = make_packed({"a": samples[:30], "b": samples[30:]}, padded=padded)
    found = pieces(whole_epoch(packed, epoch))
    assert sorted(found) == [tuple(sample.tokens.tolist()) for sample in samples]
    assert packed.steps_per_epoch == -(-packed.rows_per_epoch // ROWS)
    assert packed.fill == pytest.approx(sum(len(s.tokens) for s in samples) / (LENGTH * packed.rows_per_epoch))
    assert packed.rows_per_epoch == (40 if padded else len(naive_best_fit(sorted(map(len, found))[::-1], LENGTH)))


def test_fields_of_a_row():
    samples = make_samples([4, 3, 2])
    found = sft.row(samples, 11)
    wanted = np.zeros((5, 11))
    place = 0
    for number, sample in enumerate(samples, start=1):
        for i in range(len(sample.tokens)):
            last = i + 1 == len(sample.tokens)
            following = (0, 0) if last else (sample.labels[i + 1], sample.weights[i + 1])
            wanted[:, place] = (sample.tokens[i], *following, number, i)
            place += 1
    np.testing.assert_array_equal(np.stack(found), wanted)
    assert [field.dtype for field in found] == [np.int32, np.int32, np.float32, np.int32, np.int32]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second))


def test_batches_depend_on_the_seed_and_the_step_alone():
    packed = make_packed()
    assert all(same(packed.batch(i), make_packed().batch(i)) for i in (30, 0, 7))
    orders = [pieces(whole_epoch(packed, epoch)) for epoch in (0, 1)] + [pieces(whole_epoch(make_packed(seed=1)))]
    assert all(a != b and sorted(a) == sorted(b) for a, b in itertools.combinations(orders, 2))
    one, two = ({frozenset(pieces(row)) for row in rows_of(packed, epoch)} for epoch in (0, 1))
    assert one != two  # samples of equal length swap places, and rows come in another order
    shapes = [[tuple(map(len, pieces(row))) for row in rows_of(packed, epoch)] for epoch in (0, 1)]
    assert shapes[0] != shapes[1] and sorted(shapes[0]) == sorted(shapes[1])


def test_starting_at_a_step_and_sharing_among_processes():
    packed = make_packed()
    for start in (0, 5, 23):
        batches = itertools.islice(packed.train_batches(start_step=start), 3)
        assert all(same(batch, packed.batch(start + i)) for i, batch in enumerate(batches))
    parts = [packed.train_batches(start_step=6, process_index=i, process_count=2, prefetch=2) for i in range(2)]
    for i in range(4):
        rows = [next(part) for part in parts]
        assert same([np.concatenate(fields) for fields in zip(*rows)], packed.batch(6 + i))
    with pytest.raises(UserError, match="not divisible by the 3 processes"):
        packed.train_batches(process_count=3)


def test_weights_are_shares_of_rows_and_sources_keep_apart():
    packed = make_packed(weights={"a": 3.0, "b": 1.0})
    rows = [packed.batch(i).tokens for i in range(50)]
    of_b = np.concatenate(rows)[:, 0] >= 3000
    assert abs(of_b.sum() - 50) <= 3
    counts = dict.fromkeys(range(3000, 3150, 5), 0)
    for piece in itertools.chain(*(pieces(packed.batch(i)) for i in range(60))):
        if piece[0] >= 3000:
            counts[piece[0]] += 1
    assert max(counts.values()) - min(counts.values()) <= 1 and min(counts.values()) > 3
    assert all((make_packed(weights={"b": 1.0, "a": 0.0}).batch(i).tokens[:, 0] >= 3000).all() for i in range(20))


def test_what_cannot_be_packed():
    cases = {
        r"no source 'c'; did you mean 'b'\?; there are a, b": {"weights": {"c": 1.0}},
        "fill 3 rows of 16 tokens, fewer than a batch of 4": {"samples": {"a": make_samples([12, 12, 12])}},
        "a sample of 17 tokens does not fit into a row of 16": {"samples": {"a": make_samples([17])}},
    }
    for message, options in cases.items():
        with pytest.raises(UserError, match=message):
            make_packed(**options)


def test_heldout_batches_have_every_sample_once_in_one_order():
    samples = make_samples([5] * 7)
    batches = list(sft.heldout_batches(samples, LENGTH, 2, max_batches=9))
    assert len(batches) == 2 and not batches[1].tokens[1].any()  # three samples a row
    assert sorted(itertools.chain(*map(pieces, batches))) == [tuple(sample.tokens.tolist()) for sample in samples]
    assert len(list(sft.heldout_batches(samples, LENGTH, 2, max_batches=1))) == 1
    halves = [sft.heldout_batches(samples, LENGTH, 2, max_batches=9, process_index=i, process_count=2) for i in (0, 1)]
    for batch, *parts in zip(batches, *halves):
        assert same([np.concatenate(fields) for fields in zip(*parts)], batch)


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_packed_gradients_are_those_of_single_samples(position):
    config = ModelConfig(
        vocab_size=560, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32,
        max_length=128, position=position, init_std=0.3,
    )  # fmt: skip
    template = ChatML(Bytes())
    talks = [("a", "b"), ("Who?", "I"), ("So", "yes", "No?", "No."), ("d", "efg"), ("what", "that")]
    samples = [sft.tokenize(conversation(*talk, system="s"), template, CONFIG) for talk in talks]
    packed, padded = (PackedSamples({"": samples}, {}, 128, 1, seed=0, padded=padded) for padded in (False, True))
    assert (packed.rows_per_epoch, padded.rows_per_epoch) == (2, 5)
    params = models.init(config, jax.random.key(0))
    loss_fn = language_model.loss_function(config, LossConfig())
    gradients = jax.jit(lambda batch: step.sum_gradients(loss_fn, params, batch, jax.random.key(0), 1))

    def summed(rows, **changed):
        found = [gradients(rows.batch(i)._replace(**changed)) for i in range(rows.rows_per_epoch)]
        leaves, output = jax.tree.map(lambda *parts: np.asarray(sum(parts)), *found)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(leaves)]), output

    (found, loss), (wanted, wanted_loss) = summed(packed), summed(padded)
    assert loss.weight == wanted_loss.weight == sum(sample.weights.sum() for sample in samples)
    np.testing.assert_allclose(loss.total, wanted_loss.total, rtol=1e-5)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, atol=1e-5 * scale)
    one_segment = np.ones((1, 128), np.int32)
    assert np.abs(summed(packed, segment_ids=one_segment)[0] - wanted).max() > 1e-2 * scale
