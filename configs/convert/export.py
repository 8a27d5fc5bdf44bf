"""A model trained here as a Hugging Face folder, which transformers reads.

    python -m experiments.convert --config=configs/convert/export.py --workdir=exported --config.source=runs/demo/model

A model with RoPE and a plain head is written as a LLaMA, with QKV biases as a Qwen2; one with ALiBi or a NormHead as a
Baichuan, for which transformers needs Baichuan's own modelling code. --config.dtype=bfloat16 halves the files.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The plainest family that can express the model."""
    return ml_collections.ConfigDict({"to": "huggingface"})
