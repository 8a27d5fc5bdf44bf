"""The report's experiment where it needs no model: times, descriptions, the printed table, and wrong input."""

import json

import pytest
from rich.console import Console

from experiments import report
from experiments.report import ReportConfig
from llm_jax.config import ModelConfig
from llm_jax.errors import UserError
from llm_jax.evaluation.report import Heldout, Sample, Stage


def test_train_seconds_adds_up_stretches_of_different_speed():
    # 1000 tokens at 100 a second, 500 at 50, 2000 at 1000.
    records = [
        {"tokens": 1000, "tokens_per_second": 100.0},
        {"tokens": 1500, "tokens_per_second": 50.0},
        {"tokens": 3500, "tokens_per_second": 1000.0},
    ]
    assert report.train_seconds(records) == pytest.approx(10 + 10 + 2)


def test_a_model_is_described_by_what_sets_it_apart():
    base = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_size": 96}
    text = report.describe_model(ModelConfig(**base, position="alibi", norm_head=True))
    for part in ("2 layers of width 64", "4 heads (2 key-value) of 16", "ALiBi", "NormHead", "32,000"):
        assert part in text
    assert "tied head" in report.describe_model(ModelConfig(**base, tie_embeddings=True))


def test_the_table_prints_every_source_and_their_sum():
    rows = {
        "a": Heldout("en", 1, 1000, 1, {"model": 2000.0, "gzip -9": 3000.0}),
        "b": Heldout("zh", 1, 3000, 1, {"model": 3000.0, "gzip -9": 4000.0}),
    }
    console = Console(width=100, force_terminal=False, record=True)
    with console.capture() as capture:
        console.print(report.table(rows))
    lines = {line.split()[1]: line for line in capture.get().splitlines() if line.startswith("│")}
    assert "2.000" in lines["a"] and "1.333" in lines["b"]
    assert "1.250" in lines["all"] and "1.750" in lines["all"]


def test_stages_and_samples_come_back_as_they_were_written(tmp_path):
    stages, samples = tmp_path / "stages.json", tmp_path / "samples.json"
    stages.write_text(json.dumps({"pretrain": {"command": "python -m x", "seconds": 3.5}}))
    samples.write_text(json.dumps([{"prompt": "a", "completion": "天", "settings": "greedy"}]))
    assert report.read_stages(stages) == (Stage("pretrain", "python -m x", 3.5),)
    assert report.read_stages(tmp_path / "none.json") == ()
    assert report.read_samples(samples) == (Sample("a", "天", "greedy"),)


@pytest.mark.parametrize("text", ["{", '[{"prompt": "a"}]', "[1]"])
def test_samples_that_are_none_are_refused_in_one_line(text, tmp_path):
    path = tmp_path / "samples.json"
    path.write_text(text)
    with pytest.raises(UserError, match="does not hold samples"):
        report.read_samples(path)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no config at"):
        report.run(ReportConfig(run=str(tmp_path)), tmp_path / "out")
    with pytest.raises(UserError, match="no samples at"):
        report.read_samples(tmp_path / "samples.json")
