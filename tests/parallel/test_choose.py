"""Mixtures of two ways to execute layers: as many layers of the faster one as fit, and faster than any way alone."""

import dataclasses

import pytest

from llm_jax.config import DataConfig, TrainConfig
from llm_jax.errors import UserError
from llm_jax.models import presets
from llm_jax.parallel import choose, costs, hardware, plan
from llm_jax.parallel.costs import Workload

TARGET = hardware.target("a800x32")
WORK = Workload(1024, 4096)
MODEL = dataclasses.replace(presets.get("llama2_13b"), compute_dtype="bfloat16")


def tight(memory):
    """The target with less memory."""
    return dataclasses.replace(TARGET, hardware=dataclasses.replace(TARGET.hardware, memory=memory))


@pytest.fixture(scope="module")
def mixed():
    found = list(plan.choices(MODEL, TARGET, WORK))
    return found, choose.with_mixtures(found, MODEL, TARGET, WORK)


def test_a_mixture_is_better_than_every_way_alone(mixed):
    found, everything = mixed
    (best,), (alone,) = plan.best(everything, 1), plan.best(found, 1)
    assert len(best.groups) == 2 and best.estimate.fits
    assert best.estimate.bounds.halfway < alone.estimate.bounds.halfway


def test_one_more_layer_of_the_faster_way_would_not_fit(mixed):
    found, everything = mixed
    for choice in everything[len(found) :]:
        fast, slim = choice.groups
        assert fast.layers + slim.layers == MODEL.num_layers
        groups = (dataclasses.replace(fast, layers=fast.layers + 1),)
        if slim.layers > 1:
            groups += (dataclasses.replace(slim, layers=slim.layers - 1),)
        executed = dataclasses.replace(MODEL, groups=groups, gather_tables=choice.tables)
        part = dataclasses.replace(WORK, microbatches=choice.microbatches)
        assert not costs.estimate(executed, choice.sizes, TARGET, part).fits


def test_a_choice_is_a_run_of_the_same_model(mixed):
    (best,) = plan.best(mixed[1], 1)
    config = TrainConfig(model=MODEL, data=DataConfig(sequence_length=4096, batch_size=1024))
    assert best.apply(config).model.architecture() == MODEL.architecture()
    assert best.apply(config).model.groups == best.groups


def test_activations_leave_the_device_only_where_nothing_fits_without(mixed):
    assert not any(group.offload for choice in mixed[1] for group in choice.groups)
    least = min(choice.estimate.bytes for choice in mixed[0])
    target = tight((least - 2e8) / TARGET.hardware.usable)
    found = list(plan.choices(MODEL, target, WORK))
    assert not any(choice.estimate.fits for choice in found)
    everything = choose.with_mixtures(found, MODEL, target, WORK)
    (best,) = plan.best(everything, 1)
    assert any(group.offload for group in best.groups)
    # The host's link is counted, so that no layer goes there without need.
    whole = [choice for choice in everything[len(found) :] if len(choice.groups) == 1 and choice.estimate.fits]
    assert best.estimate.bounds.halfway <= min(choice.estimate.bounds.halfway for choice in whole)


def test_a_batch_that_fits_no_plan_is_said_to():
    target = tight(1e9)
    found = choose.with_mixtures(list(plan.choices(MODEL, target, WORK)), MODEL, target, WORK)
    with pytest.raises(UserError, match=r"nothing fits a800x32: the least that a device needs is .* GB"):
        plan.check_fits(found, target)
