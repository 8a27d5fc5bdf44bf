"""The demo's pre-training run: a small decoder in Baichuan-2's style (RoPE, NormHead, max-z loss).

    python -m experiments.pretrain --config=configs/demo/pretrain.py --workdir=runs/demo/model \\
        --config.data.dataset=runs/demo/data/dataset

Some minutes on two cores. Width, depth and batch were chosen by held-out bits per byte at equal time: with so few
tokens a smaller model that sees more of them wins.
"""

import dataclasses

import ml_collections

from llm_jax import config

DEMO = config.TrainConfig(
    steps=1900,
    log_every=10,
    eval_every=475,
    eval_batches=2,
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
    optimizer=config.OptimizerConfig(learning_rate=4e-3, warmup_steps=100, clip_norm=0.5),
    data=config.DataConfig(sequence_length=256, batch_size=8),
    checkpoint=config.CheckpointConfig(every_steps=475),
)
TINY = dataclasses.replace(
    DEMO,
    steps=60,
    eval_every=20,
    optimizer=dataclasses.replace(DEMO.optimizer, warmup_steps=10),
    model=dataclasses.replace(DEMO.model, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32),
    data=config.DataConfig(sequence_length=64, batch_size=8),
)


def get_config(size: str = "demo") -> ml_collections.ConfigDict:
    """The run of the demo, or with `:tiny` one of seconds that only shows that everything works."""
    return config.to_config_dict({"demo": DEMO, "tiny": TINY}[size])
