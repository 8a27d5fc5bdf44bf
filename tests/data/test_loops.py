"""What is compiled is kept between processes, but not when anything that it was made of changes."""

import os
import subprocess
import sys

from llm_jax.data import loops

PROGRAM = "import numpy as np; from llm_jax.data import ngrams; print(ngrams.mix(np.arange(3, dtype=np.uint64)))"


def run(home):
    environment = {**os.environ, "HOME": str(home)}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)


def test_any_change_of_a_file_is_another_state(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("x = 1")
    (tmp_path / "c.py").write_text("")
    before = loops.digest(tmp_path)
    assert loops.digest(tmp_path) == before
    (tmp_path / "a" / "b.py").write_text("x = 2")
    changed = loops.digest(tmp_path)
    (tmp_path / "a" / "b.py").rename(tmp_path / "a" / "d.py")
    assert len({before, changed, loops.digest(tmp_path)}) == 3


def test_what_is_compiled_is_kept_in_the_users_cache(tmp_path):
    first = run(tmp_path)
    kept = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.glob(".cache/llm_jax/numba/*/*/*.nbc"))
    assert kept and any(name.startswith("ngrams.mix") for name, _ in kept)
    assert run(tmp_path).stdout == first.stdout
    assert kept == sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.glob(".cache/llm_jax/numba/*/*/*.nbc"))


def test_without_a_folder_to_write_to_nothing_is_kept(tmp_path):
    (tmp_path / ".cache").write_text("a file in the way")
    assert run(tmp_path).stdout == run(tmp_path / "other").stdout
