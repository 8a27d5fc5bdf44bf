"""A scaling study of some minutes that shows how everything works; its law is not to be trusted.

    python -m experiments.scaling_laws --config=configs/scaling_laws/tiny.py --workdir=runs/scaling_laws_tiny

The Python standard library in 1,024 pieces, four sizes, six budgets of 2e9 to 1.6e11 FLOPs, and a run of ten times
more to predict.
"""

import dataclasses

import ml_collections

from configs.scaling_laws import cpu
from llm_jax import config
from llm_jax.scaling.config import FitConfig, GridConfig, LearningRateConfig, PredictionConfig, ScalingConfig

VOCABULARY = 1024


def get_config() -> ml_collections.ConfigDict:
    """The study for two cores, with far less of everything."""
    study = config.from_config_dict(ScalingConfig, cpu.get_config())
    base = dataclasses.replace(
        study.base,
        eval_batches=32,
        model=dataclasses.replace(study.base.model, vocab_size=VOCABULARY),
        optimizer=dataclasses.replace(study.base.optimizer, learning_rate=2e-2),
    )
    return config.to_config_dict(
        dataclasses.replace(
            study,
            base=base,
            curve_points=4,
            grid=GridConfig(
                sizes=tuple(cpu.size(hidden) for hidden in (4, 8, 16, 32)),
                compute=(2e9, 5e9, 1.2e10, 2.8e10, 6.7e10, 1.6e11),
                least_tokens_per_parameter=0.9,
                most_tokens_per_parameter=100.0,
            ),
            learning_rate=LearningRateConfig(),
            fit=FitConfig(draws=200),
            prediction=PredictionConfig(compute=1.6e12, size=cpu.size(48), seeds=(0,)),
            corpus=config.CorpusConfig(profile="tiny", sources=("standard_library",), holdout_fraction=0.02),
            tokenizer=config.TokenizerConfig(vocab_size=VOCABULARY, sample_bytes=3_000_000),
        )
    )
