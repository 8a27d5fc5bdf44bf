"""A small Baichuan-2-style decoder (RoPE, NormHead, max-z loss) for a laptop or for one's own text.

    python -m experiments.pretrain --config=configs/pretrain/small.py --workdir=runs/small \\
        --config.data.dataset=runs/own_text/dataset

Some minutes on two cores. The vocabulary is 8192; a smaller tokenizer works too.
"""

import ml_collections

from llm_jax import config


def get_config() -> ml_collections.ConfigDict:
    """About 5 million parameters, 400 steps of 8 x 256 tokens."""
    return config.to_config_dict(
        config.TrainConfig(
            steps=400,
            eval_every=100,
            model=config.ModelConfig(
                vocab_size=8192,
                hidden_size=192,
                num_layers=4,
                num_heads=3,
                num_kv_heads=3,
                head_dim=64,
                ffn_size=512,
                max_length=256,
                norm_eps=1e-6,
                norm_head=True,
            ),
            loss=config.LossConfig(max_z_loss=2e-4),
            optimizer=config.OptimizerConfig(learning_rate=3e-3, warmup_steps=40, clip_norm=0.5),
            data=config.DataConfig(sequence_length=256, batch_size=8),
            checkpoint=config.CheckpointConfig(every_steps=100),
        )
    )
