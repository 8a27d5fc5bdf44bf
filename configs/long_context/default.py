"""Two models of 3.3 million parameters, with RoPE and with ALiBi, trained at length 128 and read at 128 to 2048.

    python -m experiments.long_context --config=configs/long_context/default.py --workdir=runs/long_context

About 7 minutes for each model on two quiet cores, and a few for reading. Expect plain RoPE to double its perplexity by
2048 tokens, dynamic NTK with windows to keep it within some percent, and ALiBi to start worse and improve (tables and
conditions: docs/long_context.md). --config.seeds="(0, 1)" trains each of them twice.
"""

import ml_collections

from llm_jax import config

LENGTH = 128


def get_config() -> ml_collections.ConfigDict:
    """English texts, most of them far longer than 2048 tokens; 4.1 million tokens of training for each model."""
    train = config.TrainConfig(
        steps=4000,
        log_every=40,
        eval_every=1000,
        eval_batches=8,
        model=config.ModelConfig(
            vocab_size=4096,
            hidden_size=192,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=48,
            ffn_size=512,
            max_length=LENGTH,
            norm_eps=1e-6,
        ),
        optimizer=config.OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        data=config.DataConfig(sequence_length=LENGTH, batch_size=8),
        checkpoint=config.CheckpointConfig(every_steps=500, keep_last=1),
    )
    corpus = config.CorpusConfig(
        profile="clean",
        sources=("state_of_the_union", "django_manuals", "king_james_bible", "wikipedia"),
        holdout_fraction=0.1,
    )
    return ml_collections.ConfigDict(
        {
            "corpus": config.to_config_dict(corpus),
            "tokenizer": config.to_config_dict(config.TokenizerConfig(vocab_size=4096, sample_bytes=10_000_000)),
            "train": config.to_config_dict(train),
        }
    )
