"""What is planted is there, is what it says it is, and is the same whatever the order of the documents."""

import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from llm_jax.data import planted_texts, planting
from llm_jax.data.planting import Material, PlantConfig
from llm_jax.data.stages import COLUMNS, identifiers
from llm_jax.errors import UserError
from tests.data import made_up

CONFIG = PlantConfig(count=2, shares=(0.02, 0.2), least_bytes=300)
MATERIAL = Material(
    {"plants": made_up.items(30)}, ["some very bad words are here"], ["a very nice line of a film", "too short"]
)


def table(rows):
    return pa.table({name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)})


ROWS = made_up.documents(210)


@pytest.fixture(scope="module")
def planted():
    documents, plants = planting.plant(table(ROWS), CONFIG, MATERIAL, shared_by=4)
    return dict(zip(documents["id"].to_pylist(), documents["text"].to_pylist())), plants


def test_what_should_go_is_there(planted):
    texts, plants = planted
    raw = {row[0]: row[5] for row in ROWS}
    for plant in plants:
        assert plant.id in texts and all(
            target in texts[plant.id].splitlines() or target in texts[plant.id] for target in plant.targets
        )
        assert not plant.original or texts[plant.original] == raw[plant.original]
        assert all(target not in raw.get(plant.id, "") for target in plant.targets)
    changed = {id for id, text in raw.items() if texts[id] != text}
    assert changed == {plant.id for plant in plants if plant.targets}
    assert set(texts) - set(raw) == {plant.id for plant in plants if not plant.targets}


def test_a_document_serves_for_one_plant(planted):
    used = Counter(id for plant in planted[1] for id in (plant.id, plant.original) if id)
    assert max(used.values()) == 1


def test_every_kind_is_planted_as_often_as_asked(planted):
    counts = Counter((plant.group, plant.kind, plant.language, plant.share) for plant in planted[1])
    shared = {"in too many documents": 5 * 12, "in few documents": 5 * 2}
    assert all(count == shared.get(key[1], 2) for key, count in counts.items())
    groups = {group for group, *_ in counts}
    assert groups == {planting.DUPLICATES, planting.PARAGRAPHS, planting.PERSONAL, planting.OFFENSIVE,
                      planting.EVALUATION, planting.GARBAGE}  # fmt: skip
    assert "too short" not in {target for plant in planted[1] for target in plant.targets}


def test_the_order_of_documents_does_not_matter_and_the_seed_does(planted):
    other = random.Random(3).sample(ROWS, len(ROWS))
    assert planting.plant(table(other), CONFIG, MATERIAL, 4)[1] == planted[1]
    assert planting.plant(table(ROWS), PlantConfig(2, (0.02, 0.2), 300, seed=1), MATERIAL, 4)[1] != planted[1]


def test_a_list_of_plants_is_read_as_it_was_written(planted, tmp_path):
    planting.write(planted[1], tmp_path / "truth.jsonl")
    assert planting.read(tmp_path / "truth.jsonl") == planted[1]


def test_documents_with_a_copy_are_left_alone():
    rows = made_up.documents(40)
    copies = [(f"copy/{i:08d}", "copy", *row[2:5], row[5].upper()) for i, row in enumerate(rows)]
    _, plants = planting.plant(table(rows + copies), CONFIG, MATERIAL, 4)
    assert not plants


def test_few_documents_have_fewer_plants_of_every_kind(caplog):
    _, plants = planting.plant(table(made_up.documents(40)), PlantConfig(10, (0.1,), 300), MATERIAL, 4)
    assert "fewer of each kind" in caplog.text
    counts = Counter((plant.kind, plant.language) for plant in plants if plant.group == planting.DUPLICATES)
    assert len(counts) == 8 and len(set(counts.values())) <= 2 and max(counts.values()) < 10


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
def test_a_share_of_the_units_is_edited(share):
    words = [f"w{i}" for i in range(200)]
    count = round(200 * share)
    scattered = planted_texts.edited(" ".join(words), share, ["new"], np.random.default_rng(0)).split()
    gone, added = len(set(words) - set(scattered)), scattered.count("new")
    replaced, removed, followed = ((count + 2 - rest) // 3 for rest in range(3))
    assert (gone, added) == (replaced + removed, replaced + followed)
    assert [word for word in scattered if word != "new"] == [word for word in words if word in scattered]
    passage = planted_texts.edited(" ".join(words), share, ["new"], np.random.default_rng(0), True).split()
    start = passage.index("new")
    assert passage == [*words[:start], *["new"] * count, *words[start + count :]]


def test_characters_of_chinese_are_edited_one_by_one():
    text = "".join(chr(0x4E00 + i) for i in range(100))
    found = planted_texts.edited(text, 0.1, ["新"], np.random.default_rng(0), True)
    assert len(found) == 100 and found.count("新") == 10


def test_a_translated_copy_has_the_same_units_and_hardly_a_line_in_common():
    for row in (ROWS[0], ROWS[-1]):
        other = planted_texts.translated(row[5], np.random.default_rng(0))
        assert planted_texts.units(other) == planted_texts.units(row[5])
        assert not set(other.splitlines()) & set(row[5].splitlines())


def test_check_digits_are_those_of_known_numbers():
    assert planted_texts.luhn_digit("7992739871") == "3" and planted_texts.luhn_digit("37828224631000") == "5"
    assert planted_texts.identity_digit("11010519491231002") == "X"


def test_identifiers_are_of_the_kind_that_is_said_and_lookalikes_are_none():
    generator = np.random.default_rng(0)
    for known, count in ((planted_texts.PERSONAL, 1), (planted_texts.LOOKALIKES, 0)):
        for _, sentence, make in known.values():
            for _ in range(20):
                assert len(identifiers.find(sentence.format(make(generator)))) == count


def test_shares_out_of_range_are_refused():
    with pytest.raises(UserError, match="must be between 0 and 1"):
        PlantConfig(shares=(0.1, 1.5))


def test_a_dirty_corpus_has_the_clean_one_in_it_and_copies_spoiled_in_every_way():
    clean = {row[0]: row[5] for row in ROWS}
    dirty = planting.with_spoiled(table(ROWS), 1.0, seed=0)
    texts = dict(zip(dirty["id"].to_pylist(), dirty["text"].to_pylist()))
    assert len(texts) == 2 * len(clean) and {id: texts[id] for id in clean} == clean
    spoiled = [text for id, text in texts.items() if planting.SPOILED in id]
    copies = sum(text in clean.values() for text in spoiled)
    assert 0.5 < 7 * copies / len(spoiled) < 2
    assert len(planting.with_spoiled(table(ROWS), 0.25, seed=0)) == pytest.approx(1.25 * len(clean), rel=0.1)
    assert planting.with_spoiled(table(ROWS[::-1]), 0.25, 0) == planting.with_spoiled(table(ROWS), 0.25, 0)
