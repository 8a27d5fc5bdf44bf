"""What every experiment shares: flags, the config, one-line errors and `--help`.

An experiment is a module with `run(config, workdir)` and, at its end,

    if __name__ == "__main__":
        runner.main(run, TrainConfig, "configs/pretrain/demo.py")

`--config` names a Python file with `get_config()` or `get_config(arg)`, or a `config.json` that an earlier run saved.
A Python config is a program: only the file named on the command line is executed. A saved one is data.
"""

import dataclasses
import difflib
import errno
import importlib.util
import inspect
import logging
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import absl.logging
from absl import flags
from ml_collections import config_flags

from llm_jax import config as config_lib
from llm_jax.config import Config
from llm_jax.errors import UserError, require
from llm_jax.host_memory import keep_freed_memory
from llm_jax.parallel import job as jobs
from llm_jax.parallel import supervision

REPOSITORY = Path(__file__).resolve().parent.parent
HELP_FLAGS = ("-h", "-help", "--help", "-helpfull", "--helpfull")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
# Experiments that all processes of a job run together; of any other, the first process does the work.
TOGETHER = ("pretrain", "sft", "reward_model", "dpo", "ppo")
# Experiments that use JAX beside much else: what they free goes back to the system.
VARIED = ("prepare_data", "planted_truth", "corpus_ablation")
JOB_FLAGS = {
    "coordinator": (jobs.COORDINATOR, "HOST:PORT of process 0, with a free port"),
    "processes": (jobs.COUNT, "how many processes the job has"),
    "process": (jobs.INDEX, "which of them this is, from 0"),
    "topology": (jobs.TOPOLOGY, "a file with a line `host switch pod` for each host, along which they are numbered"),
}
JOB_HELP = (
    "  --coordinator, --processes, --process  HOST:PORT of process 0, how many processes run this together, and which\n"
    "             this is; not needed under srun, under Open MPI's mpirun or on a TPU slice\n"
    "  --topology  a file with a line `host switch pod` for each host: processes are numbered along the network"
)


def main(
    run: Callable[[Config, Path], object],
    config_class: type[Config],
    default_config: str,
    *,
    workdir: str = "",
    save_config: bool = True,
    argv: Sequence[str] | None = None,
) -> None:
    """Run an experiment from the command line, and exit with one line and a non-zero status if it fails.

    Args:
        run: the experiment; it gets the resolved config and the folder to write to.
        config_class: the dataclass that the config is turned into.
        default_config: the config file used without `--config`, relative to the repository.
        workdir: the default of `--workdir`; "" means `runs/NAME` with the experiment's name.
        save_config: write the resolved config to `workdir/config.json` before running. An experiment that must look
            at an earlier run's config first passes False and saves its own.
        argv: the command line with the program's name first; None = `sys.argv`.

    Exit status: 1 after a user's mistake or a full disk, 130 after Ctrl-C.
    """
    arguments = list(sys.argv if argv is None else argv)
    _set_up_logging()
    try:
        name = _experiment_name(run)
        workdir = workdir or f"runs/{name}"
        if any(argument in HELP_FLAGS for argument in arguments[1:]):
            full = any(argument.endswith("helpfull") for argument in arguments[1:])
            print(_help(run, name, config_class, default_config, workdir, full))
            return
        config, folder = parse(arguments, config_class, default_config, workdir)
        job = jobs.find(os.environ)
        first = job is None or job.index == 0
        if job is not None and name not in TOGETHER:
            if not first:
                return
            os.environ[jobs.ALONE] = "1"
            print(f"{name} runs in one process: in this one, the first of {job.count}", file=sys.stderr)
        if save_config and first:
            save_in(config, folder / "config.json")
        supervision.signs()
        prepare_jax(keep_memory=name not in VARIED)
        run(config, folder)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        message = describe(error)
        if message is None and not _is_joined():
            raise
        if message is None:
            traceback.print_exc()
        _fail(message or f"{type(error).__name__}: {_one_line(error)}", 1)


def prepare_jax(keep_memory: bool = True) -> None:
    """Let an experiment that uses JAX start sooner when it is run again, and step without page faults on a CPU."""
    jax = sys.modules.get("jax")
    if jax is None:
        return
    if keep_memory:
        keep_freed_memory()
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "llm_jax" / "jax"))
        # By default JAX keeps only what took a second to compile, which small models' programs do not.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def parse(
    argv: Sequence[str], config_class: type[Config], default_config: str, default_workdir: str
) -> tuple[Config, Path]:
    """The resolved config and the workdir that a command line asks for; `UserError` where it makes no sense."""
    named, rest = _take_config_flag(argv)
    full = load_config(named or default_config, config_class)
    _check_override_keys(rest, config_class)
    values = flags.FlagValues()
    values.append_flag_values(flags.FLAGS)  # the experiment's own flags
    flags.DEFINE_string("workdir", default_workdir, "folder to write to", flag_values=values)
    for flag, (_, text) in JOB_FLAGS.items():
        flags.DEFINE_string(flag, None, text, flag_values=values)
    try:
        config_flags.DEFINE_config_dict("config", config_lib.to_config_dict(full), flag_values=values, sys_argv=rest)
        positional = values(rest)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error.flagname, list(values))) from None
    except flags.IllegalFlagValueError as error:
        raise UserError(_wrong_value(error, config_class)) from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"cannot read the command line: {_one_line(error)}") from None
    require(not positional, f"unexpected argument {positional[0] if positional else ''!r}: flags start with --")
    flags.FLAGS.mark_as_parsed()
    given = {variable: str(values[flag].value) for flag, (variable, _) in JOB_FLAGS.items() if values[flag].value}
    os.environ.update(given)
    require(bool(values["workdir"].value), "--workdir is empty; name the folder to write to")
    folder = Path(str(values["workdir"].value))
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    require(
        existing.is_dir() or not existing.exists(),
        f"--workdir={folder}: {existing} is a file, no folder; choose another --workdir",
    )
    require(
        os.access(existing, os.W_OK), f"--workdir={folder}: {existing} cannot be written to; choose another --workdir"
    )
    resolved: Any = values["config"].value
    return config_lib.from_config_dict(config_class, resolved), folder


def load_config(name: str, config_class: type[Config]) -> Config:
    """The config of `FILE.py`, `FILE.py:ARGUMENT` or `FILE.json`, looked for here and then in the repository."""
    file_name, _, argument = name.partition(":")
    path = next((p for p in (Path(file_name), REPOSITORY / file_name) if p.is_file()), None)
    if path is None:
        raise UserError(f"no config file {file_name!r}{_nearest_config(file_name)}")
    if path.suffix == ".json":
        return config_lib.load(config_class, path)
    return config_lib.from_config_dict(config_class, _execute_config(path, argument))


def describe(error: BaseException) -> str | None:
    """One line for an error that is the user's to solve, or None for a defect, which deserves its traceback."""
    if isinstance(error, UserError):
        return _one_line(error)
    for cause in _chain(error):
        code = cause.errno if isinstance(cause, OSError) else None
        where = f" while writing {cause.filename}" if isinstance(cause, OSError) and cause.filename else ""
        if code in DISK_FULL or "No space left on device" in str(cause):
            return f"the disk is full{where}: free some space and run the same command again"
        if code in NOT_WRITABLE:
            return f"no permission{where}: choose another --workdir or change the folder's owner"
    return None


def _take_config_flag(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of the last `--config` ("" = none), and the command line without it."""
    value, rest, pending = "", [], False
    for argument in argv:
        flag, equals, inline = argument.partition("=")
        if pending:
            value, pending = argument, False
        elif flag in ("--config", "-config"):
            value, pending = inline, not equals
        else:
            rest.append(argument)
    require(not pending, "--config needs a file, for example --config=configs/pretrain/demo.py")
    return value, rest


def _execute_config(path: Path, argument: str) -> Mapping[str, Any]:
    """What `get_config` of a Python config file returns."""
    try:
        module = _load_module(path)
        get_config: Any = getattr(module, "get_config", None)
        require(callable(get_config), f"{path} has no function get_config()")
        arguments = [argument] if argument else []
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            wanted = "takes no argument" if argument else "needs an argument"
            raise UserError(f"{path} {wanted}: write --config={path}{'' if argument else ':ARGUMENT'}") from None
        return get_config(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}{_line_in(path, error)}: {type(error).__name__}: {_one_line(error)}") from None


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    require(spec is not None and spec.loader is not None, f"{path} is neither a Python file nor a saved config.json")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _line_in(path: Path, error: Exception) -> str:
    """ ", line N" of the config file, for the deepest frame inside it."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def save_in(config: Any, path: Path) -> None:
    """Save the config unless the folder belongs to another experiment, whose record would be lost."""
    if path.exists():
        try:
            config_lib.load(type(config), path)
        except UserError:
            raise UserError(f"{path.parent} holds another experiment's run: choose another --workdir") from None
    try:
        config_lib.save(config, path)
    except FileNotFoundError:  # such as in /proc
        raise UserError(f"no folder can be made at {path.parent}: choose another --workdir") from None


def _check_override_keys(argv: Sequence[str], config_class: type) -> None:
    """Refuse a `--config.KEY` that is no key of the config, naming the nearest one."""
    known = dict(config_lib.keys(config_class))
    free = [key for key, hint in known.items() if typing.get_origin(hint) is Mapping]
    for argument in argv[1:]:
        flag = argument.partition("=")[0].lstrip("-")
        key = flag.removeprefix("no").removeprefix("config.")
        if not argument.startswith("-") or not flag.removeprefix("no").startswith("config."):
            continue
        parent = next((f for f in free if key.startswith(f"{f}.")), None)
        if parent is not None:
            name = key.removeprefix(f"{parent}.")
            raise UserError(f"--config.{key}: set the whole table, as in --config.{parent}=\"{{'{name}': 1.0}}\"")
        if key not in known:
            raise UserError(config_lib.unknown_key(f"config.{key}", [f"config.{name}" for name in known]))


def _unknown_flag(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, [*known, "config", "help"], n=1)
    return f"unknown flag --{name}; " + (f"did you mean --{near[0]}?" if near else "--help lists the flags")


def _wrong_value(error: flags.IllegalFlagValueError, config_class: type) -> str:
    """Say which type a flag's value should have, instead of how its parser failed."""
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
    if match is None:
        return f"cannot read the command line: {_one_line(error)}"
    hint = dict(config_lib.keys(config_class))[match[1]]
    wanted = (
        "a table such as \"{'key': 1}\"" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))
    )
    return f"config.{match[1]} must be {wanted}, got {match[2]!r}"


def _nearest_config(name: str) -> str:
    known = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("configs/*/*.py")]
    near = difflib.get_close_matches(name, [path for path in known if not path.endswith("__init__.py")], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and everything that led to it."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _fail(message: str, status: int) -> typing.NoReturn:
    sys.stdout.flush()
    print(f"error: {message}" if status == 1 else message, file=sys.stderr, flush=True)
    if _is_joined():
        sys.modules["llm_jax.parallel.distributed"].share_failure(message)
        os._exit(status)  # an ordinary end would wait for the other processes
    sys.exit(status)


def _is_joined() -> bool:
    """Whether this process has joined others, which wait for it."""
    distributed = sys.modules.get("llm_jax.parallel.distributed")
    return distributed is not None and distributed.is_joined()


class _PlainFormatter(logging.Formatter):
    """The message alone; a warning or worse says so."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return prefix + super().format(record)


def _set_up_logging() -> None:
    """Our own messages as plain lines; of the libraries' only warnings, and nothing of Orbax's and Grain's."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("llm_jax").setLevel(logging.INFO)
    # What Orbax logs as an error, traceback and all, it also raises in the thread that waits for it.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable


def _unraisable(report: Any) -> None:
    """After a failed write Orbax's threads find their loop closed, which says nothing; anything else is shown."""
    if str(report.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(report)


def _experiment_name(run: Callable[..., object]) -> str:
    """`pretrain` for `python -m experiments.pretrain`, also where `run` lives in `__main__`."""
    module = sys.modules[run.__module__]
    spec = getattr(module, "__spec__", None)
    return spec.name.rpartition(".")[2] if spec else Path(inspect.getfile(run)).stem


def _help(
    run: Callable[..., object], name: str, config_class: type[Config], default_config: str, workdir: str, full: bool
) -> str:
    """The experiment's docstring, its flags, the keys of its config, and an example."""
    own = flags.FLAGS.get_flags_for_module(sys.modules[run.__module__])
    own = own or flags.FLAGS.get_flags_for_module(sys.argv[0])
    default = load_config(default_config, config_class)
    leaves = [(key, value) for key, value in _values(default) if not dataclasses.is_dataclass(value)]
    scalar = next((f"{key}={value}" for key, value in leaves if isinstance(value, int)), "KEY=VALUE")
    lines = [
        inspect.cleandoc(sys.modules[run.__module__].__doc__ or ""),
        "",
        f"Usage: python -m experiments.{name} [--config=FILE[:ARGUMENT]] [--workdir=FOLDER] [--config.KEY=VALUE ...]",
        f"  --config   a Python config file or a saved config.json; default {default_config}",
        f"  --workdir  the run's folder; default {workdir}",
        *(f"  --{flag.name}  {flag.help}" for flag in own),
        *([JOB_HELP] if name in TOGETHER else []),
        "  --config.KEY=VALUE  overrides one value of the config; keys, with their values in the default config:",
        *(f"      {key} = {value!r}" for key, value in leaves),
        "",
        f"Example: python -m experiments.{name} --config={default_config} --workdir={workdir} --config.{scalar}",
        *([flags.FLAGS.get_help()] if full else ["--helpfull also lists the flags of the libraries."]),
    ]
    return "\n".join(lines)


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield prefix + field.name, value
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{prefix}{field.name}.")
