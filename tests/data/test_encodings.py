"""Encodings told apart on texts encoded by Python, and characters that no text should hold."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_jax.data import encodings

TEXTS = {
    "gb18030": "中华人民共和国的一切权力属于人民，人民行使国家权力的机关是全国人民代表大会。",
    "big5": "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心。",
    "cp1252": "Tous les êtres humains naissent libres et égaux en dignité et en droits – « voilà ».",
    "cp1250": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "cp1251": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "koi8_r": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "shift_jis": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "euc_jp": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "euc_kr": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_the_encoding_of_a_text_is_found(encoding):
    found = encodings.decode(TEXTS[encoding].encode(encoding))
    assert found.text == TEXTS[encoding] and found.replaced == 0


@given(st.text())
def test_utf8_is_never_taken_for_anything_else(text):
    found = encodings.decode(text.encode())
    assert found == (text.removeprefix("\ufeff"), "utf-8", 0)


def test_utf8_with_faults_stays_utf8_and_they_are_counted():
    data = TEXTS["gb18030"].encode()
    found = encodings.decode(data[:30] + b"\xff" + data[30:60] + b"\xc3" + data[60:])
    assert (found.encoding, found.replaced) == ("utf-8", 2)
    assert found.text.replace("\ufffd", "") == TEXTS["gb18030"]


def test_a_replacement_character_of_the_text_is_no_fault():
    found = encodings.decode("中文中文中文中文\ufffd".encode() + b"\xff")
    assert found.replaced == 1


def test_what_a_page_declares_is_tried_before_what_fits():
    data = "Ça".encode("cp1252")
    assert encodings.decode(data, "latin-1").text == "Ça"
    assert encodings.decode("鏡".encode("gb18030"), "GB2312").text == "鏡"  # not in GB 2312: browsers read GB 18030
    assert encodings.decode(TEXTS["gb18030"].encode(), "big5").encoding == "utf-8"
    assert encodings.decode(TEXTS["gb18030"].encode("gb18030"), "no such encoding").encoding == "gb18030"


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 20, bytes(range(256)) * 4])
def test_what_is_no_text_is_none(data):
    assert encodings.decode(data) is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_show_at_the_beginning(encoding):
    assert encodings.wide("plain text".encode(encoding)) == encoding


def test_other_beginnings_are_not_wide():
    assert {encodings.wide(data) for data in (b"", b"\0", b"text", b"t\0ext", bytes(100), "中文".encode())} == {""}


@given(st.text(st.characters(codec=None)))
@example("\ufeffa\0\ufeff\ud800")
def test_a_clean_text_has_a_utf8_form_and_loses_only_nulls_and_marks(text):
    cleaned = encodings.clean(text)
    cleaned.text.encode()
    assert cleaned.nulls == text.count("\0") and cleaned.marks == text.count("\ufeff")
    assert cleaned.surrogates == sum("\ud800" <= c <= "\udfff" for c in text)
    kept = [c for c in text if c not in "\0\ufeff"]
    assert cleaned.text == "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in kept)
