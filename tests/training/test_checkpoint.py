"""Checkpoints: whole or absent, of this model or refused, restored onto any mesh."""

import dataclasses
import errno
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llm_jax import models
from llm_jax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig
from llm_jax.errors import UserError
from llm_jax.optim import adamw
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import checkpoint, state

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4, ffn_size=48, max_length=16
)
OPTIMIZER = adamw.build(OptimizerConfig(), adamw.decay_mask)


def mesh_of(*sizes):
    return mesh_lib.build(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def open_checkpointer(folder, model=MODEL, **changes):
    return checkpoint.Checkpointer(folder, CheckpointConfig(**changes), model, tokens_per_step=100)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fresh = state.init_state(MODEL, OPTIMIZER, mesh_of(1, 2, 4), jax.random.key(0))
    with open_checkpointer(folder) as checkpointer:
        checkpointer.save(fresh, 7)
    return folder, jax.device_get(fresh)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "run")


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 1, 1), (1, 8, 1)], ids=str)
def test_restores_bit_for_bit_onto_any_mesh(saved, sizes):
    folder, want = saved
    abstract = state.abstract_state(MODEL, OPTIMIZER, mesh_of(*sizes))
    with open_checkpointer(folder) as checkpointer:
        assert checkpointer.latest_step() == 7
        got = checkpointer.restore(abstract, 7)
    for path, leaf in jax.tree_util.tree_leaves_with_path(got):
        expected = dict(jax.tree_util.tree_leaves_with_path(want))[path]
        np.testing.assert_array_equal(jax.device_get(leaf), expected)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    assert all(
        leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        for leaf, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(shardings))
    )


def test_load_model_needs_no_run_config_and_shards(saved):
    folder, want = saved
    config, params, step = checkpoint.load_model(folder, mesh=mesh_of(1, 2, 4), compute_dtype="bfloat16")
    assert (config, step) == (dataclasses.replace(MODEL, compute_dtype="bfloat16"), 7)
    np.testing.assert_array_equal(params["head"]["kernel"], want.params["head"]["kernel"])
    assert len(params["head"]["kernel"].sharding.device_set) == 8


def test_another_model_is_refused_by_its_differences(saved):
    other = dataclasses.replace(MODEL, hidden_size=64, norm_head=True)
    abstract = state.abstract_state(other, OPTIMIZER, mesh_of(1, 1, 1))
    with (
        open_checkpointer(saved[0], other) as checkpointer,
        pytest.raises(UserError, match="of another model: hidden_size 32 instead of 64, norm_head False instead of"),
    ):
        checkpointer.restore(abstract, 7)


def test_missing_folder_and_missing_step(saved, tmp_path):
    with pytest.raises(UserError, match="no checkpoints in"):
        checkpoint.load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint of step 8; it has 7"):
        checkpoint.load_model(saved[0], step=8)


def test_a_damaged_checkpoint_is_one_line(copy):
    data = [path for path in (copy / "checkpoints/7/params").rglob("*") if path.is_file() and "/d/" in str(path)]
    assert data
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoint .*/7 cannot be read .* move that folder away") as caught:
        checkpoint.load_model(copy)
    assert "\n" not in str(caught.value)


def test_any_error_of_the_reader_is_one_line(copy, monkeypatch):
    """Data that is cut short in other places raises `Exception` itself."""

    def fail(*_, **__):
        raise Exception("one\ntwo")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
    with pytest.raises(UserError, match=r"checkpoint .*/7 cannot be read \(one\)"):
        checkpoint.load_model(copy)


def test_an_unfinished_checkpoint_is_not_seen(copy):
    unfinished = copy / "checkpoints/9.orbax-checkpoint-tmp-1"
    shutil.copytree(copy / "checkpoints/7", unfinished)
    assert checkpoint.load_model(copy)[2] == 7


def save_steps(folder, steps, **changes):
    fresh = state.init_state(MODEL, OPTIMIZER, mesh_of(1, 1, 1), jax.random.key(0))
    used = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape) if x.ndim else x, fresh.opt_state)
    fresh = fresh._replace(opt_state=used)  # zeros would leave little to damage
    with open_checkpointer(folder, **{"every_steps": 1, **changes}) as checkpointer:
        for step in steps:
            checkpointer.save(fresh._replace(step=jax.numpy.int32(step)), step)
            checkpointer.wait()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_keeps_the_last_ones_and_publishes_one_for_every_so_many_tokens(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"a model file")
    (tmp_path / "metrics.jsonl").write_text("{}")
    save_steps(tmp_path, range(1, 9), keep_last=2, keep_every_tokens=300)
    assert names_in(tmp_path / "checkpoints") == ["3", "6", "7", "8"]
    assert names_in(tmp_path / "published") == ["300", "600"]
    assert names_in(tmp_path / "published/600") == ["checkpoints", "tokenizer.model"]
    assert checkpoint.load_model(tmp_path / "published/300")[2] == 3
    save_steps(tmp_path, range(9, 14), keep_last=1, keep_every_tokens=300, keep_published=2)
    assert names_in(tmp_path / "checkpoints") == ["12", "13", "9"]
    assert names_in(tmp_path / "published") == ["1200", "900"]
    assert checkpoint.load_model(tmp_path / "published/1200")[2] == 12


@pytest.mark.parametrize("changed", [{"keep_every_tokens": 0}, {"keep_every_tokens": 10_000}, {"every_steps": 2}])
def test_what_is_published_stays_when_a_run_goes_on_with_other_settings(tmp_path, changed):
    save_steps(tmp_path, range(1, 5), keep_last=1, keep_every_tokens=300)
    settings = {"keep_last": 1, "keep_every_tokens": 300, **changed}
    save_steps(tmp_path, (5,), **settings)
    assert names_in(tmp_path / "published") == ["300"]
    assert checkpoint.load_model(tmp_path / "published/300")[2] == 3
    save_steps(tmp_path, (9,), **{**settings, "keep_every_tokens": 900, "every_steps": 1, "keep_published": 1})
    assert names_in(tmp_path / "published") == ["900"]  # that setting alone takes any away
    assert names_in(tmp_path / "checkpoints") == ["9"]


def test_the_first_checkpoint_after_a_number_of_tokens_is_published(tmp_path):
    """4M tokens a step do not divide 220 billion: no drift over a whole run."""
    publication = checkpoint.Publication(220 * 10**9, 4 * 2**20, 2000, keep=0, folder=tmp_path)
    steps = [step for step in range(2000, 640_000, 2000) if publication.tokens(step)]
    want = [-(-k * 220 * 10**9 // (4 * 2**20 * 2000)) * 2000 for k in range(1, 13)]
    assert steps[:12] == want
    assert [publication.tokens(step) // 10**9 for step in steps[:3]] == [220, 440, 660]
    assert publication.tokens(steps[0] + 1) == 0  # a run that was stopped there
    assert publication.kept(steps) == steps
    assert dataclasses.replace(publication, keep=2).kept(steps) == steps[-2:]


def flip_a_bit(folder, step, item="params"):
    """In the middle of the largest file of an item's data, which holds some array's values."""
    files = [path for path in (folder / "checkpoints" / str(step) / item).rglob("*") if "/d/" in str(path)]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(bytes(data))


def cut_short(folder, step, item="params"):
    for path in (folder / "checkpoints" / str(step) / item).rglob("*"):
        if "/d/" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short])
@pytest.mark.parametrize("item", ["params", "training"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, damage, item):
    save_steps(tmp_path, (1, 2, 3))
    damage(tmp_path, 3, item)
    abstract = state.abstract_state(MODEL, OPTIMIZER, mesh_of(1, 8, 1))
    with open_checkpointer(tmp_path) as checkpointer:
        restored, step = checkpointer.newest(lambda step: checkpointer.restore(abstract, step))
        assert (step, int(restored.step)) == (2, 2)
        assert checkpointer.latest_step() == 2
        checkpointer.save(restored._replace(step=jax.numpy.int32(3)), 3)  # the same step can be written again
        checkpointer.wait()
        assert int(checkpointer.restore(abstract, 3).step) == 3
    assert "checkpoints/3 " in caplog.text and f"moved to {tmp_path}/damaged" in caplog.text
    assert names_in(tmp_path / "damaged") == ["3"]


def test_without_a_good_one_before_it_a_damaged_checkpoint_stays_where_it_is(tmp_path):
    save_steps(tmp_path, (1, 2))
    for step in (1, 2):
        flip_a_bit(tmp_path, step)
    abstract = state.abstract_state(MODEL, OPTIMIZER, mesh_of(1, 1, 1))
    with (
        open_checkpointer(tmp_path) as checkpointer,
        pytest.raises(
            checkpoint.DamagedError, match=r"checkpoints/2 is damaged: params/.* changed since|cannot be read"
        ),
    ):
        checkpointer.newest(lambda step: checkpointer.restore(abstract, step))
    assert names_in(tmp_path / "checkpoints") == ["1", "2"] and not (tmp_path / "damaged").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, os.strerror(errno.EIO)), ValueError("INTERNAL: reading: [OS error 5: Input/output error]")],
)
def test_a_disk_that_does_not_read_for_a_moment_is_no_damage(tmp_path, monkeypatch, error):
    save_steps(tmp_path, (1, 2))
    abstract = state.abstract_state(MODEL, OPTIMIZER, mesh_of(1, 1, 1))

    def failing(*arguments, **named):
        raise error

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", failing)
    with (
        open_checkpointer(tmp_path) as checkpointer,
        pytest.raises(UserError, match=r"cannot be read now \(.*start again"),
    ):
        checkpointer.newest(lambda step: checkpointer.restore(abstract, step))
    assert names_in(tmp_path / "checkpoints") == ["1", "2"] and not (tmp_path / "damaged").exists()


def test_loading_a_model_takes_the_newest_that_is_whole(tmp_path, caplog):
    save_steps(tmp_path, (1, 2))
    flip_a_bit(tmp_path, 2)
    assert checkpoint.load_model(tmp_path)[2] == 1
    assert "taking the one before" in caplog.text
    with pytest.raises(UserError, match="checkpoints/2"):
        checkpoint.load_model(tmp_path, step=2)


def test_values_that_changed_on_the_way_are_named(saved, tmp_path, monkeypatch):
    """Storage that returns other values without an error."""
    whole = ocp.StandardCheckpointHandler.restore

    def wrong(*arguments, **named):
        tree = whole(*arguments, **named)
        if "head" in tree:
            tree["head"]["kernel"] = tree["head"]["kernel"].at[3, 5].multiply(1.0000002)
        return tree

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", wrong)
    with pytest.raises(UserError, match=r"checkpoints/7 is damaged: params/head/kernel changed since it was written"):
        checkpoint.load_model(saved[0])


def test_saving_copies_before_donation(tmp_path):
    """The step donates the state while the write is still under way."""
    fresh = state.init_state(MODEL, OPTIMIZER, mesh_of(1, 1, 1), jax.random.key(0))
    want = jax.device_get(fresh.params)
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(fresh, 1)
        jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(fresh)
    _, params, _ = checkpoint.load_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), want)
    assert models.count_parameters(MODEL) == sum(x.size for x in jax.tree.leaves(params))


def test_a_model_alone_is_loaded_like_any_other_and_can_begin_a_run(tmp_path, saved):
    """Bit for bit, onto another mesh; the optimiser begins where it does in a fresh run."""
    half = dataclasses.replace(MODEL, param_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype("bfloat16"), saved[1].params)
    checkpoint.save_model(tmp_path, half, params)
    config, loaded, step = checkpoint.load_model(tmp_path, mesh=mesh_of(1, 2, 4))
    assert (config, step) == (half, 0)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    abstract = state.abstract_state(MODEL, OPTIMIZER, mesh_of(1, 8, 1))
    with open_checkpointer(tmp_path) as checkpointer, open_checkpointer(saved[0]) as of_a_run:
        assert checkpointer.is_model_alone(0) and not of_a_run.is_model_alone(7)
        begun = state.state_of(checkpointer.restore_params(abstract, 0), OPTIMIZER, abstract)
    jax.tree.map(lambda got, want: np.testing.assert_array_equal(got, want.astype(np.float32)), begun.params, params)
    fresh = state.init_state(MODEL, OPTIMIZER, mesh_of(1, 8, 1), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, begun.opt_state, fresh.opt_state)
    assert jax.tree.map(lambda x: x.sharding, begun) == jax.tree.map(lambda x: x.sharding, abstract)
    other = dataclasses.replace(MODEL, norm_head=True)
    with (
        open_checkpointer(tmp_path, other) as checkpointer,
        pytest.raises(UserError, match="of another model: norm_head False instead of True"),
    ):
        checkpointer.restore_params(abstract, 0)
