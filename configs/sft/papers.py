"""Supervised fine-tuning as the reports state it: llama2, baichuan2, qwen, math_qwen and code_qwen.

    python -m experiments.sft --config=configs/sft/papers.py:llama2 --config.training.model=MODEL \\
        --config.data.path=CONVERSATIONS.jsonl --workdir=...

LLaMA-2 (section 3.1): peak 2e-5, cosine, weight decay 0.1, 64 sequences of 4,096 tokens, 2 epochs, loss on replies
alone. Qwen (section 3.1.2): ChatML, 128 sequences of 2,048 tokens, 4,000 steps, 1,430 of them to warm up to 2e-6,
dropout 0.1, clip 1. Math-Qwen-Chat (section 5): 1,024 tokens, 2e-5, 50,000 steps. Code-Qwen is first pre-trained
further on code at 8,192 tokens (experiments.pretrain: constant 3e-5 for 7B, 6e-5 for 14B, warm-up 3 %) and then fine-
tuned in stages: run this once for each stage, each with the stage before as its model. Baichuan-2 does not state its
settings: those here are LLaMA-2's, with its own template and label. What a report leaves open is as in LLaMA-2, or
ours: Qwen's final rate, the rates of Code-Qwen's stages and the batch of Math-Qwen-Chat.
"""

import dataclasses

import ml_collections

from llm_jax import config
from llm_jax.alignment.config import ChatDataConfig, FineTuneConfig, SftConfig

_LLAMA2 = FineTuneConfig(
    epochs=2.0,
    compute_dtype="bfloat16",
    remat="save_attention",
    optimizer=config.OptimizerConfig(learning_rate=2e-5, warmup_steps=0, eps=1e-5, weight_decay=0.1),
)
_QWEN = dataclasses.replace(
    _LLAMA2,
    steps=4000,
    dropout_rate=0.1,
    optimizer=config.OptimizerConfig(learning_rate=2e-6, warmup_steps=1430, b2=0.95, eps=1e-8, weight_decay=0.1),
)
_AT_2E5 = dataclasses.replace(_QWEN.optimizer, learning_rate=2e-5, warmup_steps=0)

PRESETS = {
    "llama2": (_LLAMA2, ChatDataConfig(template="llama2", sequence_length=4096, batch_size=64)),
    "baichuan2": (_LLAMA2, ChatDataConfig(template="baichuan2", sequence_length=4096, batch_size=64)),
    "qwen": (_QWEN, ChatDataConfig(template="chatml", sequence_length=2048, batch_size=128)),
    "math_qwen": (
        dataclasses.replace(_QWEN, steps=50_000, optimizer=_AT_2E5),
        ChatDataConfig(template="chatml", sequence_length=1024, batch_size=128),
    ),
    "code_qwen": (
        dataclasses.replace(_QWEN, steps=0, epochs=2.0, optimizer=_AT_2E5),
        ChatDataConfig(template="chatml", sequence_length=8192, batch_size=128),
    ),
}


def get_config(name: str = "llama2") -> ml_collections.ConfigDict:
    """The fine-tuning of one of the reports."""
    training, data = PRESETS[name]
    return config.to_config_dict(SftConfig(training=training, data=data))
