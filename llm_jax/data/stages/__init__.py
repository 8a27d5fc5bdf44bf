"""The stages of the corpus factory: each takes documents and gives the same documents, some of them marked as dropped.

Documents are a Daft dataframe with the columns of `COLUMNS`, one row a document, to which stages add columns of their
own (scores, clusters). A stage gives back every row that it got exactly once, the text changed where that is its work,
with one column more: DROPPED, null where the document is kept, else the reason in one or two words. Its input is a scan
of Parquet files, so it may be read as often as a stage needs; nothing in a stage depends on the order of rows.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import daft

from llm_jax.config import unknown_key
from llm_jax.data.documents import CODE as CODE
from llm_jax.data.documents import COLUMNS as COLUMNS
from llm_jax.data.documents import HTML as HTML
from llm_jax.data.documents import ID as ID
from llm_jax.data.documents import TEXT as TEXT
from llm_jax.errors import UserError

DROPPED = "dropped"
BECAUSE = "because"  # a column that a stage may add: what decided that a document is dropped, for people to read


class Result(NamedTuple):
    """What a stage makes of its documents."""

    documents: daft.DataFrame  # every row of the input, with DROPPED; lazy
    facts: dict[str, Any]  # for the report: numbers, names and lists of them, as JSON has them
    added: daft.DataFrame | None = None  # documents that were not in the input, with the columns COLUMNS and no others


def require_sources(names: Iterable[str], known: set[str], setting: str) -> None:
    """Raise `UserError` for a name in a setting that is none of the known sources, with the nearest one."""
    for name in names:
        if name not in known:
            message = unknown_key(name, sorted(known)).removeprefix("unknown config key ")
            raise UserError(f"{setting}: no source {message}")


class Stage(Protocol):
    """One stage; its settings are its own frozen dataclass.

    One that reads files which its settings name lists them in a method `files`: it is done again when they change. One
    whose settings name sources has a method `check_sources`, which gets the set of all that there are before any stage
    works, and one that adds sources a method `added_sources`, which names them. One that has something to make of its
    settings alone has a method `prepare`, which returns the stage to apply: it is called while earlier stages work.
    """

    @property
    def name(self) -> str:
        """What its folder and its settings are called."""
        ...

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """Mark what is dropped. `scratch` is an empty folder for what the stage needs while its result is read."""
        ...
