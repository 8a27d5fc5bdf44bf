"""Signs of life: what a process says reaches its supervisor, whatever becomes of a single write."""

import errno
import subprocess
import sys
import time

from llm_jax import files
from llm_jax.parallel import supervision


def wait_for_step(path, step):
    deadline = time.monotonic() + 10
    while supervision.read_beat(path).step != step and time.monotonic() < deadline:
        time.sleep(0.01)
    return supervision.read_beat(path)


def test_a_disk_that_is_full_for_a_while_ends_neither_the_signs_nor_the_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(supervision, "BEAT_SECONDS", 0.05)
    path = tmp_path / "0.json"
    signs = supervision.Signs(path)
    signs.tell(step=1)
    before = wait_for_step(path, 1)

    def full(path, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", full)
        time.sleep(0.2)  # several beats
        signs.tell(step=2)
        time.sleep(2 * supervision.WRITE_SECONDS)
        signs.tell(step=3)
        assert supervision.read_beat(path) == before
    found = wait_for_step(path, 3)
    assert found.step == 3 and found.count > before.count
    assert f"no sign of life could be written to {path}: No space left on device" in caplog.text


def test_the_last_step_is_said_before_the_process_ends(tmp_path):
    """Steps shorter than a write share a line; the last ones' is written at the end."""
    steps = "for step in range(50): signs.tell(step=step)"
    begin = (
        "import pathlib, sys; from llm_jax.parallel.supervision import Signs; signs = Signs(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", f"{begin}\n{steps}", tmp_path / "0.json"], check=True)
    assert supervision.read_beat(tmp_path / "0.json").step == 49
