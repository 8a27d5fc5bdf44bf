"""Phrases in texts: each is found where it is, and none from one text into the next."""

import pyarrow as pa

from llm_jax.data import phrases

PHRASES = ("terms of use", "use cookies", "版权")


def test_occurrences_of_a_text_do_not_overlap_nor_reach_into_the_next():
    texts = pa.array(["Terms of USE cookies, use cookies", "", "terms of ", "use 版", "权 版权版权", None])
    assert phrases.counts(PHRASES, texts).tolist() == [2, 0, 0, 0, 2, 0]
    assert phrases.counts((), texts).tolist() == [0] * 6


def test_only_so_many_bytes_are_looked_at():
    texts = pa.array(["use cookies", "x use cookies", "版权use cookies"])
    assert phrases.counts(PHRASES, texts, 11).tolist() == [1, 0, 1]
