"""Every number of a text against a loop, every rule against a text that breaks it, and good texts against all rules."""

import collections
import inspect
import re
from pathlib import Path

import daft
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_jax.data.stages import text_features
from llm_jax.data.stages.heuristics import CodeRules, Heuristics, HeuristicsConfig, ProseRules
from llm_jax.errors import UserError

ENGLISH = """The harbour lay quiet in the early light, and the boats that had come in during the night were tied up
along the wall in a row. A man with a basket walked from one to the next and asked what they had for him."""
CHINESE = "第一条　为了保护公民的合法权益，维护社会和经济秩序，制定本法。\n第二条　本法所称的公民，是指具有国籍的人。"
PSALM = "\n".join(f"Give thanks unto him, for {i} reasons: for his mercy endureth for ever." for i in range(12))
CODE = 'def add(first, second):\n    """The sum of both."""\n    return first + second\n'


def run(rows: list[tuple[str, str]], folder: Path, **rules: ProseRules | CodeRules) -> tuple[list, dict]:
    """From (language or `code`, text)."""
    languages, texts = (list(column) for column in zip(*rows, strict=True))
    ids = [f"here/{i:08d}" for i in range(len(rows))]
    formats = ["code" if language == "code" else "text" for language in languages]
    documents = daft.from_pydict(
        {"id": ids, "source": ["here"] * len(rows), "language": languages, "format": formats,
         "origin": ids, "text": texts}
    )  # fmt: skip
    result = Heuristics(HeuristicsConfig(**rules)).apply(documents, folder)
    return result.documents.sort("id").to_pylist(), result.facts


def prose(*texts: str, language: str = "en") -> dict[str, np.ndarray]:
    return text_features.of_prose(pa.array(texts, pa.large_string()), pa.array([language] * len(texts)))


def slow_repetition(tokens: list[str], width: int) -> tuple[float, float]:
    grams = collections.Counter(tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1))
    total = max(grams.total(), 1)
    top = max(grams.values(), default=0)
    return (grams.total() - len(grams)) / total, (top if top > 1 else 0) / total


@example(["1\n1\n1\n ", "-"])
@example(["\x07 a 的 \x07", "a\x07\x07\x07的"])
@given(st.lists(st.text("ab 的。\n.-1$\u2026é\x07", max_size=60), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_numbers_are_those_of_a_loop(texts: list[str]) -> None:
    found = prose(*texts)
    for i, text in enumerate(texts):
        visible = max(len(re.sub(r"[ \n]", "", text)), 1)
        tokens = re.findall(r"[ab1é]+|的", text)
        words = [token for token in tokens if token != "的"]
        lines = [line for line in text.split("\n") if line]
        again = [line for k, line in enumerate(lines) if line in lines[:k]]
        wide = 2 if tokens.count("的") * 2 > len(tokens) else 1
        several = len(lines) >= text_features.FEW_LINES
        bullets = sum(line.lstrip(" ").startswith("-") for line in lines if len(line) - len(line.lstrip(" ")) <= 4)
        expected = {
            "units": len(tokens),
            "word_length": sum(len(word.encode()) for word in words) / len(words) if words else np.nan,
            "letters": len(re.findall(r"[abé的]", text)) / visible,
            "digits": text.count("1") / visible,
            "symbols": text.count("$") / visible,
            "broken": text.count("\x07") / visible if text.count("\x07") >= 3 else 0.0,
            "stop_words": tokens.count("a") / max(len(tokens), 1),
            "repeated_ngrams": slow_repetition(tokens, 10 * wide)[0],
            "top_ngram": slow_repetition(tokens, 4 * wide)[1],
            "repeated_lines": sum(len(s.encode()) for s in again) / max(sum(len(s.encode()) for s in lines), 1),
            "bullets": several * bullets / max(len(lines), 1),
            "ellipses": several * sum(s.endswith(("...", "…")) for s in lines) / max(len(lines), 1),
            "boilerplate": 0.0,
        }
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, nan_ok=True), name


@given(
    st.lists(
        st.sampled_from(["use ", "Use ", "cookie", "cookies", " policy", "accept ", "of ", "terms ", "京ICP备", "\n"])
    )
)
@settings(max_examples=100, deadline=None)
def test_phrases_are_those_of_an_expression(parts: list[str]) -> None:
    text = "".join(parts)
    phrases = re.findall("|".join(text_features.BOILERPLATE), text.lower())
    found = prose(text, text[1:])
    assert found["boilerplate"][0] == pytest.approx(100 * len(phrases) / max(found["units"][0], 1))


def test_no_phrase_has_another_in_it() -> None:
    for phrases in (text_features.BOILERPLATE, text_features.GENERATED):
        assert all(phrase not in other for phrase in phrases for other in phrases if phrase != other)


@given(st.lists(st.text("aZ é1$\n\x07", max_size=60), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_numbers_of_code_are_those_of_a_loop(texts: list[str]) -> None:
    found = text_features.of_code(pa.array([*texts, "x" * 590 + "DO NOT EDIT", "x" * 589 + "Do not edit"]))
    assert found.pop("generated").tolist() == [0.0] * len(texts) + [0.0, 1.0]
    for i, text in enumerate(texts):
        visible = max(len(re.sub(r"[ \n]", "", text)), 1)
        lines = [line.encode() for line in text.split("\n") if line]
        wordless = [line for line in lines if len(re.findall(rb"[a-zA-Z\x80-\xff]", line)) < 0.3 * len(line)]
        size = sum(map(len, lines))
        expected = {
            "characters": visible,
            "line_length": size / max(len(lines), 1),
            "longest_line": max(map(len, lines), default=0),
            "data": sum(map(len, wordless)) / max(size, 1),
            "letters": len(re.findall(r"[aZé]", text)) / visible,
            "digits": text.count("1") / visible,
            "broken": text.count("\x07") / visible if text.count("\x07") >= 3 else 0.0,
        }
        assert {name: value[i] for name, value in found.items()} == pytest.approx(expected)


def test_ngrams_are_twice_as_long_without_spaces() -> None:
    characters = "国家法律制度" * 4
    spaced, unspaced = prose(" ".join("abcdef" * 4), characters)["repeated_ngrams"]
    assert spaced == pytest.approx(slow_repetition(list("abcdef" * 4), 10)[0])
    assert unspaced == slow_repetition(list(characters), 20)[0] == 0
    assert spaced > 0.5


@pytest.mark.parametrize(
    ("language", "text", "reason"),
    [
        ("en", "Yes, I agree.", "few units"),
        ("zh", "好，不错！", "few units"),
        ("en", "a b c d e f g h i j k l m n", "few word length"),
        ("en", " ".join(f"{i:x}" * 9 for i in range(30_000, 30_040)), "many word length"),
        ("en", "one two " + "?!.;" * 200 + " one two one two three four", "few letters"),
        ("zh", "电话" + " 13774321320" * 9, "many digits"),
        ("en", "a line of text with some words and then $$$ ### === " + "=+" * 60, "many symbols"),
        ("zh", "┬丁祑砰砞琁ぃ\ue12eび畉\ue084び\ue616俱丁┬丁\ue6a63\ue67e\ue024秸\ufffd", "many broken"),
        ("en", " ".join(f"keyword{i}" for i in range(150)), "few stop words"),
        ("zh", "不错" * 40, "many top ngram"),
        ("en", " ".join([ENGLISH] * 4), "many repeated ngrams"),
        ("en", "\n".join(["- Buy this item now!"] * 3 + ["- Buy that item now!"] * 3), "many repeated lines"),
        ("en", "\n".join(f"- item number {i} of the list" for i in range(9)), "many bullets"),
        ("en", "\n".join(f"This is the beginning of story {i}..." for i in range(9)), "many ellipses"),
        ("en", "All rights reserved. Privacy policy. Terms of use. Follow us on the web.", "many boilerplate"),
        ("zh", "免费注册 网站导航 宾馆索引 服务说明 代理合作 广告业务 联系我们", "many boilerplate"),
        ("code", "x = 1\n", "few characters"),
        ("code", "\n".join(f"print('{'ab ' * 50}', {i})" for i in range(9)), "many line length"),
        ("code", CODE + "x = '" + "ab " * 400 + "'\n" + CODE * 20, "many longest line"),
        ("code", "# Autogenerated by a tool, do not edit\n" + CODE, "many generated"),
        ("code", CODE + "TABLE = [\n" + "    1, 2, 3, 4, 5, 6, 7, 8, 9, 10,\n" * 20 + "]\n", "many data"),
    ],
)  # fmt: skip
def test_each_rule_drops_what_it_is_for(tmp_path: Path, language: str, text: str, reason: str) -> None:
    rows, facts = run([(language, text)], tmp_path)
    assert reason in facts["broken_rules"], facts["broken_rules"]
    assert rows[0]["dropped"] is not None
    if len(facts["broken_rules"]) == 1:
        assert rows[0]["dropped"] == reason
        assert re.fullmatch(r"[a-z ]+ [\d.e+]+ [<>] [\d.e+]+", rows[0]["because"])


def test_good_texts_are_kept(tmp_path: Path) -> None:
    verse = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye,\nCould frame it?"
    entry = "鼓舌摇唇（gǔ shé yáo chún）：鼓动嘴唇，摇动舌头。形容利用口才进行煽动或游说。"
    review = "早餐30,不能退,也不能\ue139期,太無理.以后不再訂這酒店."  # one character of a font's own
    listing = "Things to bring along for the walk:\n" + "\n".join(f"- the {thing}" for thing in ("map", "rope", "tent"))
    good = [("en", ENGLISH), ("zh", CHINESE), ("en", PSALM), ("en", verse), ("zh", entry), ("zh", review),
            ("zh-CN", CHINESE), ("en", listing), ("code", CODE), ("und", ENGLISH),
            ("code", inspect.getsource(text_features))]  # fmt: skip
    rows, facts = run(good, tmp_path)
    assert [row["dropped"] for row in rows] == [None] * len(good), rows
    assert facts["broken_rules"] == {}


def test_facts_count_every_broken_rule_and_have_quantiles(tmp_path: Path) -> None:
    rows, facts = run([("en", ENGLISH)] * 3 + [("en", "$$$$$ ####"), ("code", CODE)], tmp_path)
    assert facts["broken_rules"] == {"few units": {"here": 1}, "few letters": {"here": 1}, "many symbols": {"here": 1}}
    assert [row["dropped"] for row in rows] == [None, None, None, "few units", None]
    assert facts["by_language"]["en"]["units"][2] == pytest.approx(len(ENGLISH.split()), rel=0.03)
    assert "longest_line" in facts["by_language"]["code"]


def test_quantiles_are_of_the_texts_that_have_a_number(tmp_path: Path) -> None:
    texts = [CHINESE] * 9 + ["我们 said hello 了三次，所以他们都走了。"]
    _, facts = run([("zh", text) for text in texts] + [("und", ENGLISH), ("code", CODE)], tmp_path)
    assert np.allclose(facts["by_language"]["zh"]["word_length"], 4.5, rtol=0.03)  # of the one text with words
    assert "word_length" not in facts["by_language"]["code"]
    assert "stop_words" not in facts["by_language"]["und"]


def test_bounds_are_settings(tmp_path: Path) -> None:
    strict = {"spaced": ProseRules(min_units=50.0), "code": CodeRules(max_longest_line=20.0)}
    rows, _ = run([("en", ENGLISH), ("zh", CHINESE), ("code", CODE)], tmp_path, **strict)
    assert [row["dropped"] for row in rows] == ["few units", None, "many longest line"]
    with pytest.raises(UserError, match="min_letters"):
        HeuristicsConfig(spaced=ProseRules(min_letters=-1.0))
