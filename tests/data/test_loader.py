"""Batches as a function of the step: hosts, resumption, mixture, held-out text and what is refused."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest

from llm_jax.config import DataConfig
from llm_jax.data import loader, records
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError

BATCH = 8


@pytest.fixture
def config(dataset):
    return DataConfig(dataset=str(dataset), sequence_length=32, batch_size=BATCH, seed=3)


def take(config, count, **options):
    return list(itertools.islice(loader.train_batches(config, **options), count))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)


def test_shapes_and_types(config):
    batch = take(config, 1)[0]
    assert isinstance(batch, Batch)
    assert {field.shape for field in batch} == {(BATCH, 32)}
    assert [field.dtype for field in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_sees_the_same_global_batches(config, processes):
    parts = [take(config, 6, process_index=p, process_count=processes) for p in range(processes)]
    joined = [Batch(*(np.concatenate(fields) for fields in zip(*rows))) for rows in zip(*parts)]
    assert_same(joined, take(config, 6))


@pytest.mark.parametrize("step", [1, 7, 500])
def test_starting_at_a_step_equals_running_to_it(config, step):
    assert_same(take(config, 3, start_step=step), take(config, step + 3)[step:])


def test_seeds_give_other_batches(config):
    other = dataclasses.replace(config, seed=4)
    assert not np.array_equal(take(config, 1)[0].tokens, take(other, 1)[0].tokens)


def drawn_sources(batches):
    """How many sequences come from each source; books have no word of more than one letter."""
    rows = np.concatenate([batch.tokens for batch in batches])
    letters = ((rows >= ord("a")) & (rows <= ord("z"))).any(axis=1).sum()
    return letters, len(rows) - letters


def test_weights_are_the_sources_shares_of_sequences(config):
    weighted = dataclasses.replace(config, weights={"letters": 3.0, "books": 1.0})
    letters, books = drawn_sources(take(weighted, 100))
    assert abs(letters - 600) <= 8 and abs(books - 200) <= 8


def test_without_weights_a_source_counts_by_its_tokens(config):
    info = loader.describe(config)
    share = info.sources["letters"].train.tokens / info.tokens
    assert info.weights["letters"] == pytest.approx(share, rel=1e-3)
    letters, _ = drawn_sources(take(config, 100))
    assert abs(letters / 800 - share) < 0.02


def test_a_source_of_weight_zero_is_left_out(config):
    only = dataclasses.replace(config, weights={"letters": 0.0, "books": 2.0})
    assert drawn_sources(take(only, 20))[0] == 0


def test_an_epoch_of_one_source_trains_every_token_once(config, dataset):
    only = dataclasses.replace(config, weights={"letters": 1.0}, batch_size=1)
    summary = records.read_summary(dataset)
    reader = records.TokenReader(dataset, "letters", "train", summary)
    documents = reader.read(range(len(reader.lengths)))
    windows = -(-(sum(map(len, documents)) - 1) // 32)
    trained = np.concatenate([batch.targets[batch.loss_weights > 0] for batch in take(only, windows)])
    np.testing.assert_array_equal(np.sort(trained), np.sort(np.concatenate([tokens[1:] for tokens in documents])))


def test_heldout_batches_hold_the_held_out_texts_in_order(config, dataset, tokenizer):
    batches = list(loader.heldout_batches(config, "letters", max_batches=1000))
    tokens = np.concatenate([batch.tokens[batch.segment_ids > 0] for batch in batches])
    wanted = "".join(records.heldout_texts(dataset, "letters"))
    assert tokenizer.decode(tokens.tolist()) == wanted and wanted
    info = loader.describe(config).sources["letters"].heldout
    assert sum(batch.loss_weights.sum() for batch in batches) == info.tokens - info.documents
    assert info.text_bytes == len(wanted.encode())


def test_heldout_batches_stop_at_the_limit_and_split_over_processes(config):
    assert len(list(loader.heldout_batches(config, "books", max_batches=2))) == 2
    halves = [
        list(loader.heldout_batches(config, "books", max_batches=50, process_index=p, process_count=2)) for p in (0, 1)
    ]
    joined = [Batch(*(np.concatenate(fields) for fields in zip(*rows))) for rows in zip(*halves)]
    assert_same(joined, list(loader.heldout_batches(config, "books", max_batches=50)))


def refusal(call):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_or_foreign_folder_is_refused(config, tmp_path):
    missing = dataclasses.replace(config, dataset=str(tmp_path / "nowhere"))
    assert "no dataset at" in refusal(lambda: loader.train_batches(missing))
    assert "not a whole dataset" in refusal(
        lambda: loader.train_batches(dataclasses.replace(config, dataset=str(tmp_path)))
    )
    assert "not set" in refusal(lambda: loader.describe(dataclasses.replace(config, dataset="")))


def test_a_truncated_file_is_refused(config, dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = next(copy.glob("*train_letters*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} has" in refusal(lambda: loader.describe(dataclasses.replace(config, dataset=str(copy))))


def test_a_corrupt_record_is_refused_in_the_background_too(config, dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = next(copy.glob("*train_letters*"))
    content = bytearray(shard.read_bytes())
    content[200:4000] = bytes(3800)
    shard.write_bytes(content)
    broken = dataclasses.replace(config, dataset=str(copy))
    assert "is corrupt" in refusal(lambda: take(broken, 50))


def test_a_damaged_summary_is_refused(config, dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (copy / records.SUMMARY).write_text('{"vocab_size": 3')
    assert "is damaged" in refusal(lambda: loader.describe(dataclasses.replace(config, dataset=str(copy))))


def test_misfit_settings_are_refused(config):
    assert "not divisible by the 3 processes" in refusal(lambda: loader.train_batches(config, process_count=3))
    long = dataclasses.replace(config, sequence_length=10**6)
    assert "too few for one sequence" in refusal(lambda: loader.train_batches(long))
    typo = dataclasses.replace(config, weights={"leters": 1.0})
    assert "did you mean 'letters'" in refusal(lambda: loader.train_batches(typo))
    assert "did you mean 'books'" in refusal(lambda: loader.heldout_batches(config, "book", max_batches=1))
