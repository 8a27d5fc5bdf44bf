"""References to characters: what is residue becomes characters, and what is shown or belongs to markup stays."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data import entities


@pytest.mark.parametrize(
    ("text", "wanted", "times"),
    [
        ("Boer &amp; Croon, it&#39;s 15&nbsp;&#xB0;C", "Boer & Croon, it's 15 °C", 4),
        ("AT&T said &quot;R&D&quot; of a & b", 'AT&T said "R&D" of a & b', 2),
        ("see http://a.org/?x=1&copy=2&lt=3", "see http://a.org/?x=1&copy=2&lt=3", 0),
        ("&nosuchthing; &; &#; x&amp", "&nosuchthing; &; &#; x&amp", 0),
    ],
)
def test_references_become_characters(text, wanted, times):
    assert entities.decoded(text) == (wanted, times)
    assert entities.without_residue(text) == (wanted, times)


@pytest.mark.parametrize(
    "text",
    [
        "* ``<`` is converted to ``&lt;``",
        "Write `&nbsp;` for a space.",
        "<b>Tom &amp; Jerry</b>",
        's.replace("&", "&amp;")',
        "“&lt;” 表示小于号",
    ],
)
def test_what_shows_markup_stays(text):
    assert entities.without_residue(text) == (text, 0)


@given(st.text("ab&;#x1 "))
def test_an_escaped_text_comes_back(text):
    assert entities.decoded(html.escape(text))[0] == text
