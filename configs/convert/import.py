"""A released model as a run folder of this project: a sharded Orbax checkpoint, the tokenizer, the chat template.

    python -m experiments.convert --config=configs/convert/import.py --workdir=runs/smollm2 --config.source=smollm2

The source is a Hugging Face folder, a .gguf file or a name. SmolLM2-135M takes about ten seconds on two cores, and
its checkpoint gives exactly its logits.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Weights in the dtype in which they are stored."""
    return ml_collections.ConfigDict({"to": "run"})
