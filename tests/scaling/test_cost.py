"""The table of a sweep's cost against sums by hand, and the reports' grid that it is printed for."""

import dataclasses
import io

import pytest
from rich.console import Console

from configs.scaling_laws import baichuan2
from llm_jax.config import DataConfig, TrainConfig, from_config_dict
from llm_jax.errors import UserError
from llm_jax.models import presets
from llm_jax.scaling import cost, flops
from llm_jax.scaling.config import ScalingConfig
from llm_jax.scaling.trial import Trial


def trial(size="11m", steps=10, seed=0):
    model = presets.get(f"baichuan2_sweep_{size}")
    data = DataConfig(sequence_length=1024, batch_size=2)
    return Trial(f"{size}_{steps}_{seed}", size, TrainConfig(steps=steps, seed=seed, model=model, data=data))


def printed(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_trials_alike_are_one_row_and_every_trial_is_paid_for():
    trials = [trial(), trial(seed=1), trial(steps=20), trial("51m")]
    rows = cost.costs(trials)
    assert [(row.size, row.tokens, row.trials) for row in rows] == [
        ("11m", 20480, 2),
        ("11m", 40960, 1),
        ("51m", 20480, 1),
    ]
    paid = sum(flops.training_flops(t.config.model, 1024, t.tokens) for t in trials)
    assert sum(row.trials * row.compute for row in rows) == pytest.approx(paid)


def test_device_hours_at_the_stated_share_of_the_peak():
    assert cost.device_hours(3600 * 312e12, "A800", 1.0) == pytest.approx(1.0)
    assert cost.device_hours(3600 * 989e12, "H100", 0.5) == pytest.approx(2.0)


def test_the_table_shows_rows_and_their_sum():
    trials = [dataclasses.replace(trial(), size="small"), trial("3019m", steps=10**8)]
    text = printed(cost.table(trials, mfu=0.4, devices=["H100"]))
    compute = flops.training_flops(presets.get("baichuan2_sweep_3019m"), 1024, 2048 * 10**8)
    assert "small" in text and "3.02B" in text and "205B" in text and "40%" in text
    assert f"{cost.device_hours(compute, 'H100', 0.4):,.0f}" in text.splitlines()[-2]


def test_unknown_devices_and_impossible_shares_are_refused():
    with pytest.raises(UserError, match="did you mean 'H100'"):
        cost.table([trial()], mfu=0.4, devices=["H10O"])
    with pytest.raises(UserError, match=r"mfu=1\.2 must be in"):
        cost.table([trial()], mfu=1.2)


@pytest.mark.parametrize("predicted", ("7b", "13b"))
def test_the_reports_grid_predicts_a_model_far_above_its_sizes(predicted):
    config = from_config_dict(ScalingConfig, baichuan2.get_config(predicted))
    model = presets.get(f"baichuan2_{predicted}")
    assert config.prediction.compute == pytest.approx(flops.training_flops(model, 4096, 2.6e12), rel=1e-4)
    sweep = [presets.get(f"baichuan2_sweep_{size.name}") for size in config.grid.sizes]
    largest = max(flops.training_flops(model, 4096, tokens) for model in sweep for tokens in config.grid.tokens)
    assert len(sweep) == 7 and config.prediction.compute > 3 * largest
    for size, model in zip(config.grid.sizes, sweep, strict=True):
        own = {name: value for name, value in dataclasses.asdict(size).items() if name != "name"}
        assert dataclasses.replace(config.base.model, **own).architecture() == model.architecture()
