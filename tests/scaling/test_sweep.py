"""Grids: which runs they mean, what is refused, and how the runs' folders are read back."""

import dataclasses
import itertools
import json
import math
import time

import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import models
from llm_jax.config import CheckpointConfig, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from llm_jax.data import identity, loader, records
from llm_jax.errors import UserError
from llm_jax.optim import schedules
from llm_jax.scaling import flops, learning_rate, sweep
from llm_jax.scaling.config import (
    GridConfig,
    LauncherConfig,
    LearningRateConfig,
    PredictionConfig,
    ScalingConfig,
    SizeConfig,
)
from tests.scaling import fake_runs

SMALL = SizeConfig(name="d16", hidden_size=16, num_layers=1, num_heads=2, ffn_size=32)
LARGE = SizeConfig(name="d32", hidden_size=32, num_layers=2, num_heads=4, ffn_size=64)
PER_STEP = 4 * 8


def make_config(**changes) -> ScalingConfig:
    model = ModelConfig(
        vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32, max_length=8
    )
    base = TrainConfig(
        model=model,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        data=DataConfig(sequence_length=8, batch_size=4),
    )
    config = ScalingConfig(
        base=base, warmup_fraction=0.1, curve_points=4, grid=GridConfig(sizes=(SMALL, LARGE), tokens=(640,))
    )
    grid = dataclasses.replace(config.grid, **changes.pop("grid", {}))
    return dataclasses.replace(config, grid=grid, **changes)


def expand(**changes):
    return sweep.expand(make_config(**changes))


def test_every_combination_is_a_run():
    grid = {"tokens": (640, 1280), "vary": ("optimizer.weight_decay=0.0,0.1", "model.norm_head=True"), "seeds": (0, 3)}
    trials, problems = expand(grid=grid)
    assert problems == []
    found = {(t.config.model.hidden_size, t.tokens, t.config.optimizer.weight_decay, t.config.seed) for t in trials}
    assert found == set(itertools.product((16, 32), (640, 1280), (0.0, 0.1), (0, 3)))
    assert len(trials) == len({t.name for t in trials}) == 16
    assert all(t.config.model.norm_head and t.config.data.seed == t.config.seed for t in trials)
    assert trials[0].name == "d16-640tokens-weight_decay=0.0-norm_head=True-s0"
    assert trials[0].varied == ("optimizer.weight_decay=0.0", "model.norm_head=True")


def test_a_trial_is_the_base_run_but_for_what_the_grid_says():
    trial = expand(grid={"seeds": (5,)})[0][1]
    base = make_config().base
    assert trial.config == dataclasses.replace(
        base,
        steps=20,
        seed=5,
        log_every=1,
        eval_every=5,
        model=dataclasses.replace(
            base.model, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, ffn_size=64
        ),
        optimizer=dataclasses.replace(base.optimizer, warmup_steps=2),
        data=dataclasses.replace(base.data, seed=5),
    )


def test_heads_of_a_size():
    model = make_config().base.model
    assert sweep.sized(model, SizeConfig(num_layers=3)) == dataclasses.replace(model, num_layers=3)
    grouped = sweep.sized(model, SizeConfig(hidden_size=96, num_heads=6, num_kv_heads=2, head_dim=32))
    assert (grouped.num_heads, grouped.num_kv_heads, grouped.head_dim) == (6, 2, 32)
    assert sweep.sized(model, SizeConfig(hidden_size=96, num_heads=6)).num_kv_heads == 6
    assert sweep.sized(model, SizeConfig(hidden_size=96)).head_dim == 48


def test_budgets_of_compute_and_of_tokens_per_parameter_become_tokens():
    trials, _ = expand(grid={"tokens": (), "compute": (1e9, 2.5e9), "tokens_per_parameter": (20.0,)})
    assert [t.name for t in trials[:3]] == ["d16-1e9-s0", "d16-2.5e9-s0", "d16-20x-s0"]
    for trial in trials:
        model = trial.config.model
        step_flops = flops.training_flops(model, 8, PER_STEP)
        if "x" in trial.name:
            assert abs(trial.tokens - 20 * models.count_parameters(model)) <= PER_STEP / 2
        else:
            budget = float(trial.name.split("-")[1])
            assert abs(flops.training_flops(model, 8, trial.tokens) - budget) <= step_flops / 2


@pytest.mark.parametrize("points", [1, 4, 7, 100])
def test_the_curve_has_the_points_asked_for_and_ends_at_the_end(points):
    trial = expand(curve_points=points, grid={"tokens": (640 * 5,)})[0][0]
    steps = sweep._evaluated(trial.config)
    assert steps[-1] == 100 and len(set(np.diff(steps[:-1]))) <= 1
    assert points * 0.8 <= len(steps) <= points


def test_only_the_first_seed_of_large_trials():
    limit = flops.training_flops(sweep.sized(make_config().base.model, LARGE), 8, 640) * 0.99
    trials, problems = expand(grid={"seeds": (2, 1), "seeds_up_to": limit})
    assert [(t.size, t.config.seed) for t in trials] == [("d16", 2), ("d16", 1), ("d32", 2)]
    assert problems == []


def test_trials_outside_the_limits_are_counted_and_left_out():
    per_parameter = 640 / models.count_parameters(sweep.sized(make_config().base.model, SMALL))
    trials, problems = expand(grid={"seeds": (0, 1), "least_tokens_per_parameter": per_parameter * 0.99})
    assert {t.size for t in trials} == {"d16"}
    assert len(problems) == 1 and problems[0].startswith("2 trials outside")
    trials, _ = expand(grid={"most_tokens_per_parameter": per_parameter * 0.99})
    assert {t.size for t in trials} == {"d32"}


def test_a_size_whose_heads_do_not_divide_is_one_line_and_the_rest_goes_on():
    bad = SizeConfig(name="d18", hidden_size=18, num_heads=4)
    trials, problems = expand(grid={"sizes": (bad, SMALL), "seeds": (0, 1), "vary": ("optimizer.b1=0.8,0.9",)})
    assert len(trials) == 4
    expected = "hidden_size=18 is not a multiple of num_heads=4: change one of them, or set head_dim"
    assert problems == [f"size d18 is left out: {expected}"]


def test_a_varied_value_that_is_refused_is_one_line_and_the_rest_goes_on():
    trials, problems = expand(grid={"vary": ("optimizer.weight_decay=-1.0,0.1",)})
    assert len(trials) == 2 and len(problems) == 2
    assert problems[0].startswith("size d16, optimizer.weight_decay=-1.0 is left out: ")


def test_duplicates_are_left_out():
    trials, problems = expand(grid={"tokens": (640, 641, 1280), "sizes": (SMALL, LARGE, SMALL)})
    assert len(trials) == 4
    assert "size d16 is listed twice: only the first one is trained" in problems
    assert "d16-641tokens-s0 is left out: it is the same run as d16-640tokens-s0" in problems
    trials, problems = expand(grid={"sizes": (SMALL, dataclasses.replace(SMALL, name="again"))})
    assert len(trials) == 1 and problems == ["again-640tokens-s0 is left out: it is the same run as d16-640tokens-s0"]


def test_too_few_tokens_for_a_step_or_its_warm_up_are_one_line_each():
    trials, problems = expand(grid={"tokens": (15, 640)})
    assert len(trials) == 2 and "less than a step of 32" in problems[0]
    trials, problems = expand(warmup_fraction=0.0, grid={"tokens": (640, 3200 * 32)})
    assert {t.tokens for t in trials} == {3200 * 32}
    assert "d16-640tokens is left out: OptimizerConfig.warmup_steps=2000 must be below the 20 steps" in problems[0]
    schedules.learning_rate(trials[0].config.optimizer, trials[0].config.steps)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"sizes": ()}, "the grid has no trials: set config.grid.sizes"),
        ({"tokens": ()}, "the grid has no trials: set config.grid.tokens"),
        ({"sizes": (SizeConfig(hidden_size=18, num_heads=4),)}, "the grid has no trials: size d18l0 is left out"),
        ({"vary": ("optimizer.weigth_decay=0.1",)}, "did you mean 'optimizer.weight_decay'"),
        ({"vary": ("weight_decay=0.1",)}, "did you mean 'optimizer.weight_decay'"),
        ({"vary": ("steps=10",)}, "steps follows from the grid"),
        ({"vary": ("optimizer.b1",)}, "should read KEY=VALUE,VALUE"),
        ({"vary": ("optimizer.b1=0.9", "optimizer.b1=0.8")}, "listed twice"),
        ({"vary": ("data.weights=x",)}, "config.data.weights must hold names with numbers, got 'x'"),
    ],
)
def test_grids_that_mean_nothing_are_refused(grid, message):
    with pytest.raises(UserError, match=message) as error:
        expand(grid=grid)
    assert "\n" not in str(error.value)


def test_batches_of_other_sizes_are_scored_on_as_much_text():
    base = dataclasses.replace(make_config().base, eval_batches=6)
    trials, problems = expand(base=base, grid={"sizes": (SMALL,), "vary": ("data.batch_size=2,4,8,16",)})
    held_out = [(t.config.data.batch_size, t.config.eval_batches) for t in trials]
    assert held_out == [(2, 12), (4, 6), (8, 3), (16, 2)]
    assert problems == [
        "size d16, data.batch_size=16 is scored on 256 tokens of held-out text instead of 192: choose "
        "config.base.eval_batches so that its batches divide them"
    ]
    trials, problems = expand(base=base, grid={"sizes": (SMALL,), "vary": ("eval_batches=5", "data.batch_size=2")})
    assert [t.config.eval_batches for t in trials] == [5] and problems == []


def test_names_are_safe_as_folders():
    size = dataclasses.replace(SMALL, name="../a b")
    trials, _ = expand(grid={"sizes": (size,), "vary": ("data.dataset=/x/y,/x_y",)})
    assert [t.name for t in trials] == ["_a_b-640tokens-dataset=_x_y-s0"]


def test_learning_rates_of_sizes():
    config = make_config(grid={"vary": ("optimizer.weight_decay=0.1",)})
    rates = [t.config.optimizer.learning_rate for t in sweep.expand(config, {"d32": 0.5})[0]]
    assert rates == [1e-2, 0.5]


# Trials in one compiled step


def test_groups_differ_in_seeds_and_rates_alone():
    grid = {"seeds": (0, 1, 2), "vary": ("optimizer.learning_rate=0.1,0.2", "optimizer.weight_decay=0.0,0.1")}
    trials, _ = expand(grid=grid)
    groups = sweep.together(trials, LauncherConfig())
    assert sorted(map(len, groups)) == [6, 6, 6, 6]
    for group in groups:
        assert len({(t.size, t.config.optimizer.weight_decay) for t in group}) == 1
        assert len({(t.config.seed, t.config.optimizer.learning_rate) for t in group}) == 6
    assert sorted(t.name for group in groups for t in group) == sorted(t.name for t in trials)


def test_groups_are_limited_and_even():
    trials, _ = expand(grid={"sizes": (SMALL,), "seeds": tuple(range(10))})
    assert [len(g) for g in sweep.together(trials, LauncherConfig(together=4))] == [3, 3, 4]
    assert [len(g) for g in sweep.together(trials, LauncherConfig(together=1))] == [1] * 10


def test_large_trials_train_alone():
    trials, _ = expand(grid={"seeds": (0, 1)})
    limit = flops.training_flops(trials[0].config.model, 8, 640)
    groups = sweep.together(trials, LauncherConfig(together_up_to=limit))
    assert [[t.size for t in group] for group in groups] == [["d16", "d16"], ["d32"], ["d32"]]


def test_trials_of_several_processes_or_devices_train_alone():
    trials, _ = expand(grid={"seeds": (0, 1)})
    assert len(sweep.together(trials, LauncherConfig(kind="slurm", nodes=2))) == 4
    assert len(sweep.together(trials, LauncherConfig(kind="processes", nodes=2))) == 2
    for mesh, launcher, groups in (
        (MeshConfig(tensor=2), LauncherConfig(), 4),
        (MeshConfig(), LauncherConfig(kind="processes", gpus_per_node=1), 2),
        (MeshConfig(), LauncherConfig(kind="processes", gpus_per_node=2), 4),
        (MeshConfig(data=1), LauncherConfig(kind="slurm", gpus_per_node=2), 2),
    ):
        base = dataclasses.replace(make_config().base, mesh=mesh)
        assert len(sweep.together(expand(base=base, grid={"seeds": (0, 1)})[0], launcher)) == groups


# Results


@pytest.fixture
def trained(tmp_path):
    trials, _ = expand(grid={"seeds": (0, 1), "vary": ("optimizer.b1=0.5",)})
    for trial in trials:
        config_lib.save(trial.config, tmp_path / trial.name / "config.json")
        fake_runs.train(trial.config, tmp_path / trial.name, 1)
    return trials, tmp_path


def metrics_of(trained):
    trials, folder = trained
    return trials[0], folder, folder / trials[0].name / "metrics.jsonl"


def test_a_result_is_what_the_run_wrote(trained):
    trials, folder = trained
    results, problems = sweep.collect(trials, folder)
    assert problems == [] and [r.name for r in results] == [t.name for t in trials]
    result = results[3]
    model = trials[3].config.model
    assert (result.size, result.seed, result.learning_rate, result.model) == ("d32", 1, 1e-2, model)
    assert result.loss == fake_runs.loss(trials[3].config)
    # 20 steps of 32 tokens, evaluated every 5.
    assert result.curve == tuple((n * PER_STEP, result.loss + 1 - n / 20) for n in (5, 10, 15, 20))
    assert (result.tokens, result.unique_tokens) == (640, 640)
    assert result.parameters == models.count_parameters(model)
    assert result.compute == flops.training_flops(model, 8, 640)
    assert result.varied == ("optimizer.b1=0.5",)


def test_what_decides_no_number_may_differ(trained):
    trial, folder, _ = metrics_of(trained)
    changed = dataclasses.replace(trial.config, log_every=3, checkpoint=CheckpointConfig(every_steps=7))
    assert sweep.result(dataclasses.replace(trial, config=changed), folder).loss > 0


def on_dataset(trial, dataset: str, weights=None):
    data = dataclasses.replace(trial.config.data, dataset=dataset, weights=weights or {})
    return dataclasses.replace(trial, config=dataclasses.replace(trial.config, data=data))


def write_dataset(folder, fingerprint: str = "of the corpus", **tokens: int) -> str:
    """A dataset without files of its own: `tokens` to train on from each source."""

    def source(count: int) -> records.SourceSummary:
        return records.SourceSummary("en", 0, records.SplitSummary(2, 3 * count, count), records.SplitSummary())

    folder.mkdir(exist_ok=True)
    summary = records.Summary(64, "tokenizer.model", "digest", fingerprint, {n: source(c) for n, c in tokens.items()})
    (folder / records.SUMMARY).write_text(json.dumps(dataclasses.asdict(summary)))
    return str(folder)


@pytest.mark.parametrize(
    ("weights", "unique"),
    [
        ({}, 450),  # all there is
        ({"books": 1.0}, 50),
        ({"books": 1.0, "web": 3.0}, 50 + 400),  # 160 of the books' 50, 480 of the web's 400
        ({"books": 1.0, "web": 15.0}, 40 + 400),
    ],
)
def test_tokens_read_more_than_once_are_counted_once(trained, weights, unique):
    trial, folder, path = metrics_of(trained)
    trial = on_dataset(trial, write_dataset(folder / "data", books=50, web=400), weights)
    config_lib.save(trial.config, path.parent / "config.json")
    results, problems = sweep.collect([trial], folder)
    assert (results[0].tokens, results[0].unique_tokens, problems) == (640, unique, [])


def test_a_dataset_that_is_gone_is_said_once(trained):
    trials, folder = trained
    results, problems = sweep.collect([on_dataset(trial, "/gone") for trial in trials], folder)
    assert [result.unique_tokens for result in results] == [640] * 4
    assert problems == ["no whole dataset at /gone: its trials count as if they read no text twice"]


def test_a_run_on_another_dataset_is_refused_wherever_the_datasets_lie(trained):
    trial, folder, path = metrics_of(trained)
    one, other = write_dataset(folder / "one", "1", a=900), write_dataset(folder / "other", "2", a=900)
    identity.write(loader.describe(DataConfig(dataset=one)), path.parent)
    moved = write_dataset(folder / "moved", "1", a=900)
    for dataset in (one, moved, "/gone"):
        assert sweep.result(on_dataset(trial, dataset), folder).loss > 0
    with pytest.raises(UserError, match=r"was trained on another dataset than .*/other: choose another --workdir"):
        sweep.result(on_dataset(trial, other), folder)
    time.sleep(0.01)
    write_dataset(folder / "moved", "2", a=900)  # written anew
    with pytest.raises(UserError, match=r"was trained on another dataset than .*/moved"):
        sweep.result(on_dataset(trial, moved), folder)
    drop_end(path)
    with pytest.raises(UserError, match="was trained on another dataset"):
        sweep.result(on_dataset(trial, other), folder)


def edit(path, change):
    path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in path.read_text().splitlines()))


def drop_end(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def drop_middle(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"heldout", "step": 10,' not in line))


def cut_short(path):
    path.write_text(path.read_text()[:-20])


def append(path, line):
    path.write_text(path.read_text() + line)


DAMAGE = {
    "the end is missing": (drop_end, "evaluations up to step 15 of 20"),
    "a point is missing": (drop_middle, "3 in all"),
    "cut short": (cut_short, "lines that are no records"),
    "diverged": (lambda path: append(path, '{"kind": "failed", "step": 7}\n'), "diverged at step 7: lower"),
    "not finite": (lambda path: edit(path, lambda r: r | {"loss": math.nan}), "diverged"),
    "not a number": (lambda path: edit(path, lambda r: r | {"loss": "low"}), "lines that are no records"),
    "not a record": (lambda path: path.write_text("[1]\n" + path.read_text()), "lines that are no records"),
    "other tokens": (lambda path: edit(path, lambda r: r | {"tokens": r["tokens"] + 1}), "was edited"),
    "other steps": (lambda path: edit(path, lambda r: r | {"step": r["step"] + 1}), "up to step 21"),
    "none": (lambda path: path.unlink(), "is not trained yet"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_one_line_and_the_rest_goes_on(trained, name):
    trial, folder, path = metrics_of(trained)
    damage, message = DAMAGE[name]
    damage(path)
    results, problems = sweep.collect(trained[0], folder)
    assert len(results) == 3 and len(problems) == 1
    assert message in problems[0] and problems[0].startswith(trial.name) and "\n" not in problems[0]


def test_a_finished_run_with_a_damaged_record_is_told_from_an_unfinished_one(trained):
    trial, folder, path = metrics_of(trained)
    drop_end(path)
    with pytest.raises(sweep.UnfinishedError, match="is unfinished"):
        sweep.result(trial, folder)
    (path.parent / "checkpoints" / "20").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is damaged or was edited .* delete .* to train it again") as error:
        sweep.result(trial, folder)
    assert not isinstance(error.value, sweep.UnfinishedError)


def test_another_run_in_the_folder_is_refused(trained):
    trial, folder, _ = metrics_of(trained)
    other = dataclasses.replace(trial.config, seed=7)
    with pytest.raises(UserError, match="is of another run \\(seed 0 instead of 7\\)"):
        sweep.result(dataclasses.replace(trial, config=other), folder)
    (folder / trial.name / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        sweep.result(trial, folder)


def test_the_reason_of_a_failed_try_is_told(trained):
    trial, folder, path = metrics_of(trained)
    drop_end(path)
    (path.parent / "failure.txt").write_text("non-finite loss nan at step 17\nTraceback ...\n")
    with pytest.raises(UserError, match=r"its last try failed: non-finite loss nan at step 17$"):
        sweep.result(trial, folder)


# Learning rates


RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)


def rate_config(**changes) -> ScalingConfig:
    rule = LearningRateConfig(rule="sweep", rates=RATES, tokens_per_parameter=20.0, seeds=(0, 1))
    return make_config(learning_rate=dataclasses.replace(rule, **changes), grid={"sizes": (SMALL, LARGE)})


def swept(config: ScalingConfig, best: dict[str, float], left_out=()) -> list:
    """Results whose loss is a parabola in the logarithm of the rate, lowest at `best`; seeds move it up and down."""
    results = []
    for trial in learning_rate.trials(config)[0]:
        rate = trial.config.optimizer.learning_rate
        if (trial.size, rate) in left_out:
            continue
        parameters = flops.count(trial.config.model)
        loss = 3 + 0.1 * math.log(rate / best[trial.size]) ** 2 + (0.01 if trial.config.seed else -0.01)
        results.append(
            sweep.TrialResult(
                name=trial.name,
                size=trial.size,
                model=trial.config.model,
                sequence_length=8,
                parameters=parameters.total,
                non_embedding_parameters=parameters.non_embedding,
                tokens=trial.tokens,
                unique_tokens=trial.tokens,
                compute=1.0,
                learning_rate=rate,
                seed=trial.config.seed,
                loss=loss,
                curve=((trial.tokens, loss),),
            )
        )
    return results


def test_a_sweep_of_rates_is_a_grid_of_its_own():
    trials, problems = learning_rate.trials(rate_config(sizes=("d32", "d64")))
    assert {t.size for t in trials} == {"d32"}
    assert [t.config.optimizer.learning_rate for t in trials[::2]] == list(RATES)
    assert problems == ["config.learning_rate.sizes: no size is called d64"]
    with pytest.raises(UserError, match=r"^config.learning_rate.sizes: no size is called d64$"):
        learning_rate.trials(rate_config(sizes=("d64",)))
    parameters = models.count_parameters(trials[0].config.model)
    assert all(abs(t.tokens / parameters - 20) < 0.1 for t in trials)


@pytest.mark.parametrize("predicted", [dataclasses.replace(LARGE, name="target", num_layers=8), LARGE])
def test_what_is_to_be_predicted_is_not_swept_before(predicted):
    config = dataclasses.replace(rate_config(), prediction=PredictionConfig(compute=1e12, size=predicted))
    trials, problems = learning_rate.trials(config)
    assert {t.size for t in trials} == {"d16", "d32"} and problems == []
    choices, _ = learning_rate.choose(config, swept(config, {"d16": 4e-3, "d32": 4e-3}))
    if predicted.name == "target":
        assert choices[-1].why.endswith("fitted to sizes d16, d32")
    assert [choice.size for choice in choices] == list(dict.fromkeys(["d16", "d32", predicted.name]))


def test_the_parabola_finds_the_best_rate_between_those_tried():
    config = rate_config()
    choices, problems = learning_rate.choose(config, swept(config, {"d16": 5e-3, "d32": 3.1e-3}))
    assert problems == []
    assert {c.size: pytest.approx(c.rate, rel=5e-4) for c in choices} == {"d16": 5e-3, "d32": 3.1e-3}
    assert all(choice.rate == float(f"{choice.rate:.4g}") for choice in choices)
    assert choices[0].why == "its own sweep of 5 rates: the lowest point of a parabola through 0.002, 0.004, 0.008"


def test_sizes_that_were_not_swept_follow_a_line_in_logarithms():
    middle = SizeConfig(name="d24", hidden_size=24, num_layers=2, num_heads=2, ffn_size=48)
    config = rate_config(sizes=("d16", "d32"))
    grid = dataclasses.replace(config.grid, sizes=(SMALL, middle, LARGE))
    target = dataclasses.replace(LARGE, name="target", num_layers=8)
    config = dataclasses.replace(config, grid=grid, prediction=PredictionConfig(compute=1e12, size=target))

    def law(size: SizeConfig) -> float:
        return 0.3 * flops.count(sweep.sized(config.base.model, size)).non_embedding ** -0.5

    best = {"d16": law(SMALL), "d32": law(LARGE)}
    choices, problems = learning_rate.choose(config, swept(config, best))
    assert problems == []
    assert [c.size for c in choices] == ["d16", "d24", "d32", "target"]
    for choice, size in zip(choices, (SMALL, middle, LARGE, target)):
        assert choice.rate == pytest.approx(law(size), rel=5e-4)
    assert choices[1].why == "rate = 0.3 * N^-0.500 fitted to sizes d16, d32"
    json.dumps([dataclasses.asdict(c) for c in choices])


def test_a_best_rate_at_the_edge_is_said():
    config = rate_config()
    choices, problems = learning_rate.choose(config, swept(config, {"d16": 1.0, "d32": 4e-3}))
    assert choices[0].rate == 16e-3
    assert problems == [
        "size d16: the best learning rate, 0.016, is the largest one tried: add larger ones to "
        "config.learning_rate.rates"
    ]


@pytest.mark.parametrize("seeds", [(0, 1), (1,)])
def test_a_rate_that_not_every_seed_survives_counts_as_worse(seeds):
    """Though its surviving seed is better than all others."""
    config = rate_config()
    results = swept(config, {"d16": 20e-3, "d32": 4e-3})
    results = [r for r in results if (r.size, r.learning_rate) != ("d16", 16e-3) or r.seed not in seeds]
    choices, problems = learning_rate.choose(config, results)
    assert choices[0].rate == 8e-3
    assert choices[0].why == "the best of its own sweep of 5 rates; 0.016 beside it, not finished, counts as worse"
    assert problems == ["size d16: beside the best learning rate, 0.008, 0.016 has not finished every seed"]


def test_a_best_rate_beside_one_that_diverged_is_a_point_of_the_line():
    config = rate_config()
    target = dataclasses.replace(LARGE, name="target", num_layers=8)
    config = dataclasses.replace(config, prediction=PredictionConfig(compute=1e12, size=target))
    results = swept(config, {"d16": 8e-3, "d32": 8e-3}, left_out=[("d16", 16e-3)])
    choices, _ = learning_rate.choose(config, results)
    assert choices[-1].rate == 8e-3 and choices[-1].why.endswith("fitted to sizes d16, d32")


def test_a_size_without_a_whole_rate_follows_the_others():
    config = rate_config()
    results = [r for r in swept(config, {"d16": 4e-3, "d32": 4e-3}) if r.size == "d32" or r.seed == 0]
    choices, problems = learning_rate.choose(config, results)
    assert choices[0].why == "that of size d32, the only one swept"
    assert problems == ["size d16: no learning rate has a result for every seed"]


def test_the_line_is_fitted_to_enclosed_optima_where_there_are_enough():
    middle = SizeConfig(name="d24", hidden_size=24, num_layers=2, num_heads=2, ffn_size=48)
    config = rate_config(sizes=("d16", "d24", "d32"))
    grid = dataclasses.replace(config.grid, sizes=(SMALL, middle, LARGE))
    config = dataclasses.replace(config, grid=grid)
    target = dataclasses.replace(LARGE, name="target", num_layers=8)
    config = dataclasses.replace(config, prediction=PredictionConfig(compute=1e12, size=target))
    choices, _ = learning_rate.choose(config, swept(config, {"d16": 4e-3, "d24": 1.0, "d32": 4e-3}))
    assert choices[-1].rate == pytest.approx(4e-3) and choices[-1].why.endswith("fitted to sizes d16, d32")


def test_one_swept_size_gives_its_rate_to_all_and_none_the_bases():
    config = rate_config(sizes=("d16",))
    choices, _ = learning_rate.choose(config, swept(config, {"d16": 5e-3}))
    assert choices[1].rate == pytest.approx(5e-3) and choices[1].why == "that of size d16, the only one swept"
    choices, problems = learning_rate.choose(config, [])
    assert [c.rate for c in choices] == [1e-2, 1e-2] and len(problems) == 1


def test_mup_says_where_more_than_the_width_differs():
    config = make_config(learning_rate=LearningRateConfig(rule="mup", mup_base_width=16))
    wider = SizeConfig(name="wider", hidden_size=48, num_layers=3, num_heads=2, ffn_size=99)
    config = dataclasses.replace(config, grid=dataclasses.replace(config.grid, sizes=(SMALL, wider)))
    _, problems = learning_rate.choose(config)
    why = "but muP carries the learning rate over widths alone: make it equal"
    assert problems == [
        f"rule mup: head_dim is 8 of size d16 and 24 of wider, {why}",
        f"rule mup: ffn_size / hidden_size is 2 of size d16 and 2.062 of wider, {why}",
        f"rule mup: num_layers is 1 of size d16 and 3 of wider, {why}",
    ]


@pytest.mark.parametrize("rule", ["fixed", "mup"])
def test_rules_without_a_sweep(rule):
    alike = dataclasses.replace(SMALL, name="d32", hidden_size=32, num_heads=4, ffn_size=65)
    rates = LearningRateConfig(rule=rule, mup_base_width=16)
    config = make_config(learning_rate=rates, grid={"sizes": (SMALL, alike)})
    choices, problems = learning_rate.choose(config)
    assert [c.rate for c in choices] == [1e-2, 1e-2] and problems == []
    widths = {trial.config.model.mup_base_width for trial in sweep.expand(config)[0]}
    assert widths == {16 if rule == "mup" else 0}
