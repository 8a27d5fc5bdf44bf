"""Which implementation of a kernel runs: what each may look at to refuse, the order of preference, and the log line.

Attention and decoding share this; each has its own table of implementations.

The line that says what was chosen goes to standard error, in notebooks and scripts as in experiments, because it may
say that a program runs slower than it could. `logging.getLogger("llm_jax.kernels.choice").setLevel("WARNING")` turns it
off.
"""

import dataclasses
import difflib
import importlib
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from llm_jax.errors import UserError, require
from llm_jax.kernels.mask import AttentionMask


class _ToStandardError(logging.Handler):
    """Plain lines to what is standard error when they are written, which notebooks and tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)
logger.addHandler(_ToStandardError())
logger.propagate = False  # a program that shows the library's messages would show these twice
_announced: set[tuple[str, str, str]] = set()

# Parts of the names of GPUs that JAX's Triton compiler refuses: those before Ampere, and other makers'.
WITHOUT_TRITON = ("Tesla", "T4", "GeForce GTX", "GeForce RTX 20", "Quadro", "TITAN", "AMD", "Radeon", "Instinct")


class Problem(NamedTuple):
    """What an implementation may look at to say whether it can serve: everything static."""

    platform: str  # "cpu", "gpu" or "tpu"
    device_kind: str  # such as "NVIDIA A100-SXM4-80GB" or "TPU v5p"
    dtype: str  # of queries, and of keys and values too unless `cache_dtype` says otherwise
    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    features: tuple[str, ...]  # names of the mask's fields that are in use
    static_window: int | None = None  # the window, if it is a plain number and not an array
    cache_dtype: str | None = None  # in decoding: of the keys and values in the cache


class Implementation(NamedTuple):
    """A kernel: `run(q, k, v, mask)`, and `refuses(problem)`, the reason why it cannot serve or None."""

    run: Callable[..., jax.Array]
    refuses: Callable[[Problem], str | None]


def refuses_gpu(device_kind: str) -> str | None:
    """Why a kernel written for Triton cannot run on a GPU of this name, or None."""
    if any(name in device_kind for name in WITHOUT_TRITON):
        return f"it runs on NVIDIA GPUs from Ampere on (A100, RTX 30), not on {device_kind}"
    return None


def unsupported(dtype: str, head_dim: int, dtypes: Sequence[str], head_dims: Sequence[int]) -> str | None:
    """Why a kernel that is made for these dtypes and head dims cannot serve a call, or None."""
    if dtype not in dtypes:
        return f"its dtypes are {', '.join(dtypes)}, not {dtype}"
    if head_dim not in head_dims:
        return f"its head dims are {', '.join(map(str, head_dims))}, not {head_dim}"
    return None


def check_supported(name: str, arrays: Sequence[jax.Array], dtypes: Sequence[str], head_dims: Sequence[int]) -> None:
    """For a kernel that is called directly: raise `UserError` unless it serves these queries, keys and values.

    Args:
      name: of the kernel, for the message.
      arrays: queries, keys and values, their last axis the head dim.
      dtypes: those that the kernel serves; all arrays must have the same.
      head_dims: those that it serves.
    """
    reason = unsupported(str(arrays[0].dtype), arrays[0].shape[-1], dtypes, head_dims)
    require(reason is None, f"attention: {name} cannot serve this call: {reason}")
    found = [str(array.dtype) for array in arrays]
    require(len(set(found)) == 1, f"attention: queries, keys and values are {', '.join(found)}: cast them to one dtype")


def never(problem: Problem) -> str | None:
    """Of an implementation that serves every problem."""
    return None


def device() -> tuple[str, str]:
    """Platform and kind of the devices that a computation is taken to run on.

    They are those that the mesh in context is made of, absent ones too; without a mesh what `jax.default_device` says,
    and else the first of this process. Where the arguments lie cannot be known inside of `jax.jit`: a program for the
    CPU of a machine with an accelerator needs one of the first two, or an implementation asked for by name.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.platform, described.device_kind
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    first = default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    return first.platform, first.device_kind


def used_features(mask: AttentionMask) -> tuple[str, ...]:
    """The names of the mask's fields that are in use."""
    values = {field.name: getattr(mask, field.name) for field in dataclasses.fields(mask)}
    return tuple(name for name, value in values.items() if value is not None and value is not False)


def on_platform(platform: str, module: str, run: str) -> Implementation:
    """The implementation that `module` offers for one platform, not imported before it is looked at there.

    The compilers' Python parts take a second to import, and need not be importable where they have no use.
    """

    def run_lazily(*arguments: Any) -> jax.Array:
        result: jax.Array = getattr(importlib.import_module(module), run)(*arguments)
        return result

    def refuses(problem: Problem) -> str | None:
        if problem.platform != platform:
            return f"it runs on {platform}, and the devices here are {problem.platform}"
        reason: str | None = importlib.import_module(module).refuses(problem)
        return reason

    return Implementation(run_lazily, refuses)


def choose(
    task: str,
    table: Mapping[str, Implementation],
    problem: Problem,
    asked: str,
    preferred: Sequence[str],
    otherwise: tuple[str, str],
) -> tuple[str, str]:
    """The name of the implementation to run, and why; the choice is logged once.

    Args:
      task: what the table's implementations do, for messages.
      table: the implementations by name.
      problem: what is to be served.
      asked: a name in the table, or "auto".
      preferred: names that "auto" tries, in this order.
      otherwise: the name that "auto" takes when all of those refuse, and the reason that speaks for it.

    Raises `UserError` if the name asked for does not exist or cannot serve.
    """
    name, reason = _chosen(task, table, problem, asked, preferred, otherwise)
    announce(task, name, reason)
    return name, reason


def _chosen(
    task: str,
    table: Mapping[str, Implementation],
    problem: Problem,
    asked: str,
    preferred: Sequence[str],
    otherwise: tuple[str, str],
) -> tuple[str, str]:
    if asked != "auto":
        _check_name(task, table, asked)
        refusal = table[asked].refuses(problem)
        require(refusal is None, f"{task} implementation {asked!r} cannot serve: {refusal}")
        return asked, "asked for by name"
    passed_over: list[str] = []
    for name in preferred:
        refusal = table[name].refuses(problem)
        if refusal is None:
            return name, "; ".join([f"the first on {problem.platform} that serves", *passed_over])
        passed_over.append(f"not {name}: {refusal}")
    name, reason = otherwise
    return name, "; ".join([reason, *passed_over])


def _check_name(task: str, table: Mapping[str, Implementation], asked: str) -> None:
    if asked not in table:
        known = ("auto", *table)
        near = difflib.get_close_matches(asked, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{task} implementation {asked!r} is not one of {', '.join(known)}{hint}")


def announce(task: str, name: str, reason: str) -> None:
    """Log a choice, once: the same one for other sizes, which the reason may tell, is not news."""
    kind = task, name, re.sub(r"\d+", "", reason)
    if kind not in _announced:
        _announced.add(kind)
        logger.info("%s: %s (%s)", task, name, reason)
