"""A chat with whatever format and sampling the model was made for.

    python -m experiments.chat --model=smollm2

The model's file is downloaded once, 93 MB. Expect SmolLM2-135M to know what many know, in good English, and to be
wrong about the rest with the same assurance.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Nothing is overridden."""
    return ml_collections.ConfigDict({})
