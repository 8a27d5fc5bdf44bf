"""The reports' own models and pre-training settings: llama2_*, baichuan_*, baichuan2_* and qwen_* on a cluster.

    python -m experiments.pretrain --config=configs/pretrain/papers.py:baichuan2_13b --workdir=... \\
        --config.data.dataset=...

How layers are executed is what plans prefer on 1,024 A800 (docs/cluster.md); `experiments.plan --choose` says what is
best elsewhere. The number of steps is the report's token count over its batch of tokens. Where a report does not state
a value (Baichuan-2's batch, the loss's chunk, recomputation, microbatches), the value is ours. Baichuan-1 has no
report: its token counts are those of its release notes, and it takes Baichuan-2's optimiser.
"""

import dataclasses

import ml_collections

from llm_jax import config
from llm_jax.models import presets as model_presets
from llm_jax.optim import presets as optimizer_presets

BATCH_TOKENS = 4 * 2**20  # LLaMA-2 and Qwen: 4M tokens; taken for Baichuan too
TRILLION = 10**12
TOKENS = {
    "llama2_7b": 2.0,
    "llama2_13b": 2.0,
    "llama2_34b": 2.0,
    "llama2_70b": 2.0,
    "baichuan_7b": 1.2,
    "baichuan_13b": 1.4,
    "baichuan2_7b": 2.6,
    "baichuan2_13b": 2.6,
    "qwen_1_8b": 2.2,
    "qwen_7b": 2.4,
    "qwen_14b": 3.0,
}

# When weights are gathered, and what is kept for the backward pass, where not once a step, and all products.
EXECUTION = {"llama2_34b": ("layer", "dots"), "llama2_70b": ("layer", "save_attention")}


def _optimizer(name: str) -> config.OptimizerConfig:
    if name.startswith("qwen"):
        return optimizer_presets.get("qwen")
    return optimizer_presets.get(name.replace("baichuan_", "baichuan2_"))


def get_config(name: str = "baichuan2_7b") -> ml_collections.ConfigDict:
    """The pre-training run of one of the reports' models."""
    gather, remat = EXECUTION.get(name, ("step", "dots"))
    model = dataclasses.replace(
        model_presets.get(name), compute_dtype="bfloat16", gather=gather, gather_tables=gather, remat=remat
    )
    length = 2048 if name.startswith("qwen") else model.max_length
    return config.to_config_dict(
        config.TrainConfig(
            steps=round(TOKENS.get(name, 1.0) * TRILLION / BATCH_TOKENS),
            model=model,
            loss=config.LossConfig(max_z_loss=2e-4 if name.startswith("baichuan2") else 0.0),
            optimizer=_optimizer(name) if name in TOKENS else config.OptimizerConfig(),
            data=config.DataConfig(sequence_length=length, batch_size=BATCH_TOKENS // length),
            checkpoint=config.CheckpointConfig(every_steps=2000, keep_every_tokens=220 * 10**9),
        )
    )
