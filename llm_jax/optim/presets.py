"""The pre-training hyper-parameters of the reports, by model; `decay_steps` stays at 0, the run's length.

LLaMA-2 states all of its values (section 2.2). Baichuan-2 states peak, warm-up, cosine, betas, weight decay and clip:
eps and the final fraction are ours. Qwen states peak, cosine to 10 %, betas and eps: warm-up, weight decay and clip
are ours.
"""

import dataclasses
import difflib

from llm_jax.config import OptimizerConfig
from llm_jax.errors import UserError

_LLAMA2 = OptimizerConfig(
    learning_rate=3e-4,
    schedule="cosine",
    warmup_steps=2000,
    final_fraction=0.1,
    b1=0.9,
    b2=0.95,
    eps=1e-5,
    weight_decay=0.1,
    clip_norm=1.0,
)
_BAICHUAN2 = dataclasses.replace(_LLAMA2, learning_rate=2e-4, eps=1e-8, clip_norm=0.5)
_QWEN = dataclasses.replace(_LLAMA2, eps=1e-8)

PRESETS = {
    "llama2_7b": _LLAMA2,
    "llama2_13b": _LLAMA2,
    "llama2_34b": dataclasses.replace(_LLAMA2, learning_rate=1.5e-4),
    "llama2_70b": dataclasses.replace(_LLAMA2, learning_rate=1.5e-4),
    "baichuan2_7b": _BAICHUAN2,
    "baichuan2_13b": dataclasses.replace(_BAICHUAN2, learning_rate=1.5e-4),
    "qwen": _QWEN,
}


def get(name: str) -> OptimizerConfig:
    """The preset of a model; raises `UserError` naming the nearest one where there is none of that name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise UserError(f"no optimizer preset {name!r}; did you mean {near!r}?")
    return PRESETS[name]
