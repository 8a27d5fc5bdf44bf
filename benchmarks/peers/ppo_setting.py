"""One iteration of PPO as the benchmark of it has it, the same for every implementation. Depends on nothing but numpy.

Both sides draw from all of the vocabulary, have no end token and so responses of full length, learn from each response
in every epoch in minibatches of the same size, and are paid for the share of a response's tokens that are in the lower
half of the vocabulary.
"""

import numpy as np

from benchmarks.peers.shapes import Generation

SHAPE = Generation(
    hidden=192,
    layers=4,
    heads=6,
    kv_heads=6,
    ffn=512,
    vocabulary=320,
    head_dim=32,
    batch=32,
    prompt=8,
    new_tokens=24,
)
INIT_STD = 0.1  # so that the draws are far from uniform, and another temperature would be seen in their entropy
EPOCHS, MINIBATCH = 4, 16
LEARNING_RATE, KL, GAMMA, LAM, CLIP, VALUE_CLIP = 1e-5, 0.05, 1.0, 0.95, 0.2, 0.2
PARTS = ("rollout", "score", "update")  # of an iteration, whose times are told
LEARNED = EPOCHS * SHAPE.batch * SHAPE.new_tokens  # tokens of responses that an iteration's updates see


def prompt_tokens() -> list[list[int]]:
    """Random tokens: prompts of four iterations."""
    return np.random.default_rng(0).integers(0, SHAPE.vocabulary, (4 * SHAPE.batch, SHAPE.prompt)).tolist()
