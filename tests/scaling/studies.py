"""A made-up study whose law is known: runs on loss = 40 * compute^-0.1 + 1.5, some better off than others."""

import dataclasses
import math

from llm_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from llm_jax.scaling import flops
from llm_jax.scaling.config import FitConfig, PredictionConfig, ScalingConfig, SizeConfig
from llm_jax.scaling.fit import PowerLaw, fit_power_law
from llm_jax.scaling.report import Prediction
from llm_jax.scaling.trial import TrialResult

LENGTH = 64
WIDTHS = {"tiny": 16, "small": 32, "middle": 64, "large": 128}
STEPS = (1e10, 4e10, 1.6e11, 6.4e11)  # FLOPs at which a size is best, in the order of the sizes
SEEDS = (0, 1)


def true_loss(compute: float) -> float:
    """The law that the frontier follows."""
    return 40 * compute**-0.1 + 1.5


def run(size: str, width: int, compute: float, seed: int, *, above: float = 0.0, **changes) -> TrialResult:
    """A run of about so many FLOPs that ends `above` the law."""
    model = ModelConfig(
        vocab_size=256, hidden_size=width, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=width // 2,
        ffn_size=2 * width, max_length=LENGTH,
    )  # fmt: skip
    count = flops.count(model)
    tokens = round(compute / flops.training_flops(model, LENGTH, 1))
    exact = flops.training_flops(model, LENGTH, tokens)
    loss = true_loss(exact) * (1 + 1e-3 * (seed - 0.5)) + above
    curve = tuple((tokens * part // 4, loss + 0.1 * (4 - part)) for part in (1, 2, 3, 4))
    result = TrialResult(
        name=f"{size}-{compute:g}-s{seed}", size=size, model=model, sequence_length=LENGTH, parameters=count.total,
        non_embedding_parameters=count.non_embedding, tokens=tokens, unique_tokens=tokens, compute=exact,
        learning_rate=1e-3, seed=seed, loss=loss, curve=curve,
    )  # fmt: skip
    return dataclasses.replace(result, **changes)


def sweep() -> list[TrialResult]:
    """Every size at the compute where it is best and, a tenth worse, at the next one."""
    best = [run(size, width, c, seed) for (size, width), c in zip(WIDTHS.items(), STEPS) for seed in SEEDS]
    ends = [run("large", WIDTHS["large"], 4 * STEPS[-1], seed) for seed in SEEDS]
    worse = [run(size, width, 4 * c, 0, above=0.1) for (size, width), c in list(zip(WIDTHS.items(), STEPS))[:-1]]
    return [*best, *ends, *worse]


def config() -> ScalingConfig:
    """The config of a study that would predict the run that `prediction` does."""
    (huge, *_) = prediction().actual
    data = DataConfig(sequence_length=LENGTH, batch_size=1)
    return ScalingConfig(
        base=TrainConfig(model=huge.model, data=data, optimizer=OptimizerConfig(warmup_steps=0)),
        prediction=PredictionConfig(compute=huge.compute, size=SizeConfig(name=huge.size)),
        fit=FitConfig(draws=50),
    )


def law() -> PowerLaw:
    """Fitted to the best runs at each compute."""
    frontier = [result for result in sweep() if result.loss < 1.01 * true_loss(result.compute)]
    return fit_power_law([result.compute for result in frontier], [result.loss for result in frontier])


def prediction() -> Prediction:
    """Of a run with ten times the compute of any fitted, and three of them."""
    actual = tuple(run("huge", 256, 40 * STEPS[-1], seed) for seed in (0, 1, 2))
    low, high = law().predict_interval(actual[0].compute)
    return Prediction("huge", actual[0].compute, law().predict(actual[0].compute), low, high, 0.95, actual)


def isoflop_sweep() -> list[TrialResult]:
    """Five sizes at three budgets; losses are parabolas in log N, lowest at N = sqrt(compute) / 3."""
    runs = []
    for compute in (1e10, 1e11, 1e12):
        for width in (24, 40, 64, 104, 168):
            one = run(f"w{width}", width, compute, 0)
            loss = 3 + 0.05 * math.log(one.parameters / best_size(compute)) ** 2 - math.log10(compute) / 10
            runs.append(dataclasses.replace(one, loss=loss, curve=((one.tokens, loss),)))
    return runs


def best_size(compute: float) -> float:
    """The size with the lowest loss in `isoflop_sweep`."""
    return math.sqrt(compute) / 3
