"""The plan as its users make it: the page, its data, and the mistakes one can make."""

import importlib.util
import json
import subprocess

import pytest

from experiments import partitioning, plan, runner
from llm_jax.config import TrainConfig
from llm_jax.parallel import absent, compiled
from llm_jax.parallel.partitioning import PartitioningConfig
from llm_jax.training import ahead_of_time

PAPERS = "configs/pretrain/papers.py"


def make(folder, *arguments, name="baichuan2_13b", target="a800x1024"):
    argv = ["plan", f"--config={PAPERS}:{name}", f"--target={target}", f"--workdir={folder}"]
    defaults = ["--compile", "--nochoose", "--cards=0"]  # flags keep their values within a process
    runner.main(plan.run, TrainConfig, PAPERS, argv=[*argv, *defaults, *arguments])
    return json.loads((folder / "plan.json").read_text())


def refused(capsys, folder, *arguments, **options):
    with pytest.raises(SystemExit):
        make(folder, "--nocompile", *arguments, **options)
    return capsys.readouterr().err.splitlines()[-1]


def test_the_page_and_its_data(tmp_path, capsys):
    found = make(tmp_path, "--nocompile", "--config.mesh.tensor=8")
    shown = " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "plan.html").read_text()
    assert found["mesh"] == {"replica": 1, "data": 128, "tensor": 8}
    assert found["fits"] is True
    assert found["estimated"]["bytes"] == pytest.approx(sum(found["estimated"]["memory"].values()))
    seconds = found["estimated"]["seconds"]
    assert found["estimated"]["utilisation"]["serial"] == pytest.approx(seconds["useful"] / seconds["serial"])
    assert sum(row["seconds"] for row in found["estimated"]["traffic"]) == pytest.approx(seconds["collectives"])
    for sentence in found["verdict"]:
        assert sentence in shown
        assert sentence in page
    assert page.count("data:image/png;base64,") == 2
    assert "--config.mesh.tensor=8" not in found  # the command is in the page, as it was typed


def test_the_best_way_can_be_planned(tmp_path):
    slow = "--config.model.gather=layer", "--config.model.gather_tables=layer", "--config.model.remat=save_attention"
    own = make(tmp_path / "own", "--nocompile", *slow)
    best = make(tmp_path / "best", "--nocompile", "--choose")
    assert best["estimated"]["bytes"] == own["alternatives"][0]["bytes"]
    assert best["estimated"]["utilisation"]["serial"] > own["estimated"]["utilisation"]["serial"] + 0.1
    assert own["verdict"][2].startswith("Change: ")
    assert best["verdict"][2].startswith("No other way")


@pytest.mark.parametrize("name", ["llama2_7b", "baichuan_13b", "baichuan2_7b", "qwen_7b", "qwen_14b"])
def test_nothing_is_better_than_the_papers_configs_on_their_cluster(name, tmp_path):
    found = make(tmp_path, "--nocompile", name=name)
    assert found["fits"] and found["verdict"][2].startswith("No other way"), found["verdict"]


@pytest.mark.parametrize("name", ["llama2_34b", "llama2_70b"])
def test_the_papers_configs_of_large_models_fit(name, tmp_path):
    assert make(tmp_path, "--nocompile", name=name)["fits"]


def test_a_missing_compiler_is_named_and_the_estimate_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(absent.importlib.util, "find_spec", lambda name: None)
    found = make(tmp_path)
    assert "jax-cuda12-plugin and jax-cuda12-pjrt is not installed: `make aot`" in found["not_compiled"]
    assert "not compiled: jax-cuda12-plugin" in capsys.readouterr().err
    assert found["estimated"]["bytes"] > 0


@pytest.mark.parametrize(
    ("line", "fits"),
    [("XlaRuntimeError: RESOURCE_EXHAUSTED: 99 GB", False), ("Out of memory in HBM", False), ("no such option", True)],
)
def test_what_the_compiler_refuses_for_memory_does_not_fit(tmp_path, monkeypatch, line, fits):
    monkeypatch.setattr(absent, "environment", lambda chip: {})
    ended = subprocess.CompletedProcess([], 1, "", f"{line}\na last line\n")
    monkeypatch.setattr(ahead_of_time.subprocess, "run", lambda *arguments, **options: ended)
    found = make(tmp_path, "--choose")
    assert found["fits"] is fits
    assert found["verdict"][0].startswith("Fits: " if fits else "Does not fit, says the compiler, which refuses the")
    assert (line in found["not_compiled"]) is not fits
    changes = [sentence for sentence in found["verdict"] if sentence.startswith("Change: ")]
    assert len(changes) == (not fits)
    assert found["alternatives"][0]["way"] not in "".join(changes)  # which is what was refused


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"target": "a80x1024"}, "unknown target 'a80x1024'; did you mean 'a800x1024'?"),
        (("--config.mesh.tensor=3",), {}, "does not cover the 1024 devices; the nearest that does is replica=1"),
        (("--config.mesh.tensor=16",), {}, "mesh tensor=16 does not divide the 8 devices of a host"),
        (("--config.microbatches=2",), {}, "choose a multiple of 2048"),
        (("--config.mesh.tensor=8",), {"target": "a800x8", "name": "llama2_70b"}, "nothing fits a800x8: the least"),
        (("--config.data.batch_size=7",), {}, "the batch does not divide over any mesh of 1024 devices"),
        (("--cards=1",), {"target": "v5p-2048"}, "has no network cards"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, capsys, arguments, options, message):
    error = refused(capsys, tmp_path, *arguments, **options)
    assert error.startswith("error: ")
    assert message in error


def test_ways_to_divide_a_training_side_by_side(tmp_path):
    config = PartitioningConfig(models=("llama2_7b",), devices=(64, 1024), cards=(8,))
    partitioning.run(config, tmp_path)
    rows = json.loads((tmp_path / "partitioning.json").read_text())
    assert len(rows) == 2 * 2 * 4
    table = (tmp_path / "partitioning.md").read_text()
    assert table.count("✓") == 2  # the best of each number of devices
    best = max(
        (row for row in rows if row["devices"] == 1024), key=lambda row: 1 / (1 / row["serial"] + 1 / row["overlapped"])
    )
    shown = f"{best['bytes'] / 1e9:.0f} GB, {100 * best['serial']:.0f} to {100 * best['overlapped']:.0f} % ✓"
    assert shown in table
    assert (tmp_path / "partitioning.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the compilers of `make aot`")
def test_the_step_compiled_for_absent_gpus_costs_what_is_estimated(tmp_path):
    found = make(tmp_path, "--config.mesh.tensor=1", name="llama2_7b")
    estimated, read = found["estimated"], found["compiled"]
    assert estimated["bytes"] == pytest.approx(read["bytes"], rel=0.15)
    assert estimated["flops"] == pytest.approx(read["flops"], rel=0.01)
    assert estimated["seconds"]["collectives"] == pytest.approx(read["seconds"]["collectives"], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the compilers of `make aot`")
def test_compile_time_does_not_depend_on_the_depth(tmp_path):
    """As many computations run, of as many instructions, but for gathers of short stacks, which are put together."""
    seconds, programs = [], []
    for layers in (4, 32):
        found = make(tmp_path / str(layers), f"--config.model.num_layers={layers}", name="llama2_7b")
        seconds.append(found["compiled"]["compile_seconds"])
        programs.append(compiled.parse((tmp_path / str(layers) / "compiled" / ahead_of_time.TEXT).read_text()))
    shallow, deep = programs
    assert len(compiled.repetitions(shallow)) == len(compiled.repetitions(deep))
    counts = [sum(len(lines) for lines in program.computations.values()) for program in programs]
    assert counts[1] == pytest.approx(counts[0], rel=0.05)
    assert seconds[1] < 2 * seconds[0]
