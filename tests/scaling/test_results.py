"""Results come back from their files as they were, and a file that somebody edited loses only the trials he broke."""

import csv
import dataclasses
import json

import pytest

from llm_jax import models
from llm_jax.config import ModelConfig, RopeScalingConfig
from llm_jax.errors import UserError
from llm_jax.scaling import flops, results
from llm_jax.scaling.trial import TrialResult

MODEL = ModelConfig(
    vocab_size=96, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=24, max_length=32,
    window_sizes=(0, 8), rope_scaling=RopeScalingConfig("linear", 2.0),
)  # fmt: skip


def trial(name: str, **changes) -> TrialResult:
    tokens = changes.get("tokens", 4096)
    count = flops.count(MODEL)
    result = TrialResult(
        name=name, size="tiny", model=MODEL, sequence_length=32, parameters=count.total,
        non_embedding_parameters=count.non_embedding, tokens=tokens, unique_tokens=tokens,
        compute=flops.training_flops(MODEL, 32, tokens), learning_rate=3e-3, seed=ord(name) - 96, loss=3.25,
        curve=((1024, 4.5), (2048, 3.75), (tokens, 3.25)), varied=("optimizer.weight_decay=0.0", "data.seed=4"),
    )  # fmt: skip
    return dataclasses.replace(result, **changes)


@pytest.fixture
def edited(tmp_path):
    """Writes three trials, changes the second one's record, and reads the file."""

    def edit_and_read(change):
        results.write([trial("a"), trial("b"), trial("c")], tmp_path)
        path = tmp_path / "results.json"
        values = json.loads(path.read_text())
        values["trials"][1] = change(values["trials"][1])
        path.write_text(json.dumps(values))
        return results.read(path)

    return edit_and_read


def test_results_come_back_as_they_were(tmp_path):
    written = [trial("a"), trial("b", tokens=8192, unique_tokens=4096), trial("c", varied=())]
    results.write(written, tmp_path / "new" / "folder")
    assert results.read(tmp_path / "new" / "folder" / "results.json") == (written, [])


def test_parameters_are_those_of_the_model_that_is_trained():
    assert trial("a").parameters == models.count_parameters(MODEL)


def test_the_table_has_a_row_per_trial_and_no_curves(tmp_path):
    results.write([trial("a"), trial("b", seed=7)], tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a", "b"]
    assert rows[1]["seed"] == "7" and float(rows[1]["compute"]) == trial("b").compute
    assert rows[0]["num_kv_heads"] == "1" and rows[0]["varied"] == "optimizer.weight_decay=0.0 data.seed=4"
    assert not {"curve", "model"} & set(rows[0])


def test_an_interrupted_write_leaves_the_earlier_results(tmp_path, monkeypatch):
    results.write([trial("a")], tmp_path)
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        results.write([trial("b")], tmp_path)
    assert [result.name for result in results.read(tmp_path / "results.json")[0]] == ["a"]


BROKEN = {
    "loss": ("2.5", float("nan"), float("inf"), 0.0, -1.0, None, True),
    "learning_rate": (0, "x"),
    "compute": (1e9, float("nan"), 10**400),
    "parameters": (4000, 0, -3, 1e3, 10**400),
    "non_embedding_parameters": (4000,),
    "tokens": (8192, 0, 4096.5),
    "unique_tokens": (9999, 0),
    "sequence_length": (16, 0),
    "seed": (-1, 0.5),
    "size": (3,),
    "varied": ("abc", [1]),
    "model": ({}, [], 3, {**dataclasses.asdict(MODEL), "num_layers": 10**12}),
    "curve": (
        [],
        [[4096, 3.25], [4096, 3.25]],
        [[2048, 3.75], [1024, 4.5], [4096, 3.25]],
        [[1024, float("nan")], [4096, 3.25]],
        [[1024, -4.0], [4096, 3.25]],
        [[1024, 4.5]],
        [[4096, 3.0]],
        [[4096]],
        [[4096, 3.25, 1.0]],
        [4096, 3.25],
        [[0, 4.0], [4096, 3.25]],
    ),
}


@pytest.mark.parametrize("field, value", [(field, value) for field in BROKEN for value in BROKEN[field]])
def test_a_broken_value_costs_only_its_trial(edited, field, value):
    read, problems = edited(lambda record: {**record, field: value})
    assert [result.name for result in read] == ["a", "c"]
    assert len(problems) == 1 and "\n" not in problems[0] and len(problems[0]) < 600
    assert "trial 'b'" in problems[0]
    expected = {"model": ""}.get(field, "too large" if value == 10**400 else field)
    assert expected in problems[0]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TrialResult)])
def test_every_field_must_be_there(edited, field):
    read, problems = edited(lambda record: {k: v for k, v in record.items() if k != field})
    assert [result.name for result in read] == ["a", "c"]
    assert problems[0].endswith(f": {field} is missing")


def test_a_misspelt_field_is_named(edited):
    _, problems = edited(lambda record: {**record, "los": 3.0})
    assert "trial 'b'" in problems[0] and "did you mean 'trial.loss'" in problems[0]


def test_sizes_whose_heads_do_not_divide_are_left_out(edited):
    _, problems = edited(lambda record: {**record, "model": {**record["model"], "num_kv_heads": 3}})
    assert len(problems) == 1 and "num_kv_heads=3" in problems[0] and "trial 'b'" in problems[0]


@pytest.mark.parametrize("record", [None, 3, [], "b", {}])
def test_a_record_that_is_none_is_counted(edited, record):
    read, problems = edited(lambda _: record)
    assert [result.name for result in read] == ["a", "c"]
    assert "trial number 2" in problems[0]


@pytest.mark.parametrize("name, said", [("", "trial number 2: name is empty"), (3, "trial 3: trial.name must be str")])
def test_a_nameless_trial_is_counted(edited, name, said):
    read, problems = edited(lambda record: {**record, "name": name})
    assert [result.name for result in read] == ["a", "c"]
    assert said in problems[0]


def test_of_two_trials_of_one_name_the_first_counts(edited):
    read, problems = edited(lambda record: {**record, "name": "a", "seed": 5})
    assert [(result.name, result.seed) for result in read] == [("a", 1), ("c", 3)]
    assert "trial 'a': is there twice" in problems[0]


def test_a_copy_of_a_run_under_another_name_does_not_count_as_a_seed(edited):
    read, problems = edited(lambda record: {**record, "seed": 1, "loss": 3.0, "curve": [[4096, 3.0]]})
    assert [result.name for result in read] == ["a", "c"]
    assert len(problems) == 1 and "trial 'b': is the same run as trial 'a'" in problems[0]


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"learning_rate": 1e-3}, {"varied": []}, {"held_out": True}, {"unique_tokens": 1024}]
)
def test_runs_that_differ_in_a_setting_are_two(edited, change):
    read, problems = edited(lambda record: {**record, "seed": 1, **change})
    assert len(read) == 3 and not problems


def test_values_to_within_rounding_are_accepted(edited):
    read, problems = edited(lambda record: {**record, "compute": record["compute"] * (1 + 1e-7)})
    assert len(read) == 3 and not problems
    read, problems = edited(lambda record: {**record, "compute": record["compute"] * (1 + 1e-5)})
    assert len(read) == 2 and "compute" in problems[0]


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no list of trials"),
        ("3", "no list of trials"),
        ('{"trials": {}}', "no list of trials"),
        ("name,size\na,b\n", "not valid JSON"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, said):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        results.read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_bytes_that_are_no_text_and_missing_files_are_refused(tmp_path):
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid JSON"):
        results.read(tmp_path / "results.json")
    with pytest.raises(UserError, match="no results at"):
        results.read(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="no results at"):
        results.read(tmp_path)
