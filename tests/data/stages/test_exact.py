"""Exact deduplication against plain Python on planted duplicates."""

import random
import re
import unicodedata

import daft
import pytest

from llm_jax.data.ngrams import CJK
from llm_jax.data.stages import groups
from llm_jax.data.stages.exact import Exact
from tests.data.stages import planted


def normalised(text: str) -> tuple[str, ...]:
    """Its units, by a regular expression and Python's own tables."""
    spaced = "".join(f" {c} " if any(a <= ord(c) < b for a, b in CJK) else c for c in text)
    text = unicodedata.normalize("NFKC", spaced).lower()
    return tuple(re.findall(r"\w+", text))


def variant(text: str, generator: random.Random) -> str:
    """The same text to a reader: other spaces, case, punctuation, width or composition."""
    changes = [
        lambda t: re.sub(r"\s+", lambda _: generator.choice(["\n", "\t", "  ", "\u3000", "\r\n"]), t),
        str.upper,
        lambda t: t.replace(",", ";").replace(".", " ... "),
        lambda t: unicodedata.normalize("NFD", t),
        lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),
        lambda t: f"  “{t}”!",
        lambda t: t.replace("，", " "),
    ]
    for change in generator.sample(changes, generator.randint(0, 3)):
        text = change(text)
    return text


def corpus(seed: int) -> list[str]:
    generator = random.Random(seed)
    texts = [
        "Der Käse, naïve É 5 km.",
        "你好，世界 and more.",
        "東京　ｶﾅ",
        "not the same.",
        "nothe same",
        "not the same 2.",
    ]
    texts += [", ".join(planted.words(generator.randint(1, 20), generator)) for _ in range(20)]
    return [variant(generator.choice(texts), generator) for _ in range(300)]


def test_is_plain_python_s_grouping(tmp_path):
    texts = corpus(0)
    found, facts = planted.apply(Exact(), planted.documents(texts), tmp_path)
    first: dict[tuple[str, ...], str] = {}
    expected = {}
    for name, row in sorted(found.items()):
        kept = first.setdefault(normalised(row["text"]), name)
        if kept != name:
            expected[name] = kept
    assert planted.dropped(found) == expected and len(expected) > 200
    assert [found[f"here/{i:08d}"]["text"] for i in range(300)] == texts
    assert facts["duplicates"] == len(expected) == sum(facts["duplicates by source"].values())
    sizes = sorted((list(expected.values()).count(kept) + 1 for kept in set(expected.values())), reverse=True)
    assert [group["documents"] for group in facts["largest groups"]] == sizes[:5]
    assert facts["groups"] == len(sizes)


def test_the_order_and_files_of_documents_do_not_matter(tmp_path):
    given = planted.documents(corpus(1), [f"s{i % 3}/{i:08d}" for i in range(300)])
    expected, facts = planted.apply(Exact(), given, tmp_path / "a")
    found, other = planted.apply(Exact(), planted.shuffled(given, 5, tmp_path / "files"), tmp_path / "b")
    assert planted.dropped(found) == planted.dropped(expected) and other == facts


def test_code_and_texts_without_units_are_compared_byte_for_byte(tmp_path):
    rows = [("x = 1", "code"), ("x = -1", "code"), ("x  = 1", "code"), ("x = 1", "code"), ("x = 1", "text"),
            ("x = -1", "text"), ("!!!", "text"), ("???", "text"), ("!!!", "text"), ("", "text")]  # fmt: skip
    texts, formats = zip(*rows, strict=True)
    found, _ = planted.apply(Exact(), planted.documents(list(texts), formats=list(formats)), tmp_path)
    expected = {3: 0, 5: 4, 8: 6}
    assert planted.dropped(found) == {f"here/{a:08d}": f"here/{b:08d}" for a, b in expected.items()}


def test_a_group_by_that_loses_rows_is_noticed(monkeypatch):
    rows = daft.from_pydict({"a": [1, 1, 2]})
    assert sorted(groups.group_by(rows, ("a",)).to_pydict()["count"]) == [1, 2]
    monkeypatch.setattr(daft.DataFrame, "__len__", lambda self: 4)
    with pytest.raises(RuntimeError, match="hold 3 of 4"):
        groups.group_by(rows, ("a",))
