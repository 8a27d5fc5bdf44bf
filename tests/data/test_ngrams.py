"""Units and n-grams against a loop over characters."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.ngrams import BASE, CJK, Ngrams, Units, blocks, byte_coefficients, mix, ngrams, units, whole

ALPHABET = "aBß_9 \n.,-’“”éÉİ₂Ωжש้कि国語々〆はカー龜𠀀한국어😀①𝔸，。　Ａ９"
CAPITALS = "aAÉéΩωЖжİiKkⱭɑⒶⓐ𐐀𐐨ẞ国 ，"  # of some, the small letter has fewer bytes


def slow_units(text: str) -> list[str]:
    """The units of a lower-case text, character by character."""
    found, word = [], ""
    for character in text:
        alone = any(start <= ord(character) < stop for start, stop in CJK)
        if not alone and (character == "_" or unicodedata.category(character)[0] in "LNM"):
            word += character
            continue
        found += [word] if word else []
        word = ""
        found += [character] if alone else []
    return found + ([word] if word else [])


def slow_hash(values: list[int]) -> int:
    """That of a polynomial modulo 2^64 with these coefficients."""
    total = sum(value * pow(BASE, power, 1 << 64) for power, value in enumerate(values))
    return int(mix(np.array([total % (1 << 64)], np.uint64))[0])


def spans(texts: list[str], found: Units) -> list[list[str]]:
    rows = []
    for i, text in enumerate(texts):
        part = slice(found.offsets[i], found.offsets[i + 1])
        content = text.encode()
        rows.append([content[a:b].decode() for a, b in zip(found.starts[part], found.stops[part], strict=True)])
    return rows


def of_text(found: Ngrams | Units, index: int) -> list[int]:
    return found.hashes[found.offsets[index] : found.offsets[index + 1]].tolist()


@given(st.lists(st.text(ALPHABET, max_size=12), max_size=6))
@settings(max_examples=150, deadline=None)
def test_units_are_those_of_a_loop_over_characters(texts: list[str]) -> None:
    texts = [text.lower() for text in texts]
    found = units(pa.array(texts, pa.string()))
    rows = spans(texts, found)
    assert rows == [slow_units(text) for text in texts]
    flat = [unit for row in rows for unit in row]
    assert found.is_cjk.tolist() == [any(a <= ord(unit[0]) < b for a, b in CJK) for unit in flat]
    assert len(set(zip(flat, found.hashes.tolist(), strict=True))) == len(set(flat)) == len(set(found.hashes.tolist()))


@given(st.lists(st.text(CAPITALS, max_size=12), max_size=6))
@settings(max_examples=150, deadline=None)
def test_case_does_not_matter_whatever_it_does_to_sizes(texts: list[str]) -> None:
    lower = ["".join(character.lower()[0] for character in text) for text in texts]
    found, expected = (units(pa.array(some, pa.string())) for some in (texts, lower))
    np.testing.assert_array_equal(found.hashes, expected.hashes)
    assert [[unit.lower()[0] for unit in row] for row in spans(texts, found)] == [
        [unit[0] for unit in row] for row in spans(lower, expected)
    ]


@given(st.lists(st.text("ab国 ", max_size=12), max_size=6), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_ngrams_are_equal_where_their_units_are(texts: list[str], width: int) -> None:
    found = ngrams(units(pa.array(texts, pa.large_string())), width)
    pairs = set()
    for i, text in enumerate(texts):
        row = slow_units(text)
        expected = [tuple(row[k : k + width]) for k in range(len(row) - width + 1)]
        pairs |= set(zip(expected, of_text(found, i), strict=True))
    assert len(pairs) == len({gram for gram, _ in pairs}) == len({value for _, value in pairs})


@given(st.lists(st.text(ALPHABET, max_size=12), max_size=6), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_hashes_are_those_of_polynomials(texts: list[str], width: int) -> None:
    found = units(pa.array([text.lower() for text in texts], pa.string()))
    grams, wholes = ngrams(found, width), whole(found)
    for i, text in enumerate(texts):
        hashes = [slow_hash(byte_coefficients()[list(unit.encode())].tolist()) for unit in slow_units(text.lower())]
        assert of_text(found, i) == hashes
        assert of_text(grams, i) == [slow_hash(hashes[k : k + width]) for k in range(len(hashes) - width + 1)]
        assert wholes[i] == slow_hash(hashes)


def test_hashes_are_the_same_in_all_versions() -> None:
    assert units(pa.array(["a 国 Straße"])).hashes.tolist() == [
        14581546973621404032, 1040732300636392849, 6135625779039104345,
    ]  # fmt: skip


def test_neither_case_nor_punctuation_nor_the_place_matters() -> None:
    found = units(pa.array(["The CAT, sat.", "the—cat sat", "x " * 999 + "The cat sat", None, "Kelvin: K ist ẞ"]))
    assert of_text(found, 0) == of_text(found, 1) == of_text(found, 2)[-3:]
    assert of_text(found, 3) == []
    assert len(of_text(found, 4)) == 4  # lower case has other lengths there


def test_every_text_may_have_a_width_of_its_own() -> None:
    found = units(pa.array(["a b c d", "a b c d", "a"]))
    mixed = ngrams(found, np.array([4, 3, 2]))
    assert of_text(mixed, 0) == of_text(ngrams(found, 4), 0)
    assert of_text(mixed, 1) == of_text(ngrams(found, 3), 1)
    assert of_text(mixed, 2) == []
    with pytest.raises(ValueError, match="positive"):
        ngrams(found, 0)


def test_blocks_hold_all_texts_and_little_text() -> None:
    texts = pa.array(["abcd", None, "ef", "g" * 100, "", "h"]).slice(1)
    cut = list(blocks(texts, 6))
    assert pa.concat_arrays(cut).equals(texts)
    assert [block.to_pylist() for block in cut] == [[None, "ef"], ["g" * 100], ["", "h"]]
    of_slices = [units(block).hashes for block in cut]
    assert np.array_equal(np.concatenate(of_slices), units(texts).hashes)


def test_a_million_words_have_no_hash_in_common() -> None:
    found = units(pa.array([f"{i} {i:x}_ {i}z" for i in range(300_000)]))
    assert len(np.unique(found.hashes)) == 900_000
