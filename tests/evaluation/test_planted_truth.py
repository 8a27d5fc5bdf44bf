"""What is said of plants, held against folders of stages in which it is known what became of each."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_jax.data.planting import Plant
from llm_jax.data.stages.fuzzy import FuzzyConfig
from llm_jax.evaluation import planted_truth

STAGES = ("read", "exact", "quality", "fuzzy", "semantic", "personal", "contamination")
NEAR = ("fuzzy", "semantic")
WORDS = " ".join(f"word{i}" for i in range(40))
ITEM = "a question of more than thirteen words that nobody would ever ask anybody in this world"


def write(folder, kept, dropped):
    """The stages' folders: of each the texts by id, and of what is dropped what decided it."""
    for place, name in enumerate(STAGES):
        path = folder / f"{place:02d}_{name}"
        (path / "kept").mkdir(parents=True)
        texts = kept[name]
        columns = {"id": list(texts), "text": list(texts.values()), "format": ["text"] * len(texts)}
        table = pa.table(columns | {"bytes": [len(text.encode()) for text in texts.values()]})
        pq.write_table(table, path / "kept" / "0.parquet")
        if gone := dropped.get(name):
            (path / "dropped").mkdir()
            pq.write_table(pa.table({"id": list(gone), "because": list(gone.values())}), path / "dropped" / "0.parquet")


def plant(name, stages, original="", targets=(), kind="kind", share=0.0):
    return Plant("group", kind, "en", name, original, targets, stages, share)


@pytest.fixture
def folder(tmp_path):
    """A corpus of eight documents, all of which are there at first."""
    every = {f"s/{i}": f"{WORDS} {i}" for i in range(8)} | {"s/planted_0": f"{WORDS} 0", "s/2": f"{ITEM}\n{WORDS}"}
    changes = {"quality": {"s/7": None}, "fuzzy": {"s/1": None}, "semantic": {"s/4": None},
               "personal": {"s/5": "without"}, "contamination": {"s/2": WORDS}}  # fmt: skip
    dropped = {"exact": {"s/planted_0": "s/0"}, "fuzzy": {"s/1": "s/0"}, "semantic": {"s/4": "s/6"}}
    kept = {}
    for name in STAGES:
        every = every | changes.get(name, {})
        for gone in dropped.get(name, {}):
            every.pop(gone)
        every = {id: text for id, text in every.items() if text is not None}
        kept[name] = every
    write(tmp_path, kept, dropped)
    return tmp_path


CASES = [
    (plant("s/planted_0", ("exact",), "s/0"), "exact", "found"),
    (plant("s/planted_0", NEAR, "s/0"), "exact", "wrong"),  # was no exact copy
    (plant("s/1", NEAR, "s/0"), "fuzzy", "found"),
    (plant("s/1", ("exact",), "s/0"), "fuzzy", "missed"),  # found later
    (plant("s/1", NEAR, "s/3"), "fuzzy", "lost"),  # dropped for another document
    (plant("s/4", NEAR, "s/3"), "semantic", "lost"),
    (plant("s/4", NEAR, "s/6"), "semantic", "found"),
    (plant("s/3", NEAR, "s/6"), "", "missed"),
    (plant("s/5", ("personal",), targets=("word3 word4",)), "personal", "found"),
    (plant("s/5", (), targets=("word3 word4",)), "personal", "wrong"),
    (plant("s/6", (), targets=("word3 word4",)), "", "kept"),
    (plant("s/7", (), targets=("word3 word4",)), "quality", "lost"),  # with its document
    (plant("s/7", ("quality",)), "quality", "found"),
    (plant("s/7", ("personal",), targets=("word3 word4",)), "quality", "lost"),
    (plant("s/2", ("contamination",), targets=(ITEM,)), "contamination", "found"),
    (plant("s/2", ("contamination",), targets=(ITEM, "word3")), "", "missed"),  # a part of it is there
]


@pytest.mark.parametrize(("planted", "stage", "verdict"), CASES)
def test_a_plant_is_followed_to_the_stage_that_takes_it(folder, planted, stage, verdict):
    (found,) = planted_truth.follow([planted], planted_truth.steps(folder), FuzzyConfig())
    assert (found.stage, found.verdict) == (stage, verdict)


def test_near_duplicates_know_how_similar_they_were(folder):
    near, other = (plant("s/1", NEAR, "s/0"), plant("s/planted_0", NEAR, "s/0"))
    found = {
        each.plant: each for each in planted_truth.follow([near, other], planted_truth.steps(folder), FuzzyConfig())
    }
    assert found[near].similarity == pytest.approx(36 / 38)
    assert found[other].similarity != found[other].similarity  # it did not come to that stage


def test_rows_and_stages_add_the_outcomes_up(folder):
    steps = planted_truth.steps(folder)
    outcomes = planted_truth.follow([case[0] for case in CASES if case[0].id != "s/planted_0"], steps, FuzzyConfig())
    row, control = planted_truth.rows(outcomes)
    assert (row.control, row.planted, row.arrived) == (False, 11, 8)
    assert row.verdicts == {"found": 5, "missed": 3, "lost": 3}
    assert row.stages == {"fuzzy": 1, "semantic": 1, "personal": 1, "quality": 1, "contamination": 1}
    assert (control.control, control.planted, control.verdicts) == (True, 3, {"wrong": 1, "kept": 1, "lost": 1})
    stages = {row.stage: row for row in planted_truth.stage_rows(outcomes, steps)}
    assert (stages["semantic"].found, stages["semantic"].missed, stages["semantic"].recall) == (1, 1, 0.5)
    assert (stages["personal"].precision, stages["personal"].recall) == (0.5, 1.0)
    assert stages["exact"].missed == 1 and stages["contamination"].missed == 1


def test_what_was_taken_is_judged_by_another_way(tmp_path):
    texts = ["Some words, here.", "some WORDS here", "other words here", "...", "?!", f"{WORDS} a", f"b {WORDS}",
             f"begin\n{ITEM} end", "some of the question"]  # fmt: skip
    before = {f"s/{i}": text for i, text in enumerate(texts)}
    after = {name: text for name, text in before.items() if name not in ("s/1", "s/2", "s/6", "s/8")} | {"s/7": "begin"}
    dropped = {"s/1": "s/0", "s/2": "s/0", "s/6": "s/5"}
    kept = dict.fromkeys(STAGES, after) | {"read": before}
    write(tmp_path, kept, {"exact": dropped})
    read, exact = planted_truth.steps(tmp_path)[:2]
    assert planted_truth.check_exact(read, exact)[1:] == (3, 1, 1)
    assert planted_truth.check_fuzzy(read, exact, FuzzyConfig())[1:] == (3, 2, 0)  # the exact copy and s/6
    items = {"set": [ITEM, "some words here and a few others more"]}
    assert planted_truth.check_contamination(read, exact, items, (13, 26, 8))[1:] == (5, 1, 0)
    assert planted_truth.of_source(read, exact, "s") == {"documents": 9, "dropped": 3}
