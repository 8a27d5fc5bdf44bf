"""Reading a command line as its experiment would, without running it: for tests of commands in docs and demos."""

import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments import runner


def parse(argv: list[str]) -> tuple[Any, Path]:
    """The config and workdir that `python -m experiments.NAME ARGUMENTS` would run with; argv starts with the name.

    Raises what the command would fail with: ImportError for an unknown experiment, UserError for a wrong argument.
    """
    name, arguments = argv[0], argv[1:]
    if "--" in arguments:  # then comes a command of its own
        at = arguments.index("--")
        if arguments[at + 1 : at + 3] == ["python", "-m"]:
            parse(arguments[at + 3 :])
        arguments = arguments[:at]
    importlib.import_module(name)
    found: dict[str, Any] = {}

    def note(run: Any, config_class: Any, default_config: str, **options: Any) -> None:
        found.update(run=run, config_class=config_class, default=default_config, **options)

    original, before, environment = runner.main, sys.argv, dict(os.environ)
    known = set(flags.FLAGS)
    try:
        runner.main, sys.argv = note, [name]
        module = sys.modules.pop(name)  # run afresh, as python -m does; its own flags are defined a second time
        for flag in flags.FLAGS.get_flags_for_module(name):
            if flag.name in flags.FLAGS:  # another experiment may have had a flag of the same name
                delattr(flags.FLAGS, flag.name)
        runpy.run_module(name, run_name="__main__")
        default_workdir = found.get("workdir") or f"runs/{name.rpartition('.')[2]}"
        return runner.parse([name, *arguments], found["config_class"], found["default"], default_workdir)
    finally:
        runner.main, sys.argv = original, before
        os.environ.clear()
        os.environ.update(environment)
        sys.modules.setdefault(name, module)
        for flag in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, flag)
