"""Hashes, deduplication, the held-out split and the cutting of long texts."""

import re

from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data import documents


def test_the_hash_of_a_text_never_changes():
    # Printed by `printf '三国' | b2sum -l 64`; a change would move documents between splits.
    assert documents.text_hash("三国") == 0x551517A4672247EE
    assert documents.text_hash("三国", seed=0) != documents.text_hash("三国", seed=1) != documents.text_hash("三国")


def test_unique_keeps_the_first_of_equal_texts_in_order():
    assert [text for _, text in documents.unique(["b", "a", "b", "c", "a"])] == ["b", "a", "c"]


def test_census_counts_what_a_loop_counts():
    census = documents.take_census(["é", "é", "abc", ""], 0.5)
    assert (census.documents, census.duplicates, census.text_bytes) == (3, 1, 5)


def held_out(texts, fraction):
    threshold = documents.take_census(texts, fraction).threshold
    return {text for text in texts if documents.text_hash(text) < threshold}


def test_the_held_out_share_is_the_fraction():
    texts = [str(i) for i in range(20_000)]
    assert abs(len(held_out(texts, 0.05)) / len(texts) - 0.05) < 0.01


def test_a_document_keeps_its_side_when_others_come_and_go():
    texts = [str(i) for i in range(2_000)]
    fewer = texts[::3]
    assert held_out(fewer, 0.1) == held_out(texts, 0.1) & set(fewer)


@given(st.lists(st.text(), min_size=2, unique=True), st.floats(1e-6, 0.999))
def test_two_documents_are_never_all_on_one_side(texts, fraction):
    assert 0 < len(held_out(texts, fraction)) < len(texts)


def test_a_single_document_is_for_training():
    assert not held_out(["alone"], 0.999)


@given(st.text(alphabet="ab文\n ", max_size=300), st.integers(8, 60))
def test_split_long_loses_nothing_and_keeps_the_limit(text, limit):
    parts = list(documents.split_long(text, limit))
    assert "".join(parts) == text
    assert all(len(part.encode()) <= limit for part in parts)


@given(st.text(alphabet="ab\u3000 \t\n", max_size=20))
def test_paragraphs_end_after_blank_lines(text):
    expected = re.findall(r".+?(?:\n\s*\n|\Z)", text, flags=re.DOTALL)
    assert list(documents._pieces(text, 1000)) == expected


def test_split_long_prefers_blank_lines():
    assert list(documents.split_long("one\ntwo\n\nthree\nfour\n\nfive", 20)) == ["one\ntwo\n\n", "three\nfour\n\nfive"]


def test_shuffled_is_a_fixed_permutation():
    texts = [str(i) for i in range(100)]
    assert documents.shuffled(texts) == documents.shuffled(texts[::-1]) != texts
    assert sorted(documents.shuffled(texts)) == sorted(texts)
