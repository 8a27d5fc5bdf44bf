"""Files that are whole or not there: written beside their place, and moved to it in the end."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_jax.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` at the end of the block; after an exception `path` is as it was."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Write values as indented JSON."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` wrote; `UserError` where the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it and run what wrote it again") from None


def read_lines(path: Path) -> Iterator[Any]:
    """What `write_lines` wrote, record after record."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Write records as JSON Lines, of which there need never be more than one in memory."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
