"""Experiments in stages, whose runs may go side by side: what may be named, what is done, and the report of all."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from llm_jax import config as config_lib
from llm_jax.alignment import finetune
from llm_jax.config import one_of
from llm_jax.errors import require
from llm_jax.evaluation import tables
from llm_jax.evaluation.tables import Table

flags.disclaim_key_flags()  # what is defined here belongs to the experiment that asks for it, whose --help lists it


def define_flags(stages: Sequence[str], example: str) -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """--stages and --only, both lists; `example` names a run."""
    return (
        flags.DEFINE_list("stages", list(stages), f"which of {', '.join(stages)} to do", allow_override=True),
        flags.DEFINE_list(
            "only",
            [],
            f"of the runs only these, as {example}: for processes side by side",
            allow_override=True,
        ),
    )


def check_names(stages: Sequence[str], every: Sequence[str], only: Sequence[str], known: Sequence[str]) -> None:
    """Raise `UserError` unless all stages and runs that are named are there."""
    for stage in stages:
        one_of("--stages", stage, tuple(every))
    for each in only:
        one_of("--only", each, tuple(known))


def check_workdir(config: Any, workdir: Path, changeable: Sequence[str]) -> None:
    """Note the config, or raise `UserError` if the folder holds what another one made.

    `changeable` are the settings that may differ between two calls with one folder.
    """
    path = workdir / finetune.CONFIG
    if path.exists():
        old = config_lib.load(type(config), path)
        names = [name for name, hint in config_lib.keys(type(config)) if not dataclasses.is_dataclass(hint)]
        changed = [n for n in names if n not in changeable and attrgetter(n)(old) != attrgetter(n)(config)]
        require(
            not changed,
            f"{workdir} holds an experiment with another {', '.join(changed[:4])}: choose a new --workdir, or continue "
            "with the old settings",
        )
    workdir.mkdir(parents=True, exist_ok=True)
    config_lib.save(config, path)


def is_done(last: Path) -> bool:
    """Whether a stage or run has written its last file; then it says so."""
    if last.is_file():
        print(f"{last.parent}: done earlier")
    return last.is_file()


def check_finished(finished: bool, folder: Path) -> None:
    """Raise `UserError` if a run was stopped, so that nothing that needs it begins."""
    require(finished, f"{folder} stopped before its end: run the same command again to continue")


def command_of(experiment: str) -> str:
    """The command line that this process was started with."""
    return shlex.join(["python", "-m", f"experiments.{experiment}", *sys.argv[1:]])


def write_tables(workdir: Path, title: str, command: str, made: Sequence[Table], *notes: str) -> None:
    """Print the tables, and write them to report.md with the command and notes before them."""
    parts = [f"# {title}", f"`{command}`", *notes]
    text = "\n".join([*(line for part in parts for line in (part, "")), *map(tables.as_markdown, made)])
    (workdir / "report.md").write_text(text, encoding="utf-8")
    for table in made:
        Console().print(tables.as_rich(table))
