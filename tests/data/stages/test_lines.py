"""Deduplication of parts on texts whose parts are known, since they are put together here."""

import itertools
import random
import re

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import ngrams
from llm_jax.data.stages.lines import SHORT_LINE, Lines, LinesConfig, _cuts
from llm_jax.errors import UserError
from tests.data.stages import planted

FEW = LinesConfig(documents=3, sentences=3)
TITLE = "A title that nobody else has, number"


def sentence(generator: random.Random) -> str:
    return " ".join(planted.words(generator.randint(6, 12), generator)).capitalize() + "."


def chinese(generator: random.Random) -> str:
    return "".join(generator.choice(planted.CHARACTERS) for _ in range(generator.randint(12, 20))) + "。"


def run(texts, folder, config=FEW, **columns):
    found, facts = planted.apply(Lines(config), planted.documents(texts, **columns), folder)
    return [found[f"here/{i:08d}"] for i in range(len(texts))], facts


def parts_of(text: str, level: int) -> list[str]:
    cuts = _cuts(pa.array([text]))[level]
    return [text.encode()[a:b].decode() for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("make, gap", [(sentence, " "), (chinese, "")])
def test_what_more_than_so_many_documents_have_goes_and_nothing_else(tmp_path, make, gap):
    """Sentences, of which some are planted in 2 to 6 documents, some twice in one."""
    generator = random.Random(0)
    common = {make(generator): count for count in (2, 3, 4, 5, 6)}
    documents = [[[make(generator) for _ in range(4)] for _ in range(5)] for _ in range(30)]
    for text, count in common.items():
        for document in generator.sample(documents, count):
            for _ in range(generator.randint(1, 2)):
                paragraph = generator.choice(document)
                paragraph.insert(generator.randint(0, len(paragraph)), text)
    texts = [f"{TITLE} {i}\n\n" + "\n\n".join(gap.join(p) for p in d) for i, d in enumerate(documents)]
    rows, facts = run(texts, tmp_path)
    gone = {text for text, count in common.items() if count > 3}
    for i, (row, document) in enumerate(zip(rows, documents)):
        left = [[part for part in paragraph if part not in gone] for paragraph in document]
        assert row["text"] == f"{TITLE} {i}\n\n" + "\n\n".join(gap.join(paragraph) for paragraph in left)
        assert row["dropped"] is None
    assert facts["parts of too many documents"] == len(gone) == 3
    assert [shown["documents"] for shown in facts["most common"]] == [6, 5, 4]
    assert {shown["text"] for shown in facts["most common"]} == gone
    assert facts["bytes removed"] == sum(len(t.encode()) - len(r["text"].encode()) for t, r in zip(texts, rows)) > 0


@pytest.mark.parametrize("make, gap", [(sentence, " "), (chinese, "")])
def test_a_sentence_beside_others_needs_more_documents_than_one_that_stands_alone(tmp_path, make, gap):
    """Of four sentences in four, six and nine documents, with 3 as the bar of lines and 6 as that of sentences."""
    generator = random.Random(5)
    phrase, often, line, both = (make(generator) for _ in range(4))
    texts = []
    for i in range(9):
        first, second = ([make(generator), make(generator)] for _ in range(2))
        first.insert(1, often)
        first[1:1] = [phrase] * (i < 6)
        second[1:1] = [both] * (i >= 4)
        alone = [[line]] * (i < 4) + [[both]] * (i < 4)
        texts.append(f"{TITLE} {i}\n\n" + "\n\n".join(gap.join(part) for part in (first, *alone, second)))
    rows, facts = run(texts, tmp_path, LinesConfig(documents=3, sentences=6))
    assert {shown["text"] for shown in facts["most common"]} == {often, line, both}
    left = [row["text"] for row in rows]
    assert sum(phrase in text for text in left) == 6
    assert not any(other in text for text in left for other in (often, line, both))


def test_menus_go_as_paragraphs_though_their_lines_are_short(tmp_path):
    generator = random.Random(1)
    menu = "Home\nAbout us\nContact\nLog in"
    bodies = ["\n\n".join(sentence(generator) for _ in range(3)) for _ in range(6)]
    rows, _ = run([f"{TITLE} {i}\n\n{menu}\n\n{body}" for i, body in enumerate(bodies)], tmp_path)
    assert [row["text"] for row in rows] == [f"{TITLE} {i}\n\n{body}" for i, body in enumerate(bodies)]
    rows, _ = run([f"{TITLE} {i}\n\nHome\nLog in\n\n{body}" for i, body in enumerate(bodies)], tmp_path / "short")
    assert all("Home\nLog in" in row["text"] for row in rows)


def test_titles_indented_lines_and_code_stay(tmp_path):
    generator = random.Random(2)
    repeated = "The same line of many words in every document."
    bodies = ["\n\n".join(sentence(generator) for _ in range(3)) for _ in range(6)]
    texts = [f"{repeated}\n\n{body}\n\n    {repeated}\n\n{repeated}" for body in bodies]
    rows, _ = run(texts, tmp_path)
    assert [row["text"] for row in rows] == [f"{repeated}\n\n{body}\n\n    {repeated}" for body in bodies]
    rows, facts = run(texts, tmp_path / "code", formats=["code"] * 6)
    assert [row["text"] for row in rows] == texts and facts["different parts"] == 0


def test_a_document_of_little_else_is_dropped(tmp_path):
    repeated = " ".join(["Something that is said by all the documents of a site again and again."] * 5)
    generator = random.Random(3)
    texts = [f"Page {i}\n\n{repeated}" for i in range(5)]
    texts += ["\n\n".join([repeated, *(sentence(generator) for _ in range(30)), repeated])]
    rows, _ = run(texts, tmp_path)
    assert [row["dropped"] for row in rows] == ["boilerplate"] * 5 + [None]
    assert rows[0]["text"] == "Page 0" and rows[0]["because"] == "3% left"


def test_hard_wrapped_prose_is_not_cut_inside_a_sentence():
    text = (
        "We met Mr. Smith of the U.S. Navy at about 10 p.m. Greenwich time, and he\n"
        "Said nothing at all to us. Later he wrote to his brother, to Prof. Jones and to\n"
        "Sir John, that it had been raining (e.g.\nIn March) for weeks, a fact that nobody else remembers at all?"
        " Nobody knows.\n"
        "\nA new paragraph, at last."
    )
    expected = [
        "We met Mr. Smith of the U.S. Navy at about 10 p.m. Greenwich time, and he\nSaid nothing at all to us. "
        "Later he wrote to his brother, to Prof. Jones and to\nSir John, that it had been raining (e.g.\n"
        "In March) for weeks, a fact that nobody else remembers at all? ",
        "Nobody knows.\n\n",
        "A new paragraph, at last.",
    ]
    assert parts_of(text, 0) == expected and parts_of(text, 2) == ["".join(expected[:2]), expected[2]]


def test_sentences_lines_and_paragraphs():
    text = "他说：“你好吗？”她没有回答。\n第二行，没有句号\nthen small letters. Then none! “Quoted.” End\n\nLast one"
    assert parts_of(text, 0) == [
        "他说：“你好吗？”", "她没有回答。\n", "第二行，没有句号\nthen small letters. ", "Then none! ", "“Quoted.” ",
        "End\n\n", "Last one",
    ]  # fmt: skip
    assert parts_of(text, 1) == [
        "他说：“你好吗？”她没有回答。\n",
        "第二行，没有句号\nthen small letters. Then none! “Quoted.” End\n\n",
        "Last one",
    ]
    assert parts_of(text, 2) == [text[:-8], "Last one"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet="aA .!?\n\r\t,。？”中é\x1e-", max_size=60), min_size=1, max_size=4))
def test_parts_make_up_the_texts(texts):
    array = pa.array(texts)
    ends = ngrams.utf8_buffer(array)[1]
    sentences, lines, paragraphs = (set(cuts.tolist()) for cuts in _cuts(array))
    assert set(ends.tolist()) <= paragraphs <= lines <= sentences
    joined = "".join(texts).encode()
    for cut in sentences - set(ends.tolist()):
        joined[cut:].decode()  # never inside a character
        assert joined[cut : cut + 1] not in (b"a", b"\xc3") or joined[cut : cut + 2] == b"\xc3\x89"


CLOSING = r"""["'”’」』）)\]]*"""
SENTENCE_END = (
    rf"(?:[^.\s]{{3}}[.]|[!?:;。！？：；…]){CLOSING}[ \t\r]*\n(?:[ \t\r]*\n)*|\n(?:[ \t\r]*\n)+"
    rf"|[。！？]{CLOSING}|(?:\p{{Ll}}{{4}}[.]|[!?]){CLOSING}[ \t]+"
)


def slow_cuts(text: str) -> list[int]:
    """Where an expression ends, or the first of two short lines, in bytes."""
    pieces = pc.replace_substring_regex(pa.array([text.replace("\x1e", " ")]), SENTENCE_END, "\\0\x1e")[0].as_py()
    cuts = set(itertools.accumulate(len(piece) for piece in pieces.split("\x1e")))
    lines = re.findall("[^\n]*\n|[^\n]+", text)
    places = list(itertools.accumulate(map(len, lines)))
    for line, after, place in zip(lines, lines[1:], places):
        if max(len(line.encode()), len(after.encode())) <= SHORT_LINE and not line.endswith((",\n", "-\n")):
            cuts.add(place)
    kept = {cut for cut in cuts if cut < len(text) and not re.match("[a-zà-ÿ\n]", text[cut])}
    return sorted(len(text[:cut].encode()) for cut in kept | {0, len(text)})


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"ab.!?;:\n\r\t ,。？”）中éÉ\x1e-𠀀", "abcd.", " " * 50]), max_size=60).map("".join))
def test_sentences_are_those_of_an_expression(text):
    text = "x" + text
    cuts = _cuts(pa.array(["one", text, "two"]))[0] - 3
    assert cuts[1:-1].tolist() == slow_cuts(text)


def test_the_order_and_files_of_documents_do_not_matter(tmp_path):
    generator = random.Random(4)
    common = [sentence(generator) for _ in range(20)]
    texts = [
        f"{TITLE} {i}\n\n" + " ".join([sentence(generator), *generator.sample(common, 3), sentence(generator)])
        for i in range(60)
    ]
    documents = planted.documents(texts)
    expected, facts = planted.apply(Lines(FEW), documents, tmp_path / "a")
    found, other = planted.apply(Lines(FEW), planted.shuffled(documents, 4, tmp_path / "files"), tmp_path / "b")
    assert found == expected and other == facts and facts["parts of too many documents"] > 10


def test_nothing_to_remove(tmp_path):
    rows, facts = run(["One text of some words, and more.", "", "另一个"], tmp_path)
    assert [row["text"] for row in rows] == ["One text of some words, and more.", "", "另一个"]
    assert facts["documents changed"] == 0 and facts["most common"] == []


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"LinesConfig.least_left=2 must be in \[0, 1\]"):
        LinesConfig(least_left=2)
    with pytest.raises(UserError, match="sentences"):
        LinesConfig(sentences=0)
