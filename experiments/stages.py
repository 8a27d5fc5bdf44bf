"""Experiments in stages, whose runs may go side by side: what may be named, and what their folder was begun with."""

import dataclasses
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from llm_jax import config as config_lib
from llm_jax.alignment import finetune
from llm_jax.config import one_of
from llm_jax.errors import require


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
