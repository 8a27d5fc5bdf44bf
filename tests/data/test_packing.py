"""Packing against a loop that walks the stream token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.packing import PackedSource, permutation, window_count


class Rows:
    """Documents held in memory; every token of the corpus is another number."""

    def __init__(self, lengths):
        starts = np.cumsum([0, *lengths])
        self.rows = [np.arange(a, b, dtype=np.int32) + 1 for a, b in zip(starts, starts[1:])]  # noqa: RUF007
        self.lengths = np.array(lengths, np.int32)

    def read(self, documents):
        return [self.rows[i] for i in documents]


def brute_force(rows, length):
    """All windows of documents in the given order, one token at a time."""
    stream = [(token, number) for number, row in enumerate(rows) for token in row.tolist()]
    for start in range(0, len(stream) - 1, length):
        fields = [[], [], [], [], []]
        segment, position, previous = 0, 0, None
        for i in range(start, start + length):
            if i >= len(stream):
                row = (0, 0, 0.0, 0, 0)
            else:
                token, document = stream[i]
                if document != previous:
                    segment, position, previous = segment + 1, 0, document
                following = stream[i + 1] if i + 1 < len(stream) else (0, None)
                row = (token, following[0], float(following[1] == document), segment, position)
                position += 1
            for field, value in zip(fields, row):
                field.append(value)
        yield fields


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1)


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(1, 9))
def test_windows_equal_the_loop(lengths, length):
    documents = Rows(lengths)
    source = PackedSource(documents, "s", length, seed=0, shuffle=False)
    expected = list(brute_force(documents.rows, length))
    assert source.windows == len(expected)
    for i, fields in enumerate(expected):
        for found, wanted in zip(source[i], fields):
            np.testing.assert_array_equal(found, wanted)


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(0, 3))
def test_shuffled_windows_are_those_of_shuffled_documents(lengths, length, epoch):
    documents = Rows(lengths)
    source = PackedSource(documents, "s", length, seed=5)
    order = source._order(epoch)
    expected = list(brute_force([documents.rows[i] for i in order.documents_D], length))
    found = [source[epoch * source.windows + i] for i in range(source.windows)]
    for window, i in zip(found, order.windows):
        for a, b in zip(window, expected[i]):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_predicts_every_token_once_except_first_ones(epoch):
    documents = Rows([5, 1, 40, 3, 9, 1, 17])
    source = PackedSource(documents, "s", 8, seed=1)
    windows = [source[epoch * source.windows + i] for i in range(source.windows)]
    trained = np.concatenate([window.targets[window.loss_weights > 0] for window in windows])
    wanted = np.concatenate([row[1:] for row in documents.rows])
    np.testing.assert_array_equal(np.sort(trained), np.sort(wanted))


def test_order_depends_on_seed_source_and_epoch_alone():
    documents = Rows(range(1, 60))

    def first(seed, name, epoch):
        source = PackedSource(documents, name, 16, seed)
        return [source[epoch * source.windows + i].tokens.tolist() for i in range(source.windows)]

    assert first(0, "a", 0) == first(0, "a", 0)
    different = [first(0, "a", 0), first(1, "a", 0), first(0, "b", 0), first(0, "a", 1)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_every_epoch_has_another_order_of_documents_and_of_windows():
    source = PackedSource(Rows(range(1, 60)), "a", 16, 0)
    one, two = source._order(0), source._order(1)
    assert one.documents_D.tolist() != two.documents_D.tolist()
    assert one.windows.tolist() != two.windows.tolist() != sorted(two.windows.tolist())


def test_going_back_to_an_old_epoch_gives_the_same_window():
    source = PackedSource(Rows(range(1, 60)), "a", 16, 0)
    before = source[3].tokens
    for epoch in range(1, 5):
        source[epoch * source.windows]
    np.testing.assert_array_equal(source[3].tokens, before)


def test_permutation_is_one_and_stays_what_it_is():
    assert sorted(permutation(1000, 3, 4)) == list(range(1000))
    # From the first run of this code: a change would give resumed runs other batches.
    assert permutation(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]


def test_window_count():
    assert [window_count(tokens, 4) for tokens in (0, 1, 2, 5, 6)] == [0, 0, 1, 1, 2]
