"""Copies of a state: whole from any file that is needed, onto any mesh, and nothing that is incomplete or damaged."""

import dataclasses
import shutil
import time

import jax
import numpy as np
import pytest

from llm_jax.parallel.supervision import Assignment
from llm_jax.training import copies, state
from tests.training.test_checkpoint import MODEL, OPTIMIZER, mesh_of


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Copies of two steps, of a state over eight devices, and the state."""
    folder = tmp_path_factory.mktemp("copies")
    own = Assignment(3, 0, 1, 1, "", str(folder / "own"), str(folder / "rescued"), copy_every=5)
    fresh = state.init_state(MODEL, OPTIMIZER, mesh_of(1, 2, 4), jax.random.key(0))
    writer = copies.Copies(own)
    for step in (5, 10, 15):
        writer.keep(fresh._replace(step=fresh.step + step), step)
    writer._writing.result()
    return own, jax.device_get(fresh)


def rescued(own, tmp_path):
    folder = shutil.copytree(own.copies, tmp_path / "rescued")
    return copies.Copies(dataclasses.replace(own, rescued=str(folder))), folder


def test_the_last_two_are_kept_and_due_steps_are_known(kept):
    own, _ = kept
    assert sorted(path.name for path in (copies.Path(own.copies)).iterdir()) == ["10.3", "15.3"]
    assert [step for step in range(1, 16) if copies.Copies(own).due(step)] == [5, 10, 15]
    assert not copies.Copies(dataclasses.replace(own, copy_every=0)).due(5)


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 8, 1), (1, 1, 1)], ids=str)
def test_restored_onto_any_mesh(kept, tmp_path, sizes):
    own, want = kept
    reader, _ = rescued(own, tmp_path)
    assert reader.newest_step() == 15
    got = reader.restore(state.abstract_state(MODEL, OPTIMIZER, mesh_of(*sizes)), 15)
    assert int(got.step) == 15
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got._replace(step=want.step)), want)


def test_an_incomplete_copy_is_none(kept, tmp_path, monkeypatch):
    """A piece that no host has, and a file that was cut short."""
    own, _ = kept
    reader, folder = rescued(own, tmp_path)
    whole = copies._contents
    monkeypatch.setattr(copies, "_contents", lambda path: _without_a_piece(whole(path), path.parent.name == "15.3"))
    assert reader.newest_step() == 10
    path = folder / "10.3/0.npz"
    path.write_bytes(path.read_bytes()[:-1000])
    assert reader.newest_step() == -1


def _without_a_piece(contents, missing):
    return {**contents, "pieces": contents["pieces"][1:]} if missing else contents


def test_a_damaged_copy_is_left_alone(kept, tmp_path, caplog):
    own, _ = kept
    reader, folder = rescued(own, tmp_path)
    path = folder / "15.3/0.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert reader.restore(state.abstract_state(MODEL, OPTIMIZER, mesh_of(1, 1, 1)), 15) is None
    assert "the copies of step 15 cannot be read" in caplog.text


def test_a_disk_that_is_full_costs_the_copy_alone(kept, caplog):
    own, want = kept
    writer = copies.Copies(dataclasses.replace(own, copies="/dev/null/nowhere"))
    writer.keep(jax.tree.map(jax.numpy.asarray, jax.device_put(want, mesh_sharding())), 20)
    writer._writing.result()
    assert "no copy of step 20 is kept in /dev/null/nowhere: Not a directory" in caplog.text


def test_hosts_exchange_shards_only_when_the_copy_before_is_whole(kept, monkeypatch):
    """Otherwise one that is lost while another is ahead of it may leave no step of which all have a copy."""
    own, want = kept
    writer = copies.Copies(dataclasses.replace(own, copies=f"{own.copies}-slow"))
    placed = jax.tree.map(jax.numpy.asarray, jax.device_put(want, mesh_sharding()))
    monkeypatch.setattr(writer, "_write", lambda *copy: time.sleep(0.5))
    writer.keep(placed, 5)
    exchanged = []
    monkeypatch.setattr(copies.jax, "process_count", lambda: 2)
    monkeypatch.setattr(copies, "_from_neighbour", lambda state: exchanged.append(writer._writing.done()) or state)
    writer.keep(placed, 10)
    assert exchanged == [True]


def mesh_sharding():
    return jax.sharding.NamedSharding(mesh_of(1, 1, 1), jax.sharding.PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int
    id: int


def test_copies_go_to_the_next_host():
    devices = [Device(host, 10 * host + place) for host in (2, 0, 1) for place in range(2)]  # a mesh's own order

    class Mesh:
        pass

    mesh = Mesh()
    mesh.devices = np.array(devices).reshape(1, 3, 2)
    moves = {source.id: target.id for source, target in copies._moves(mesh, 1).items()}
    assert moves == {20: 0, 21: 1, 0: 10, 1: 11, 10: 20, 11: 21}
    back = copies._moves(mesh, -1)
    assert all(back[target] == source for source, target in copies._moves(mesh, 1).items())
