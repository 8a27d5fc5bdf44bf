"""Write rope.npz: the rotary frequencies that transformers computes for scaled models.

    python tests/golden/make_rope.py

Needs torch and transformers, which the tests do not: run it again only to add a case. Written with transformers 5.23.
"""

from pathlib import Path

import numpy as np
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# The rotary settings of LLaMA-3.1, one with both factors elsewhere, and linear interpolation.
CASES = {
    "llama3_1": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3_other": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 512,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
}


def main() -> None:
    """Compute every case for heads of 128, write the file."""
    outputs = {}
    for name, parameters in CASES.items():
        config = LlamaConfig(
            hidden_size=256, num_attention_heads=2, max_position_embeddings=1 << 17, rope_parameters=parameters
        )
        function = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        outputs[name] = function(config, "cpu")[0].numpy()
    np.savez_compressed(Path(__file__).with_name("rope.npz"), **outputs)


if __name__ == "__main__":
    main()
