"""What cleaning the default corpus is worth to a small model: three training sets, three seeds.

    python -m experiments.corpus_ablation --config=configs/corpus_ablation/default.py --workdir=runs/corpus_ablation

1.1 million parameters beside embedding and head, 614,400 tokens a run: about three minutes of one core each.
"""

import ml_collections

from experiments.corpus_ablation import AblationConfig
from llm_jax import config
from llm_jax.data.prepare import PrepareConfig


def get_config() -> ml_collections.ConfigDict:
    """Five layers of width 128, 1200 steps of 4 x 128 tokens."""
    train = config.TrainConfig(
        steps=1200,
        eval_every=0,
        eval_batches=1,
        model=config.ModelConfig(
            vocab_size=6144,
            hidden_size=128,
            num_layers=5,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            ffn_size=384,
            max_length=128,
        ),
        optimizer=config.OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        data=config.DataConfig(sequence_length=128, batch_size=4),
        checkpoint=config.CheckpointConfig(every_steps=1200),
    )
    tokenizer = config.TokenizerConfig(vocab_size=6144, character_coverage=0.99, sample_bytes=10_000_000)
    return config.to_config_dict(
        AblationConfig(prepare=PrepareConfig(holdout_fraction=0.02), tokenizer=tokenizer, train=train)
    )
