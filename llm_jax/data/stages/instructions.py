"""Conversations among the documents, as Qwen mixes instruction data into pre-training (section 2.1).

They are read after the stages that judge and compare documents, because they are short and many are alike by intent;
personal information and evaluation items are looked for in them as in all others.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import daft
from daft import DataType, lit

from llm_jax.data.files import jsonl_lines
from llm_jax.data.stages import COLUMNS, DROPPED, TEXT, Result
from llm_jax.errors import UserError, require

PREFIX = "instructions_"  # of their sources' names


@dataclasses.dataclass(frozen=True)
class InstructionsConfig:
    """Which conversations are added."""

    path: str = ""  # a folder of .jsonl files with {"messages": [{"role", "content"}, ...]} in each line; "" = none

    @property
    def enabled(self) -> bool:
        """Whether there is anything to add."""
        return bool(self.path)


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Adds the conversations of each file as a source of its own; drops nothing."""

    config: InstructionsConfig
    name: str = "instructions"

    def files(self) -> list[Path]:
        """The files that are read; `UserError` where there is none."""
        folder = Path(self.config.path).expanduser()
        found = sorted(folder.glob("*.jsonl"))
        require(
            bool(found), f"no .jsonl file in {folder} (InstructionsConfig.path): see experiments.prepare_instructions"
        )
        return found

    def added_sources(self) -> list[str]:
        """One for each file."""
        return [PREFIX + path.stem for path in self.files()]

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """All documents as they are, and the conversations."""
        rows = [row for path in self.files() for row in _rows(path)]
        require(bool(rows), f"the files in {self.config.path} hold no conversation (InstructionsConfig.path)")
        added = daft.from_pydict({name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)})
        marked = documents.with_column(DROPPED, lit(None).cast(DataType.string()))
        return Result(marked, {"conversations": dict(Counter(row[1] for row in rows))}, added)


def _rows(path: Path) -> Iterator[tuple[str, ...]]:
    """The values of COLUMNS for every conversation of a file."""
    source = PREFIX + path.stem
    for number, line in enumerate(jsonl_lines(path)):
        text = _text(line, f"{path}:{number + 1}")
        if text.strip():
            yield f"{source}/{number:08d}", source, "und", TEXT, f"{path.name}:{number + 1}", text


def _text(line: bytes, where: str) -> str:
    """A conversation as plain text: its messages, a blank line between them."""
    try:
        messages: Any = json.loads(line)["messages"]
        return "\n\n".join(message["content"] for message in messages)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{where}: no conversation of the form {{"messages": [{{"role", "content"}}, ...]}}: {error}'
        ) from None
