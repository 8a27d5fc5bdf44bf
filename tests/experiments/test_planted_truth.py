"""The experiment as a person runs it, on made-up texts: what is planted is found, nothing else is, and it is told."""

import json

import pytest

from experiments import planted_truth
from llm_jax.data.planting import PlantConfig
from llm_jax.data.stages.contamination import ContaminationConfig
from llm_jax.data.stages.lines import LinesConfig
from llm_jax.data.stages.quality import QualityConfig
from llm_jax.errors import UserError
from tests.data import made_up


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts").mkdir()
    for row in made_up.documents(220):
        with (folder / "texts" / f"{row[1]}.jsonl").open("a") as file:
            file.write(json.dumps({"text": row[5]}) + "\n")
    (folder / "plants.jsonl").write_text("".join(json.dumps({"text": item}) + "\n" for item in made_up.items(20)))
    return planted_truth.PlantedTruthConfig(
        path=str(folder / "texts"),
        plant=PlantConfig(count=3, shares=(0.01, 0.2), least_bytes=300),
        sample=200,
        quality=QualityConfig(enabled=False, lists=False),  # knows too little of so few words
        lines=LinesConfig(documents=4),
        contamination=ContaminationConfig(sets=(), paths=(str(folder / "plants.jsonl"),)),
        workers=1,
    )


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    planted_truth.run(config, folder)
    return folder


def test_what_is_planted_is_found_and_nothing_else(workdir):
    found = json.loads((workdir / "report.json").read_text())
    stages = {row["stage"]: row for row in found["stages"]}
    assert all(row["wrong"] == 0 for row in stages.values())
    assert stages["exact"]["found"] == 12 and stages["personal"]["found"] > 30 and stages["contamination"]["found"] == 9
    for row in found["kinds"]:
        if row["group"] in ("shared paragraphs", "personal information", "evaluation items"):
            assert row["verdicts"] == {"kept" if row["control"] else "found": row["planted"]}, row
    kinds = {row["kind"]: row["verdicts"] for row in found["kinds"] if row["group"] == "garbage"}
    for kind in ("UTF-8 read as GBK", "random bytes", "menu", "one line over and over"):
        assert kinds[kind] == {"found": 3}
    for check in found["checks"]:
        assert check["taken"] == check["right"] > 0, check
    assert {check["stage"] for check in found["checks"]} == {"exact", "fuzzy", "contamination"}


def test_near_duplicates_are_found_as_theory_has_it(workdir):
    found = json.loads((workdir / "report.json").read_text())
    rows = {(row["way"], row["share"]): row for row in found["near duplicates"]}
    for row in rows.values():
        assert row["arrived"] == 6 and abs(row["fuzzy"] - row["expected"]) < 0.2
    assert rows["one passage", 0.01]["fuzzy"] == 1 and rows["words here and there", 0.2]["fuzzy"] == 0
    assert sum(each["pairs"] for each in found["s_curve"]) > 10 and found["sample"]["documents"] == 200
    assert found["sample"]["similar"] == found["sample"]["similar of which the stage leaves one or none"]


def test_the_report_is_for_people_and_a_second_run_says_the_same(config, workdir, capsys):
    report = (workdir / "report.md").read_text()
    assert "| exact |" in report and "mobile phone" in report and (workdir / "near_duplicates.png").stat().st_size > 1e4
    planted_truth.run(config, workdir)
    assert "done earlier" in capsys.readouterr().err and (workdir / "report.md").read_text() == report


def test_documents_of_stages_are_needed():
    with pytest.raises(UserError, match="removes what is to be looked at"):
        planted_truth.PlantedTruthConfig(keep_stages=False)
