"""A scaling study for two cores: ten sizes over three decades of compute, and a run of ten times more to predict.

    python -m experiments.scaling_laws --config=configs/scaling_laws/cpu.py --workdir=runs/scaling_laws

English and code in 4,096 pieces, each token read once. Every size gets the learning rate that a small sweep of the
smaller ones suggests. What to expect, and in what time: docs/scaling_laws.md.
"""

import ml_collections

from llm_jax import config
from llm_jax.scaling.config import (
    GridConfig,
    LauncherConfig,
    LearningRateConfig,
    PredictionConfig,
    ScalingConfig,
    SizeConfig,
)

LENGTH = 128
VOCABULARY = 4096
PREDICTED = 128
SOURCES = (
    *("news", "parliament_en", "state_of_the_union", "django_manuals", "king_james_bible", "wikipedia"),
    *("django_source", "standard_library"),
)


# Width -> layers and heads.
SHAPES = {
    **{4: (2, 1), 8: (2, 1), 12: (2, 1), 16: (2, 1), 24: (2, 2), 32: (2, 2), 48: (2, 3)},
    **{64: (3, 2), 80: (3, 4), 96: (3, 3), 128: (4, 4)},
}


def size(hidden: int) -> SizeConfig:
    """A size called by its width, with a feed-forward of 8/3 of that, rounded up to a multiple of 16."""
    layers, heads = SHAPES[hidden]
    ffn = -(-8 * hidden // 3 // 16) * 16
    return SizeConfig(name=f"d{hidden}", hidden_size=hidden, num_layers=layers, num_heads=heads, ffn_size=ffn)


def get_config() -> ml_collections.ConfigDict:
    """Budgets from 1e10 to 1e13 FLOPs, each with the sizes near its best; 1e14 to predict."""
    base = config.TrainConfig(
        log_every=100,
        eval_batches=16,
        model=config.ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_layers=3,
            num_heads=2,
            num_kv_heads=2,
            head_dim=32,
            ffn_size=176,
            max_length=LENGTH,
            init_std=0.06,  # at 0.02, models so narrow take long to leave the start
        ),
        # For batches of 512 tokens the reports' b2, 0.95, is too noisy: it costs 0.05 to 0.2 nats (docs/log.md).
        optimizer=config.OptimizerConfig(learning_rate=8e-3, final_fraction=0.0, b2=0.999),
        mesh=config.MeshConfig(data=1),
        data=config.DataConfig(sequence_length=LENGTH, batch_size=4),
        checkpoint=config.CheckpointConfig(every_steps=5000, keep_last=1),
    )
    return config.to_config_dict(
        ScalingConfig(
            base=base,
            warmup_fraction=0.1,
            grid=GridConfig(
                sizes=tuple(size(hidden) for hidden in SHAPES if hidden != PREDICTED),
                compute=(1e10, 3.2e10, 1e11, 3.2e11, 1e12, 3.2e12, 1e13),
                least_tokens_per_parameter=0.9,
                most_tokens_per_parameter=20.0,
                seeds=(0, 1, 2),
                seeds_up_to=1.1e12,
            ),
            learning_rate=LearningRateConfig(
                rule="sweep",
                rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
                sizes=("d4", "d8", "d16", "d32", "d48"),
                tokens_per_parameter=4.0,
            ),
            launcher=LauncherConfig(kind="processes", parallel=2, together_up_to=3e12),
            prediction=PredictionConfig(compute=1e14, size=size(PREDICTED)),
            corpus=config.CorpusConfig(profile="default", sources=SOURCES, holdout_fraction=0.02),
            tokenizer=config.TokenizerConfig(vocab_size=VOCABULARY, sample_bytes=10_000_000),
        )
    )
