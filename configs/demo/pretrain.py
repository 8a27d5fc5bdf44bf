"""The demo's pre-training run: a small decoder in Baichuan-2's style (RoPE, NormHead, max-z loss).

    python -m experiments.pretrain --config=configs/demo/pretrain.py --workdir=runs/demo/model \\
        --config.data.dataset=runs/demo/data/dataset

Some minutes on two cores. Width, depth and batch were chosen by held-out bits per byte at equal time: with so few
tokens a smaller model that sees more of them wins.
"""

import dataclasses

import ml_collections

from llm_jax import config
from llm_jax.errors import require

DEMO = config.TrainConfig(
    steps=2600,
    log_every=20,
    eval_every=650,
    eval_batches=4,
    model=config.ModelConfig(
        vocab_size=8192,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        ffn_size=384,
        max_length=256,
        norm_eps=1e-6,
        norm_head=True,
    ),
    loss=config.LossConfig(max_z_loss=2e-4),
    optimizer=config.OptimizerConfig(learning_rate=4e-3, warmup_steps=100, clip_norm=0.5),
    data=config.DataConfig(sequence_length=256, batch_size=4),
    checkpoint=config.CheckpointConfig(every_steps=650),
)
TINY = dataclasses.replace(
    DEMO,
    steps=60,
    eval_every=20,
    optimizer=dataclasses.replace(DEMO.optimizer, warmup_steps=10),
    model=dataclasses.replace(DEMO.model, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2),
    data=config.DataConfig(sequence_length=64, batch_size=8),
)


def get_config(size: str = "demo") -> ml_collections.ConfigDict:
    """The run of the demo, or with `:tiny` one of seconds that only shows that everything works."""
    require(size in ("demo", "tiny"), f"no size {size!r} of the demo's run: demo or tiny")
    return config.to_config_dict(DEMO if size == "demo" else TINY)
