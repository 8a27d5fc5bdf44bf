"""The single most likely continuation of each prompt, with a light penalty on repetition.

python -m experiments.generate --config=configs/generate/greedy.py --workdir=runs/demo/model --prompt="..."
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Greedy decoding; small models repeat themselves without the penalty."""
    return ml_collections.ConfigDict({"max_new_tokens": 96, "temperature": 0.0, "repetition_penalty": 1.2})
