"""Baichuan-2's scaling-law study on a Slurm cluster: seven sizes of 11 million to 3 billion parameters, 1T tokens each.

    python -m experiments.scaling_laws --config=configs/scaling_laws/baichuan2.py:7b --workdir=runs/baichuan2_scaling \\
        --config.base.data.dataset=... --config.launcher.partition=...

The argument is the model whose loss is predicted after 2.6T tokens: 7b (default) or 13b. Sizes, tokens, NormHead,
max-z loss and the optimiser are the report's, which gives all sizes the same hyper-parameters. The batch of 4M tokens,
the learning rate of the sweep (the 7B model's) and the layout on the cluster are ours: 16 hosts of 8 A800 for each
trial, with which the largest size takes 16 days at 40 % of the peak (docs/scaling_laws.md has the table).
The 13B model is predicted with the sweep's rotary positions instead of its ALiBi, which cost the same.
"""

import dataclasses

import ml_collections

from configs.pretrain import papers
from llm_jax import config
from llm_jax.models import presets
from llm_jax.scaling import flops
from llm_jax.scaling.config import GridConfig, LauncherConfig, PredictionConfig, ScalingConfig, SizeConfig

SIZES = ("11m", "51m", "108m", "307m", "835m", "1565m", "3019m")
TOKENS = 10**12


def _size(name: str, preset: str) -> SizeConfig:
    model = presets.get(preset)
    return SizeConfig(
        name=name,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        ffn_size=model.ffn_size,
    )


def get_config(predicted: str = "7b") -> ml_collections.ConfigDict:
    """The study that predicts the loss of Baichuan-2 7B or 13B."""
    preset = f"baichuan2_{predicted}"
    model = presets.get(preset)
    target = config.from_config_dict(config.TrainConfig, papers.get_config(preset))
    base = config.from_config_dict(config.TrainConfig, papers.get_config("baichuan2_7b"))
    return config.to_config_dict(
        ScalingConfig(
            base=dataclasses.replace(base, steps=TOKENS // papers.BATCH_TOKENS),
            curve_points=50,
            grid=GridConfig(sizes=tuple(_size(name, f"baichuan2_sweep_{name}") for name in SIZES), tokens=(TOKENS,)),
            launcher=LauncherConfig(
                kind="slurm",
                together=1,
                parallel=len(SIZES),
                retries=3,
                timeout_minutes=21 * 24 * 60,
                nodes=16,
                gpus_per_node=8,
                cpus_per_task=64,
                memory_gigabytes=900,
            ),
            prediction=PredictionConfig(
                compute=flops.training_flops(model, target.data.sequence_length, target.steps * papers.BATCH_TOKENS),
                size=_size(predicted, preset),
                seeds=(0,),
            ),
        )
    )
