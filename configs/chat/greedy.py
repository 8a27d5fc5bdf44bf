"""The most likely reply to every message: the same transcript on every run.

python -m experiments.chat --config=configs/chat/greedy.py --model=smollm2 --prompt="What is the capital of France?"
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Greedy decoding, with short replies."""
    return ml_collections.ConfigDict({"temperature": 0.0, "max_new_tokens": 128})
