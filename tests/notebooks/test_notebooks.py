"""The notebooks run from the first cell to the last, and are committed without outputs."""

import dataclasses
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from configs.scaling_laws import tiny
from llm_jax import config
from llm_jax.scaling import results
from llm_jax.scaling.config import ScalingConfig
from tests.scaling import studies

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCALING_LAWS = ROOT / "notebooks" / "scaling_laws.ipynb"


def execute(path: Path, folder: Path, monkeypatch, **settings: str) -> nbformat.NotebookNode:
    """Run a notebook in `folder` with other values in its cell of settings."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "")  # as many devices as there are, not the eight simulated ones
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name in settings:
        assert f"{name} = " in parameters.source
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def outputs(notebook: nbformat.NotebookNode, cell_id: str) -> list[dict]:
    """What a cell displayed, by MIME type; streams are left out."""
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    return [output.data for output in cell.outputs if output.output_type in ("display_data", "execute_result")]


def figure(notebook: nbformat.NotebookNode, cell_id: str) -> dict:
    """The Plotly figure that a cell displayed."""
    (data,) = outputs(notebook, cell_id)
    return data["application/vnd.plotly.v1+json"]


@pytest.fixture
def finished_study(tmp_path) -> Path:
    """The results.json of a made-up study with its config beside it."""
    folder = tmp_path / "study"
    config.save(studies.config(), folder / "config.json")
    predicted = [dataclasses.replace(run, held_out=True) for run in studies.prediction().actual]
    results.write([*studies.sweep(), *predicted], folder)
    return folder / "results.json"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, f"{path.name}: clear the outputs of {cell.id}"


@pytest.mark.parametrize("source, found", [("nowhere", False), (str(ROOT), True), ("git+https://example.org/x", True)])
def test_the_project_is_installed_from_where_it_is_or_the_cell_says_what_to_set(monkeypatch, source, found):
    notebook = nbformat.read(SCALING_LAWS, as_version=4)
    (cell,) = (cell for cell in notebook.cells if cell.id == "install")
    assert 'SOURCE = ".."' in cell.source and "%pip install --quiet {SOURCE}" in cell.source
    code = cell.source.replace('SOURCE = ".."', f"SOURCE = {source!r}")
    code = code.replace("%pip install --quiet {SOURCE}", "done = 1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names: dict[str, object] = {}
    if found:
        exec(code, names)
        assert names["done"] == 1
    else:
        with pytest.raises(SystemExit, match="no project in nowhere: set SOURCE"):
            exec(code, names)


def test_scaling_laws_from_results(tmp_path, monkeypatch, finished_study):
    notebook = execute(SCALING_LAWS, tmp_path, monkeypatch, RESULTS=str(finished_study), WORKDIR="drawn")
    hovers = json.dumps(figure(notebook, "frontier"))
    for run in (*studies.sweep(), *studies.prediction().actual):
        assert run.name in hovers
    assert {trace.get("name") for trace in figure(notebook, "frontier")["data"]} >= {
        "fitted law",
        "predicted",
        "actual",
    }
    assert figure(notebook, "residuals")["layout"]["yaxis"]["title"]["text"].endswith("(%)")
    assert len(figure(notebook, "tokens")["data"]) == 2 * len([*studies.sweep(), *studies.prediction().actual])
    (missing,) = outputs(notebook, "rates")
    assert "no figure `learning_rates`" in missing["text/markdown"]
    (report,) = outputs(notebook, "report")
    assert "L\\_inf" in report["text/markdown"] and "mean ± standard error" in report["text/markdown"]
    assert (tmp_path / "drawn" / "figures.html").is_file() and (tmp_path / "drawn" / "laws.json").is_file()


@pytest.mark.slow
def test_scaling_laws_trains_the_tiny_study(tmp_path, monkeypatch):
    notebook = execute(SCALING_LAWS, tmp_path, monkeypatch, WORKDIR="trained")
    found, problems = results.read(tmp_path / "trained" / "results.json")
    assert not problems
    wanted = config.from_config_dict(ScalingConfig, tiny.get_config())
    assert {run.size for run in found} == {size.name for size in (*wanted.grid.sizes, wanted.prediction.size)}
    hovers = json.dumps(figure(notebook, "frontier"))
    assert all(run.name in hovers for run in found)
