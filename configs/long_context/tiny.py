"""The long-context experiment in seconds, on Python's own library: to see that everything works, not for its figures.

    python -m experiments.long_context --config=configs/long_context/tiny.py --workdir=runs/long_context_tiny

Expect every row to be nearly the same: so small a model has learned nothing of positions.
"""

import ml_collections

from llm_jax import config

LENGTH = 32


def get_config() -> ml_collections.ConfigDict:
    """Two layers, 60 steps, and windows of up to four times the trained length."""
    train = config.TrainConfig(
        steps=60,
        eval_every=0,
        eval_batches=1,
        model=config.ModelConfig(
            vocab_size=1024,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=16,
            ffn_size=64,
            max_length=LENGTH,
        ),
        optimizer=config.OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        data=config.DataConfig(sequence_length=LENGTH, batch_size=8),
    )
    corpus = config.CorpusConfig(profile="tiny", sources=("standard_library",))
    return ml_collections.ConfigDict(
        {
            "multiples": (1, 2, 4),
            "documents": 4,
            "corpus": config.to_config_dict(corpus),
            "tokenizer": config.to_config_dict(config.TokenizerConfig(vocab_size=1024, sample_bytes=500_000)),
            "train": config.to_config_dict(train),
        }
    )
