"""Redundant copies of the last steps' states, so that a lost host costs the steps since, not a checkpoint's interval.

After a step every process writes the shards that it holds, and those that the process before it in the mesh holds,
to its own host's memory (or local disk). So any one host may be lost, or several that are no neighbours. What the
others have is brought together by whoever restarts the run (`llm_jax.parallel.agent`), and read here by pieces, onto
any mesh.

A copy is a folder STEP.ROUND with a file for each process: an uncompressed .npz, whose checksums NumPy verifies. Its
`contents` are JSON: the size of every array of the state, and of which array, and from where in it, each piece is.
"""

import concurrent.futures
import functools
import json
import logging
import math
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llm_jax import files
from llm_jax.parallel import distributed
from llm_jax.parallel.supervision import Assignment

logger = logging.getLogger(__name__)

KEPT = 2  # the process that writes last may lose its host before it has
Start = tuple[int, ...]


class Piece(NamedTuple):
    """A block of an array: of which, from where, and what."""

    array: str
    start: Start
    values: np.ndarray


class Copies:
    """The copies that this process keeps, and those that it may begin with."""

    def __init__(self, own: Assignment) -> None:
        self._own = own
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future[None] | None = None

    def due(self, step: int) -> bool:
        """Whether the state after this step is copied."""
        return bool(self._own.copy_every) and step % self._own.copy_every == 0

    def keep(self, state: Any, step: int) -> None:
        """Copy the shards of the state; they are written while training goes on. Every process must call this."""
        if self._writing is not None:  # before the exchange, so that every host has the copy before this one whole
            self._writing.result()
        pieces = list(_pieces(state, state, 0))
        if jax.process_count() > 1:
            pieces += list(_pieces(state, _from_neighbour(state), 1))
        sizes = {_name(path): x.size for path, x in jax.tree_util.tree_leaves_with_path(state)}
        self._writing = self._writer.submit(self._write, pieces, sizes, step)

    def _write(self, pieces: list[Piece], sizes: dict[str, int], step: int) -> None:
        folder = Path(self._own.copies)
        path = folder / f"{step}.{self._own.round}" / f"{self._own.process}.npz"
        contents = {"sizes": sizes, "pieces": [(p.array, p.start, p.values.shape, p.values.dtype.name) for p in pieces]}
        arrays: dict[str, Any] = {str(i): p.values.reshape(-1).view(np.uint8) for i, p in enumerate(pieces)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as partial, partial.open("wb") as file:
                np.savez(file, contents=np.array(json.dumps(contents)), **arrays)
        except OSError as error:
            logger.warning("no copy of step %d is kept in %s: %s", step, folder, error.strerror)
        for old in sorted(folder.glob("*.*"), key=_step)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def newest_step(self) -> int:
        """The last step of which the hosts had a whole copy together when the run was started again; -1 for none."""
        folders = sorted(Path(self._own.rescued).glob("*.*"), key=_step, reverse=True)
        found = next((_step(folder)[0] for folder in folders if _is_whole(folder)), -1)
        return min(map(int, distributed.exchange("copies", str(found))))

    def restore(self, abstract: Any, step: int) -> Any:
        """The state at `step` in the layout of `abstract`; None, with a warning, if some process cannot read it."""
        result, problem = None, ""
        try:
            folder = next(f for f in Path(self._own.rescued).glob(f"{step}.*") if _is_whole(f))
            available = _read(folder)
            result = jax.tree_util.tree_map_with_path(lambda path, x: _assemble(_name(path), x, available), abstract)
        except (OSError, ValueError, KeyError, StopIteration, zipfile.BadZipFile) as error:
            problem = f"{distributed.name_of(jax.process_index())}: {error}"
        problems = list(filter(None, distributed.exchange("copies", problem)))
        if problems:
            logger.warning("the copies of step %d cannot be read (%s)", step, problems[0])
        return None if problems else result

    def forget(self) -> None:
        """Drop this host's copies: the run goes on from another state than theirs."""
        shutil.rmtree(self._own.copies, ignore_errors=True)


def _step(folder: Path) -> tuple[int, int]:
    """Of which step, and of which round, a copy is."""
    step, _, number = folder.name.partition(".")
    return int(step), int(number)


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _pieces(state: Any, held: Any, distance: int) -> Iterator[Piece]:
    """What this process has of each distinct block of a state's arrays; `held` are they, moved on by `distance`."""
    for (path, x), moved in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(held)):
        indices = x.sharding.devices_indices_map(x.shape)
        first = {_start(index): device for device, index in reversed(list(indices.items()))}  # of equal ones
        before = _moves(x.sharding.mesh, -distance) if distance else {}
        for shard in moved.addressable_shards:
            source = before.get(shard.device, shard.device)
            start = _start(indices[source])
            if first[start] == source:
                yield Piece(_name(path), start, np.array(shard.data))  # a copy: the step takes the buffer


def _start(index: tuple[slice, ...]) -> Start:
    return tuple(part.start or 0 for part in index)


def _moves(mesh: Mesh, distance: int) -> dict[jax.Device, jax.Device]:
    """For every device the one with its place on the host that is so many further along the mesh."""
    hosts: dict[int, list[jax.Device]] = {}
    for device in mesh.devices.ravel():
        hosts.setdefault(device.process_index, []).append(device)
    rows = list(hosts.values())
    return {
        device: rows[(i + distance) % len(rows)][place]
        for i, row in enumerate(rows)
        for place, device in enumerate(row)
    }


def _from_neighbour(state: Any) -> Any:
    """The state with every shard moved to the next host."""
    leaves, structure = jax.tree.flatten(jax.block_until_ready(state))
    return jax.tree.unflatten(structure, jax.block_until_ready(_shift(tuple(x.sharding for x in leaves))(leaves)))


@functools.lru_cache
def _shift(shardings: tuple[NamedSharding, ...]) -> Any:
    mesh: Any = shardings[0].mesh  # of devices
    place = {device: i for i, device in enumerate(mesh.devices.ravel())}
    pairs = [(place[source], place[target]) for source, target in _moves(mesh, 1).items()]
    specs = [sharding.spec for sharding in shardings]

    def shift(leaves: list[jax.Array]) -> list[jax.Array]:
        return [jax.lax.ppermute(x, mesh.axis_names, pairs) for x in leaves]

    return jax.jit(jax.shard_map(shift, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False))


def _is_whole(folder: Path) -> bool:
    """Whether the pieces in a folder are all of the state."""
    sizes: dict[str, int] = {}
    covered: dict[str, dict[Start, int]] = {}
    for path in folder.glob("*.npz"):
        contents = _contents(path)
        sizes |= contents["sizes"]
        for name, start, shape, _ in contents["pieces"]:
            covered.setdefault(name, {})[tuple(start)] = math.prod(shape)
    return bool(sizes) and all(sum(covered.get(name, {}).values()) == size for name, size in sizes.items())


def _contents(path: Path) -> Any:
    try:
        with np.load(path) as file:
            return json.loads(str(file["contents"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {"sizes": {}, "pieces": []}


Available = dict[str, dict[Start, tuple[Path, str, tuple[int, ...], str]]]


def _read(folder: Path) -> Available:
    """Where the pieces of every array are: the file, the name in it, the piece's shape and dtype."""
    available: Available = {}
    for path in sorted(folder.glob("*.npz")):
        for i, (name, start, shape, dtype) in enumerate(_contents(path)["pieces"]):
            available.setdefault(name, {})[tuple(start)] = path, str(i), tuple(shape), dtype
    return available


def _assemble(name: str, wanted: jax.ShapeDtypeStruct, available: Available) -> jax.Array:
    """An array from its pieces; of those that no device of this process needs nothing is read."""

    @functools.cache
    def load(start: Start) -> np.ndarray:
        path, key, shape, dtype = available[name][start]
        with np.load(path) as file:
            return file[key].view(dtype).reshape(shape)

    def block(index: Any) -> np.ndarray:  # a slice for each dimension
        bounds = [part.indices(size)[:2] for part, size in zip(index, wanted.shape)]
        result = np.empty([stop - start for start, stop in bounds], wanted.dtype)
        for start, (_, _, shape, _) in available[name].items():
            common = [(max(a, s), min(b, s + n)) for (a, b), s, n in zip(bounds, start, shape)]
            if all(low < high for low, high in common):
                here = tuple(slice(low - a, high - a) for (low, high), (a, _) in zip(common, bounds))
                there = tuple(slice(low - s, high - s) for (low, high), s in zip(common, start))
                result[here] = load(start)[there]
        return result

    return jax.make_array_from_callback(wanted.shape, wanted.sharding, block)
