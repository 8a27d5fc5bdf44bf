"""Which dataset a run was trained on: dataset.json in its folder."""

import json
from pathlib import Path

from llm_jax.data.loader import DatasetInfo
from llm_jax.errors import UserError

FILE = "dataset.json"


def of(info: DatasetInfo) -> dict[str, str]:
    """What tells a dataset from another one, wherever it lies."""
    return {"fingerprint": info.fingerprint, "tokenizer_sha256": info.tokenizer_sha256}


def write(info: DatasetInfo, workdir: Path) -> None:
    """Note a run's dataset, atomically."""
    partial = (workdir / FILE).with_suffix(".partial")
    partial.write_text(json.dumps(of(info)) + "\n")
    partial.replace(workdir / FILE)


def read(workdir: Path) -> dict[str, str] | None:
    """What `write` noted; None for a run without a note. `UserError` if it is damaged."""
    path = workdir / FILE
    if not path.exists():
        return None
    try:
        noted = json.loads(path.read_text())
    except ValueError:
        noted = None
    if not isinstance(noted, dict):
        raise UserError(
            f"{path} is damaged, so the dataset of that run is not known: delete {workdir} to train it again"
        )
    return noted
