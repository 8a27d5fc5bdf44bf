"""Plans: every way to run a step that divides, the best of those that fit, and what is said of it."""

import dataclasses
import itertools

import pytest

from llm_jax.config import GATHERS, REMAT_POLICIES, DataConfig, LayerGroup, ModelConfig, TrainConfig
from llm_jax.errors import UserError
from llm_jax.models import presets
from llm_jax.parallel import costs, hardware, partitioning, plan
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel.costs import Workload
from llm_jax.parallel.partitioning import PartitioningConfig
from llm_jax.parallel.plan import Plan

SIXTEEN = hardware.target("a800x16")
SMALL = ModelConfig(
    vocab_size=512, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16, ffn_size=192
)
LARGE = dataclasses.replace(presets.get("llama2_70b"), compute_dtype="bfloat16")


def test_meshes_divide_the_model_and_hold_tensor_parallelism_within_hosts():
    found = [tuple(sizes.values()) for sizes in plan.meshes(SMALL, SIXTEEN)]
    assert set(found) == {
        *((1, 16, 1), (2, 8, 1)),  # a group of devices is a host at least
        *((1, 8, 2), (2, 4, 2)),
        *((1, 4, 4), (2, 2, 4)),  # 8 would not divide the 4 heads
    }


def test_choices_are_all_combinations_whose_batch_divides():
    found = list(plan.choices(SMALL, SIXTEEN, Workload(rows=16, length=64)))
    executions = {(choice.groups[0].gather, choice.groups[0].remat) for choice in found}
    assert executions == set(itertools.product(GATHERS, REMAT_POLICIES))
    for choice in found:
        shares = choice.sizes["replica"] * choice.sizes["data"]
        assert 16 % (shares * choice.microbatches) == 0
        assert (choice.sizes["replica"] > 1) == (choice.groups[0].gather == "group")
        assert choice.tables == choice.groups[0].gather
    assert {choice.microbatches for choice in found} == {1, 2, 4}  # 16 rows over at least 4 devices


def test_the_best_fits_and_no_other_that_fits_is_faster():
    found = list(plan.choices(LARGE, hardware.target("a800x256"), Workload(1024, 4096)))
    best = plan.best(found, 3)
    fitting = [choice.estimate.bounds.halfway for choice in found if choice.estimate.bytes <= 0.75 * 85e9]
    assert best[0].estimate.fits
    assert best[0].estimate.bounds.halfway <= min(fitting) * 1.005
    assert len(fitting) < len(found)  # others do not fit
    assert [choice.estimate.fits for choice in best] == [True] * 3


def test_a_model_that_is_too_large_is_refused_with_what_it_needs():
    target = hardware.target("a800x8")
    found = list(plan.choices(LARGE, target, Workload(64, 4096)))
    with pytest.raises(UserError, match=r"nothing fits a800x8: the least that a device needs is \d+\.\d GB .* more"):
        plan.check_fits(found, target)


def test_a_batch_that_divides_over_nothing_is_refused():
    found = list(plan.choices(SMALL, SIXTEEN, Workload(3, 64)))
    with pytest.raises(UserError, match=r"config\.data\.batch_size"):
        plan.check_fits(found, SIXTEEN)


def test_a_choice_applied_is_the_run_that_was_estimated():
    config = TrainConfig(model=SMALL, data=DataConfig(sequence_length=64, batch_size=16))
    choice = list(plan.choices(SMALL, SIXTEEN, plan.workload(config)))[-1]
    applied = choice.apply(config)
    again = costs.estimate(applied.model, choice.sizes, SIXTEEN, plan.workload(applied))
    assert again == choice.estimate
    assert mesh_lib.shape(applied.mesh, SIXTEEN.devices) == tuple(choice.sizes.values())
    assert applied.mesh.data == -1  # also with fewer hosts, as under a supervisor


def planned(model, target, rows, **execution):
    config = TrainConfig(model=dataclasses.replace(model, **execution), data=DataConfig(batch_size=rows))
    found = list(plan.choices(config.model, target, plan.workload(config)))
    sizes = {"replica": 1, "data": target.devices, "tensor": 1}
    estimate = costs.estimate(config.model, sizes, target, plan.workload(config))
    return Plan(config, target, sizes, estimate, plan.best(found, 4))


def test_the_verdict_on_what_does_not_fit_says_what_to_change():
    made = planned(LARGE, hardware.target("a800x512"), 1024)
    lines = plan.verdict(made)
    assert lines[0].startswith(f"Does not fit: {made.estimate.bytes / 1e9:.1f} GB a device, estimated, of 85 GB")
    assert made.alternatives[0].summary in lines[2]
    assert lines[2].startswith("Change: ")


def test_the_verdict_on_the_best_has_nothing_to_change():
    target = hardware.target("a800x256")
    first = planned(LARGE, target, 1024).alternatives[0]
    config = first.apply(TrainConfig(model=LARGE, data=DataConfig(batch_size=1024)))
    made = Plan(config, target, first.sizes, first.estimate, (first,))
    lines = plan.verdict(made)
    assert lines[0].startswith("Fits: ")
    assert lines[2] == "No other way to run it is better by its estimate."


def test_traffic_adds_up_by_kind_and_axes():
    made = planned(SMALL, SIXTEEN, 16, groups=(LayerGroup(1, "step"), LayerGroup(3, "layer")))
    rows = plan.traffic(made.estimate.collectives, SIXTEEN)
    assert set(rows) == {("all-gather", "data"), ("all-to-all", "data"), ("reduce-scatter", "data")}
    assert sum(seconds for _, _, seconds in rows.values()) == pytest.approx(made.estimate.bounds.collectives)


COMPARED = PartitioningConfig(models=("baichuan2_13b", "llama2_70b"), devices=(256, 4096))


@pytest.fixture(scope="module")
def cells():
    found = partitioning.compare(COMPARED)
    return {(cell.model, cell.devices, cell.cards, cell.tensor, cell.kind): cell for cell in found}


def test_every_way_is_compared_once(cells):
    assert len(cells) == 2 * 2 * 2 * 2 * 4


def test_each_way_is_what_its_name_says(cells):
    def gathers(kind):
        return [group.gather for group in cells["baichuan2_13b", 256, 8, 8, kind].choice.groups]

    assert gathers("ZeRO-1") == ["step"]
    assert gathers("ZeRO-3") == ["layer"]
    assert gathers("hierarchical") == ["group"]
    assert gathers("hybrid") == ["step", "layer"]


def test_hybrid_is_between_the_two_that_it_is_of(cells):
    """It keeps of the weights what fits, and so moves less than ZeRO-3 with the same microbatches."""
    hybrid, zero_3 = (cells["baichuan2_13b", 256, 8, 8, kind].choice for kind in ("hybrid", "ZeRO-3"))
    assert hybrid.microbatches == zero_3.microbatches
    assert hybrid.estimate.bounds.slow < zero_3.estimate.bounds.slow
    assert hybrid.estimate.fits


def test_why_there_is_no_way_is_said(cells):
    assert cells["llama2_70b", 256, 8, 1, "ZeRO-1"].reason.startswith("needs 1")
    assert cells["llama2_70b", 4096, 8, 1, "ZeRO-3"].reason == "does not divide"
    assert cells["llama2_70b", 4096, 8, 8, "ZeRO-3"].reason == ""


def test_hierarchy_pays_where_the_network_is_slow_and_a_whole_copy_does_not_fit(cells):
    def halfway(kind, tensor):
        return cells["llama2_70b", 256, 1, tensor, kind].choice.estimate.bounds.halfway

    others = [halfway("ZeRO-3", 1), halfway("hybrid", 1), *(halfway(kind, 8) for kind in partitioning.KINDS)]
    assert halfway("hierarchical", 1) < min(others)
